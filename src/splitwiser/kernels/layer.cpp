// A whole decoder layer for a few rows, in one call: where so little is computed, what the calls themselves cost counts, and
// nothing else does but the reading of the weights.
//
// Weights are read as oneDNN lays them out for products of bfloat16 pairs: panels of so many outputs (64 for AVX-512, 32 for
// AMX); in a panel, for each pair of inputs, the pair's weights for all its outputs; outputs are filled up to whole panels, and
// inputs as far as oneDNN likes. Python shows that a weight lies so before it comes here.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "functions.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PRODUCTS_OF_PAIRS 1
#include <immintrin.h>
#else
#define PRODUCTS_OF_PAIRS 0
#endif

extern "C" {

// A linear layer, as packed.py's Product; bias may be null. panel: the outputs of one, a multiple of 16; filled: the inputs with
// what they are filled up with, an even number.
struct Product {
    const void *packed, *bias;
    int64_t inputs, outputs, relu, panel, filled;
};

struct Norm {
    const void* weight;
    float offset, epsilon;
};

// What a layer is, as fused.py's _Layer.
struct Layer {
    Product qkv, o, gate_up, down;
    Norm input, post, query, key;  // query and key without weights where heads are not normalised
    float linear, cubic, scaling, softcap;
    int64_t heads, kv_heads, head_dim, halved;  // halved: a cosine turns two numbers of a head
};

// What a step is to a layer, as fused.py's _Step; one token a request.
struct Step {
    const void *cosines, *sines;
    void *keys, *values;
    const int64_t *slots, *tables, *starts, *offsets, *lengths;
    int64_t rows, block_tokens, table_width, angles, angles_in_float32, threads;
};

}  // extern "C"

namespace {

#if PRODUCTS_OF_PAIRS

constexpr int64_t FEW = 6, LANES = 16, PARTS = 4, BLOCK = PARTS * LANES;

// A block of outputs: each part's weights of the first pair, and how far it is from one pair's to the next.
struct Block {
    const uint32_t* parts[PARTS];
    int64_t step;
};

// The block of outputs from first on, from whatever panels it lies in. What would lie behind the last panel is read from its end.
Block block_of(const Product& p, int64_t first) {
    Block block;
    block.step = p.panel;
    for (int64_t j = 0; j < PARTS; ++j) {
        const int64_t output = std::min(first + j * LANES, (p.outputs - 1) / LANES * LANES);
        block.parts[j] = static_cast<const uint32_t*>(p.packed) + output / p.panel * p.filled / 2 * p.panel + output % p.panel;
    }
    return block;
}

template <int ROWS>
void multiply_block(const bfloat16* x, int64_t stride, const Block& block, int64_t pairs, float (*sums)[BLOCK]) {
    __m512 sum[ROWS][PARTS];
    for (auto& row : sum)
        for (auto& part : row) part = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh weight[PARTS];
        for (int j = 0; j < PARTS; ++j) weight[j] = (__m512bh)_mm512_loadu_si512(block.parts[j] + pair * block.step);
        for (int r = 0; r < ROWS; ++r) {
            int32_t both;
            std::memcpy(&both, x + r * stride + 2 * pair, sizeof both);
            for (int j = 0; j < PARTS; ++j)
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)_mm512_set1_epi32(both), weight[j]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < PARTS; ++j) _mm512_storeu_ps(sums[r] + j * LANES, sum[r][j]);
}

// y = x W^T + bias + residual, or max(0, x W^T + bias); x is (rows, inputs), y and residual (rows, outputs). residual may be
// null, or y.
void multiply(const Product& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows, int64_t threads) {
    const int64_t pairs = p.inputs / 2;
    const auto* bias = static_cast<const bfloat16*>(p.bias);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < p.outputs; first += BLOCK) {
        float sums[FEW][BLOCK];
        const Block block = block_of(p, first);
        switch (rows) {
            case 1: multiply_block<1>(x, p.inputs, block, pairs, sums); break;
            case 2: multiply_block<2>(x, p.inputs, block, pairs, sums); break;
            case 3: multiply_block<3>(x, p.inputs, block, pairs, sums); break;
            case 4: multiply_block<4>(x, p.inputs, block, pairs, sums); break;
            case 5: multiply_block<5>(x, p.inputs, block, pairs, sums); break;
            default: multiply_block<6>(x, p.inputs, block, pairs, sums);
        }
        const int64_t count = std::min(BLOCK, p.outputs - first);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = r * p.outputs + first + i;
                float sum = sums[r][i];
                if (bias) sum += to_float(bias[first + i]);
                if (residual) sum += to_float(residual[at]);
                if (p.relu) sum = std::max(sum, 0.0f);
                y[at] = to_bfloat16(sum);
            }
    }
}

#endif

}  // namespace

// The most rows that the functions below take; 0 where this processor has no products of bfloat16 pairs.
extern "C" int most_few() {
#if PRODUCTS_OF_PAIRS
    return FEW;
#else
    return 0;
#endif
}

#if PRODUCTS_OF_PAIRS

extern "C" void multiply_few(const Product* product, const void* x, const void* residual, void* y, int64_t rows,
                             int64_t threads) {
    multiply(*product, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(residual), static_cast<bfloat16*>(y),
             rows, threads);
}

// x and y are (rows, width).
extern "C" void layer_of_few(const Layer* layer, const Step* step, const void* x, void* y) {
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

    rms_norm(from, l.input.weight, normed, l.input.offset, l.input.epsilon, s.rows, width, 1);
    multiply(l.qkv, normed, nullptr, joint, s.rows, s.threads);
    rotate_heads(joint, s.cosines, s.sines, s.angles_in_float32, l.query.weight, l.key.weight, l.query.offset,
                 l.query.epsilon, s.rows, joint_width, l.heads, l.kv_heads, l.head_dim, l.halved ? 2 * s.angles : s.angles,
                 s.angles, 1);
    const char* keys = reinterpret_cast<const char*>(joint + own_width);
    store(keys, keys + kv_width * size, s.slots, static_cast<char*>(s.keys), static_cast<char*>(s.values), s.rows,
          joint_width * size, joint_width * size, kv_width * size, kv_width * size, 1);
    attention(1, joint, s.keys, s.values, s.tables, s.starts, s.offsets, s.lengths, nullptr, attended, joint_width, s.rows,
              l.heads, l.kv_heads, l.head_dim, l.head_dim, s.block_tokens, s.table_width, l.scaling, l.softcap, s.threads);
    multiply(l.o, attended, from, to, s.rows, s.threads);
    rms_norm(to, l.post.weight, normed, l.post.offset, l.post.epsilon, s.rows, width, 1);
    multiply(l.gate_up, normed, nullptr, gate_up, s.rows, s.threads);
    gate(gate_up, gated, l.linear, l.cubic, s.rows, inner, 1);
    multiply(l.down, gated, to, to, s.rows, s.threads);
}

#endif
