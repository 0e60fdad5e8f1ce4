// Products of small batches, and a whole decoder layer for one in a single call: with a few rows so little is computed that the
// time is that of reading the weights and of the calls themselves.
//
// Weights are int8 (int8.cpp), or bfloat16 in the layout that oneDNN has for its dot products: panels of outputs (64 for AVX-512,
// 32 for AMX); in a panel, for each pair of inputs, the pair's weights for all outputs of the panel. Outputs are padded to whole
// panels, and inputs as far as oneDNN chooses. Python shows that a weight has this layout before it passes it here.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "functions.h"
#include "linear.h"
#include "tiles.h"

#if HAS_AVX512 && defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif
extern "C" {

struct Norm {
    const void* weight;
    float offset, epsilon;
};

// A decoder layer, fused.py's _LayerStruct.
struct Layer {
    Linear qkv, o, gate_up, down;
    Norm input, post, query, key;  // query and key have no weights if heads are not normalised
    float linear, cubic, scaling, softcap;
    int64_t heads, kv_heads, head_dim, half_angles;  // half_angles: both halves of a head are rotated by the same angles
};

// A decode step at one layer, fused.py's _StepStruct; one token per request.
struct Step {
    const void *cosines, *sines;
    void *keys, *values;
    const int64_t *slots, *tables, *starts, *offsets, *lengths;
    int64_t rows, block_tokens, table_width, angles, angles_in_float32, threads;
};

}  // extern "C"

namespace {

#if HAS_BF16_DOT

constexpr int64_t MAX_ROWS = 128;  // as many as took less time than with oneDNN

// A block of outputs: where each part's weights of the first pair lie, and the distance from one pair's to the next.
struct OutputBlock {
    const uint32_t* parts[PARTS];
    int64_t step;
};

// Returns where the weights of 16 outputs from `output` on lie, in whichever panel; past the last panel, those of its end.
const uint32_t* weights_from(const Linear& p, int64_t output) {
    output = std::min(output, (p.outputs - 1) / LANES * LANES);
    return static_cast<const uint32_t*>(p.packed) + output / p.panel * p.padded_inputs / 2 * p.panel + output % p.panel;
}

OutputBlock block_of(const Linear& p, int64_t first) {
    OutputBlock block;
    block.step = p.panel;
    for (int64_t j = 0; j < PARTS; ++j) block.parts[j] = weights_from(p, first + j * LANES);
    return block;
}

template <int COUNT>
void multiply_block(const bfloat16* x, int64_t stride, const OutputBlock& block, int64_t pairs, float (*sums)[BLOCK]) {
    __m512 sum[COUNT][PARTS];
    for (auto& row : sum)
        for (auto& part : row) part = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh weight[PARTS];
        for (int j = 0; j < PARTS; ++j) weight[j] = (__m512bh)_mm512_loadu_si512(block.parts[j] + pair * block.step);
        for (int r = 0; r < COUNT; ++r) {
            int32_t both;
            std::memcpy(&both, x + r * stride + 2 * pair, sizeof both);
            for (int j = 0; j < PARTS; ++j)
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)_mm512_set1_epi32(both), weight[j]);
        }
    }
    for (int r = 0; r < COUNT; ++r)
        for (int j = 0; j < PARTS; ++j) _mm512_storeu_ps(sums[r] + j * LANES, sum[r][j]);
}

void multiply_block_dot(const bfloat16* x, int64_t stride, const OutputBlock& block, int64_t rows, int64_t pairs,
                        float (*sums)[BLOCK]) {
    switch (rows) {
        case 1: return multiply_block<1>(x, stride, block, pairs, sums);
        case 2: return multiply_block<2>(x, stride, block, pairs, sums);
        case 3: return multiply_block<3>(x, stride, block, pairs, sums);
        case 4: return multiply_block<4>(x, stride, block, pairs, sums);
        case 5: return multiply_block<5>(x, stride, block, pairs, sums);
        default: return multiply_block<ROWS>(x, stride, block, pairs, sums);
    }
}

void multiply_in_pairs(const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows,
                       int64_t threads) {
    const int64_t pairs = p.inputs / 2, blocks = (p.outputs + BLOCK - 1) / BLOCK;
    const int64_t group = rows_of_task(rows, blocks, threads), groups = (rows + group - 1) / group;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < groups; ++task)
        for (int64_t number = 0; number < blocks; ++number) {
            const OutputBlock block = block_of(p, number * BLOCK);
            const int64_t end = std::min(rows, (task + 1) * group);
            for (int64_t first = task * group; first < end; first += ROWS) {
                float sums[ROWS][BLOCK];
                const int64_t count = std::min(ROWS, end - first);
                multiply_block_dot(x + first * p.inputs, p.inputs, block, count, pairs, sums);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < BLOCK && number * BLOCK + j < p.outputs; j += LANES) {
                        const __m512 sum = _mm512_loadu_ps(sums[r] + j);
                        finish(p, sum, residual, y, (first + r) * p.outputs, number * BLOCK + j);
                    }
            }
        }
}

#if HAS_AMX

constexpr int64_t TILE_INPUTS = TILE_ROW_BYTES / sizeof(bfloat16);

