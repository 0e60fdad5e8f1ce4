// Products with int8 weights: 64 multiplications an instruction (AVX-512 VNNI) or 16,384 (AMX), and half the bytes of bfloat16.
//
// A weight is an integer from -127 to 127 times its output's scale, and an input one times its row's scale, which is found when
// the product is computed. Weights lie in panels of 64 outputs; in a panel, for each four inputs, the four weights of each
// output.
// The instructions, AMX's too, multiply unsigned bytes by signed ones. So inputs are stored plus 128, and 128 times the sum of an output's
// weights, its offset, is subtracted from the sums, which are exact in 32 bits.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "functions.h"
#include "linear.h"
#include "tiles.h"

#if HAS_AVX512 && defined(__AVX512VNNI__)
#define HAS_INT8_DOT 1
#else
#define HAS_INT8_DOT 0
#endif

extern "C" int supports_int8() { return HAS_INT8_DOT; }

#if HAS_INT8_DOT

namespace {

constexpr float LARGEST = 127;

// Stores `inputs` numbers of x as integers plus 128, and 128 (zero) as far as `padded`; returns their scale.
float quantise(const bfloat16* x, int64_t inputs, int64_t padded, uint8_t* to) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += LANES) most = _mm512_max_ps(most, _mm512_abs_ps(load(x + i, first_lanes(inputs - i))));
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 factor = _mm512_set1_ps(largest > 0 ? LARGEST / largest : 0);
    for (int64_t i = 0; i < padded; i += LANES) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, first_lanes(inputs - i)), factor));
        const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(to + i, first_lanes(padded - i), _mm512_cvtepi32_epi8(shifted));
    }
    return largest / LARGEST;
}

template <int COUNT>
void multiply_block(const uint8_t* x, int64_t stride, const int8_t* weights, int64_t quads, int32_t (*sums)[BLOCK]) {
    __m512i sum[COUNT][PARTS];
    for (auto& row : sum)
        for (auto& part : row) part = _mm512_setzero_si512();
    for (int64_t quad = 0; quad < quads; ++quad) {
        __m512i weight[PARTS];
        for (int j = 0; j < PARTS; ++j) weight[j] = _mm512_loadu_si512(weights + (quad * BLOCK + j * LANES) * 4);
        for (int r = 0; r < COUNT; ++r) {
            int32_t four;
            std::memcpy(&four, x + r * stride + 4 * quad, sizeof four);
            for (int j = 0; j < PARTS; ++j) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], _mm512_set1_epi32(four), weight[j]);
        }
    }
    for (int r = 0; r < COUNT; ++r)
        for (int j = 0; j < PARTS; ++j) _mm512_storeu_si512(sums[r] + j * LANES, sum[r][j]);
}

void multiply_rows(int64_t rows, const uint8_t* x, int64_t stride, const int8_t* weights, int64_t quads,
                   int32_t (*sums)[BLOCK]) {
    switch (rows) {
        case 1: return multiply_block<1>(x, stride, weights, quads, sums);
        case 2: return multiply_block<2>(x, stride, weights, quads, sums);
        case 3: return multiply_block<3>(x, stride, weights, quads, sums);
        case 4: return multiply_block<4>(x, stride, weights, quads, sums);
        case 5: return multiply_block<5>(x, stride, weights, quads, sums);
        default: return multiply_block<ROWS>(x, stride, weights, quads, sums);
    }
}

// Inputs as integers, and what it takes to finish their products.
struct Quantised {
    const Linear& p;
    const uint8_t* numbers;
    const float* scales;
    const bfloat16* residual;
    bfloat16* y;

    void finish_sums(int64_t row, int64_t output, const int32_t* sums) const {
        const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(p.offsets + output));
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[row]), _mm512_loadu_ps(p.scales + output));
        finish(p, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale), residual, y, row * p.outputs, output);
    }
    const int8_t* weights(int64_t output) const {
        return static_cast<const int8_t*>(p.packed) + output / BLOCK * BLOCK * p.padded_inputs + output % BLOCK * 4;
    }
};

// The threads of a parallel region share the products.
void share_dot_products(const Quantised& x, int64_t rows, int64_t threads) {
    const Linear& p = x.p;
    const int64_t quads = p.padded_inputs / 4, panels = (p.outputs + BLOCK - 1) / BLOCK;
    const int64_t group = rows_of_task(rows, panels, threads), groups = (rows + group - 1) / group;
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t task = 0; task < groups; ++task)
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t end = std::min(rows, (task + 1) * group);
            for (int64_t first = task * group; first < end; first += ROWS) {
                int32_t sums[ROWS][BLOCK];
                const int64_t count = std::min(ROWS, end - first);
                multiply_rows(count, x.numbers + first * p.padded_inputs, p.padded_inputs, x.weights(panel * BLOCK), quads, sums);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < BLOCK && panel * BLOCK + j < p.outputs; j += LANES)
                        x.finish_sums(first + r, panel * BLOCK + j, sums[r] + j);
            }
        }
}

#if HAS_AMX

void share_tile_products(const Quantised& x, int64_t rows) {
    const auto columns = [&](int64_t output) {
        const auto* first = reinterpret_cast<const char*>(x.weights(output));
        return TileColumns{{first, first + TILE_ROW_BYTES}, BLOCK * 4};
    };
    const auto finish_sums = [&](int64_t row, int64_t output, const int32_t* sums) { x.finish_sums(row, output, sums); };
    share_products<Int8Tiles, int32_t>(reinterpret_cast<const char*>(x.numbers), x.p.padded_inputs, rows, x.p.outputs, columns,
                                       finish_sums);
}

#endif

}  // namespace

// y = x W^T + bias + residual, or with relu max(0, x W^T + bias), rounded once; x is (rows, inputs), y and residual (rows,
// outputs). bias and residual may be null; residual may be y.
extern "C" void multiply_int8(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows,
                              int64_t threads) {
    const Linear& p = *linear;
    const auto* from = static_cast<const bfloat16*>(x);
    thread_local std::vector<uint8_t> quantised_memory;
    thread_local std::vector<float> scales_memory;
    quantised_memory.resize((rows + LANES - 1) / LANES * LANES * p.padded_inputs);  // whole tiles
    scales_memory.resize(rows);
    uint8_t* quantised = quantised_memory.data();  // of the calling thread, for all
    float* scales = scales_memory.data();
    const Quantised inputs{p, quantised, scales, static_cast<const bfloat16*>(residual), static_cast<bfloat16*>(y)};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
            scales[row] = quantise(from + row * p.inputs, p.inputs, p.padded_inputs, quantised + row * p.padded_inputs);
#if HAS_AMX
        if (rows > p.dot_rows && p.padded_inputs % TILE_ROW_BYTES == 0 && may_use_tiles())
            share_tile_products(inputs, rows);
        else
#endif
            share_dot_products(inputs, rows, threads);
    }
}

#else

extern "C" void multiply_int8(const Linear*, const void*, const void*, void*, int64_t, int64_t) {}  // supports_int8 says no

#endif
