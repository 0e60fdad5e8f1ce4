// Products with int8 weights: 64 multiplications an instruction (AVX-512 VNNI) or 16,384 (AMX), half the bytes of bfloat16.
//
// A weight is an integer from -127 to 127 times its output's scale, and an input one times its row's scale, which is found when
// the product is computed. Weights lie in panels of 64 outputs; in a panel, for each four inputs, the four weights of each
// output.
// The instructions, AMX's too, multiply unsigned bytes by signed ones. So inputs are stored plus 128, and 128 times the sum of
// an output's weights, its offset, is subtracted from the sums, which are exact in 32 bits.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "functions.h"
#include "linear.h"
#include "parts.h"
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
    __m512i most = _mm512_setzero_si512();  // without their signs, numbers are in the order of their bits
    for (int64_t i = 0; i < inputs; i += 2 * LANES) {
        const __mmask32 mask = inputs - i >= 2 * LANES ? ~__mmask32{0} : (__mmask32{1} << (inputs - i)) - 1;
        const __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i), _mm512_set1_epi16(0x7fff));
        most = _mm512_max_epu16(most, bits);
    }
    const __m512i odd = _mm512_and_si512(most, _mm512_set1_epi32(0x7fff0000)), even = _mm512_slli_epi32(most, 16);
    const float largest = _mm512_reduce_max_ps(_mm512_castsi512_ps(_mm512_max_epi32(odd, even)));
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

// A product of quantised inputs, and where its weights lie.
struct Int8Product {
    const Linear& p;
    const bfloat16* residual;
    bfloat16* y;
    int64_t rows;
    const Quantised& x;

    const int8_t* weights(int64_t output) const {
        return static_cast<const int8_t*>(p.packed) + output / BLOCK * BLOCK * p.padded_inputs + output % BLOCK * 4;
    }
};

// Finishes sums of 16 outputs from `output` on: what is the same in all rows is read once.
class Finish {
  public:
    Finish(const Int8Product& product, int64_t output)
        : product_(product), output_(output), mask_(first_lanes(product.p.outputs - output)),
          offsets_(_mm512_loadu_si512(product.p.offsets + output)), scales_(_mm512_loadu_ps(product.p.scales + output)),
          bias_(product.p.bias ? load(static_cast<const bfloat16*>(product.p.bias) + output, mask_) : _mm512_setzero_ps()) {}

    void operator()(int64_t row, const int32_t* sums) const {
        const int64_t at = row * product_.p.outputs + output_;
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(product_.x.scales[row]), scales_);
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), offsets_));
        __m512 y = _mm512_add_ps(_mm512_mul_ps(sum, scale), bias_);
        if (product_.residual) y = _mm512_add_ps(y, load(product_.residual + at, mask_));
        if (product_.p.relu) y = _mm512_max_ps(y, _mm512_setzero_ps());
        save(product_.y + at, mask_, y);
    }

  private:
    const Int8Product& product_;
    const int64_t output_;
    const __mmask16 mask_;
    const __m512i offsets_;
    const __m512 scales_, bias_;
};

void multiply_by_dots(Team& team, const Int8Product& product) {
    const Linear& p = product.p;
    const int64_t quads = p.padded_inputs / 4, panels = (p.outputs + BLOCK - 1) / BLOCK, rows = product.rows;
    const int64_t group = rows_of_task(rows, panels, team.threads()), groups = (rows + group - 1) / group;
    team.each(groups * panels, [&](int64_t begin, int64_t last) {
        for (int64_t task = begin; task < last; ++task) {
            const int64_t panel = task % panels, start = task / panels * group, end = std::min(rows, start + group);
            for (int64_t first = start; first < end; first += ROWS) {
                int32_t sums[ROWS][BLOCK];
                const int64_t count = std::min(ROWS, end - first);
                multiply_rows(count, product.x.numbers + first * p.padded_inputs, p.padded_inputs,
                              product.weights(panel * BLOCK), quads, sums);
                for (int64_t j = 0; j < BLOCK && panel * BLOCK + j < p.outputs; j += LANES) {
                    const Finish finish(product, panel * BLOCK + j);
                    for (int64_t r = 0; r < count; ++r) finish(first + r, sums[r] + j);
                }
            }
        }
    });
}

#if HAS_AMX

void multiply_in_tiles(Team& team, const Int8Product& product) {
    const auto columns = [&](int64_t output) {
        const auto* first = reinterpret_cast<const char*>(product.weights(output));
        return TileColumns{{first, first + TILE_ROW_BYTES}, BLOCK * 4};
    };
    multiply_in_tiles<Int8Tiles, int32_t>(
        team, product.x.numbers, product.p.padded_inputs, product.rows, product.p.outputs, columns,
        [&](int64_t row, int64_t output, const int32_t* sums) { Finish(product, output)(row, sums); });
}

#endif

}  // namespace

// y = x W^T + bias + residual, or with relu max(0, x W^T + bias), rounded once; x is (rows, inputs), y and residual (rows,
// outputs). bias and residual may be null; residual may be y.
void multiply_int8(Team& team, const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows,
                   const Quantised& quantised) {
    team.each(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            quantised.scales[row] =
                quantise(x + row * p.inputs, p.inputs, p.padded_inputs, quantised.numbers + row * p.padded_inputs);
    });
    const Int8Product product{p, residual, y, rows, quantised};
#if HAS_AMX
    if (rows > p.dot_rows && p.padded_inputs % TILE_ROW_BYTES == 0 && may_use_tiles()) return multiply_in_tiles(team, product);
#endif
    multiply_by_dots(team, product);
}

extern "C" void multiply_int8(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows,
                              int64_t threads) {
    thread_local std::vector<uint8_t> numbers;
    thread_local std::vector<float> scales;
    numbers.resize(in_whole_tiles(rows) * linear->padded_inputs);
    scales.resize(rows);
    const Quantised quantised{numbers.data(), scales.data()};  // of the calling thread, for all
    with_team(threads, [&](Team& team) {
        multiply_int8(team, *linear, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(residual),
                      static_cast<bfloat16*>(y), rows, quantised);
    });
}

#else

extern "C" void multiply_int8(const Linear*, const void*, const void*, void*, int64_t, int64_t) {}  // supports_int8 says no

#endif