// Returns x (rows, inputs) with a row of `padded` inputs, the last ones zero, and room for whole tiles: x itself or a copy.
const bfloat16* in_whole_tiles(const bfloat16* x, int64_t rows, int64_t inputs, int64_t padded) {
    if (rows % TILE_ROWS == 0 && inputs == padded) return x;
    thread_local std::vector<bfloat16> copy;
    copy.resize((rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * padded);
    for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(x + row * inputs, inputs, copy.data() + row * padded);
        std::fill_n(copy.data() + row * padded + inputs, padded - inputs, bfloat16{0});
    }
    return copy.data();
}

void multiply_in_tiles(const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows,
                       int64_t threads) {
    const int64_t inputs = (p.inputs + TILE_INPUTS - 1) / TILE_INPUTS * TILE_INPUTS;
    const auto* whole = reinterpret_cast<const char*>(in_whole_tiles(x, rows, p.inputs, inputs));
    const auto columns = [&](int64_t output) {
        const auto at = [&](int64_t first) { return reinterpret_cast<const char*>(weights_from(p, first)); };
        return TileColumns{{at(output), at(output + LANES)}, p.panel * static_cast<int64_t>(sizeof(uint32_t))};
    };
    const auto finish_sums = [&](int64_t row, int64_t output, const float* sums) {
        finish(p, _mm512_load_ps(sums), residual, y, row * p.outputs, output);
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    share_products<Bfloat16Tiles, float>(whole, inputs * sizeof *x, rows, p.outputs, columns, finish_sums);
}

#endif

// y = x W^T + bias + residual, or with relu max(0, x W^T + bias); x is (rows, inputs), y and residual (rows, outputs). residual
// may be null or y.
void multiply(const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows, int64_t threads) {
    if (p.scales) return multiply_int8(&p, x, residual, y, rows, threads);
#if HAS_AMX
    if (rows > p.dot_rows && p.padded_inputs % TILE_INPUTS == 0 && may_use_tiles())
        return multiply_in_tiles(p, x, residual, y, rows, threads);
#endif
    multiply_in_pairs(p, x, residual, y, rows, threads);
}

#endif

}  // namespace

// Returns the largest number of rows that the functions below are for; 0 if this processor has no bfloat16 dot products.
extern "C" int max_small_rows() {
#if HAS_BF16_DOT
    return MAX_ROWS;
#else
    return 0;
#endif
}

#if HAS_BF16_DOT

extern "C" void multiply_small_batch(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows,
                                     int64_t threads) {
    multiply(*linear, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(residual), static_cast<bfloat16*>(y),
             rows, threads);
}

// y = layer(x) for a decode step of a small batch; x and y are (rows, width).
extern "C" void layer_small_batch(const Layer* layer, const Step* step, const void* x, void* y) {
    const Layer& l = *layer;
    const Step& s = *step;
    const int64_t width = l.qkv.inputs, joint_width = l.qkv.outputs, inner = l.down.inputs;
    const int64_t own_width = l.heads * l.head_dim, kv_width = l.kv_heads * l.head_dim, size = sizeof(bfloat16);
    thread_local std::vector<bfloat16> memory;
    memory.resize(s.rows * (width + joint_width + own_width + 3 * inner));
    bfloat16 *normed = memory.data(), *joint = normed + s.rows * width, *attended = joint + s.rows * joint_width;
    bfloat16 *gate_up = attended + s.rows * own_width, *gated = gate_up + s.rows * 2 * inner;
    const auto* from = static_cast<const bfloat16*>(x);
    auto* to = static_cast<bfloat16*>(y);

    rms_norm(from, l.input.weight, normed, l.input.offset, l.input.epsilon, s.rows, width, s.threads);
    multiply(l.qkv, normed, nullptr, joint, s.rows, s.threads);
    rotate_heads(joint, s.cosines, s.sines, s.angles_in_float32, l.query.weight, l.key.weight, l.query.offset,
                 l.query.epsilon, s.rows, joint_width, l.heads, l.kv_heads, l.head_dim, l.half_angles ? 2 * s.angles : s.angles,
                 s.angles, s.threads);
    const char* keys = reinterpret_cast<const char*>(joint + own_width);
    store(keys, keys + kv_width * size, s.slots, static_cast<char*>(s.keys), static_cast<char*>(s.values), s.rows,
          joint_width * size, joint_width * size, kv_width * size, kv_width * size, 1);
    attention(1, joint, s.keys, s.values, s.tables, s.starts, s.offsets, s.lengths, nullptr, nullptr, 0, 0, attended,
              joint_width, s.rows, l.heads, l.kv_heads, l.head_dim, l.head_dim, s.block_tokens, s.table_width, l.scaling,
              l.softcap, 0, s.threads);
    multiply(l.o, attended, from, to, s.rows, s.threads);
    rms_norm(to, l.post.weight, normed, l.post.offset, l.post.epsilon, s.rows, width, s.threads);
    multiply(l.gate_up, normed, nullptr, gate_up, s.rows, s.threads);
    gate(gate_up, gated, l.linear, l.cubic, s.rows, inner, s.threads);
    multiply(l.down, gated, to, to, s.rows, s.threads);
}

#endif
