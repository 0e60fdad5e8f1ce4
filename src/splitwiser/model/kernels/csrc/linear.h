// A linear layer as Python passes it, and what products with weights of either kind share.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bfloat16.h"

extern "C" {

// packed_linear.py's LinearStruct; bias may be null. With scales and offsets the weights are int8, in int8.cpp's layout;
// without (null) they are bfloat16, in layer.cpp's layout or, if compressed, in compressed.h's. panel: outputs per panel, a
// multiple of 16; padded_inputs: inputs with their padding, whole pairs of bfloat16 or whole quads of int8; dot_rows: products
// of more rows than that are computed in tiles of AMX, if there are any.
struct Linear {
    const void *packed, *bias;
    const float* scales;
    const int32_t* offsets;
    int64_t inputs, outputs, relu, panel, padded_inputs, dot_rows, compressed;
};

}  // extern "C"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_AVX512 1
#include <immintrin.h>

namespace {

// A block is as many rows of inputs as have sums that fit the registers, by 64 outputs.
constexpr int64_t LANES = 16, PARTS = 4, BLOCK = PARTS * LANES, ROWS = 6;

// Rows of a thread's task, whole blocks: all of them, so that weights are read once, unless that gives too few tasks, or with
// many rows, which take longer than reading the weights, so few that threads have unequal numbers of them.
inline int64_t rows_of_task(int64_t rows, int64_t output_blocks, int64_t threads) {
    constexpr int64_t MANY_BLOCKS = 8, MANY_TASKS = 16;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    int64_t size = std::max<int64_t>(1, std::min(blocks, blocks * output_blocks / (4 * threads)));
    const int64_t tasks = (blocks + size - 1) / size * output_blocks;
    if (blocks >= MANY_BLOCKS && tasks % threads && tasks < MANY_TASKS * threads) size = (size + 1) / 2;
    return ROWS * size;
}

inline __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
}

inline __m512 load(const bfloat16* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

inline void save(bfloat16* to, __mmask16 mask, __m512 x) {  // rounded to nearest, ties to even
#if defined(__AVX512BF16__)
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

// Stores the sums of 16 outputs from `output` on, of the row whose outputs begin at `row`, with bias, residual and relu.
inline void finish(const Linear& p, __m512 sum, const bfloat16* residual, bfloat16* y, int64_t row, int64_t output) {
    const __mmask16 mask = first_lanes(p.outputs - output);
    if (p.bias) sum = _mm512_add_ps(sum, load(static_cast<const bfloat16*>(p.bias) + output, mask));
    if (residual) sum = _mm512_add_ps(sum, load(residual + row + output, mask));
    if (p.relu) sum = _mm512_max_ps(sum, _mm512_setzero_ps());
    save(y + row + output, mask, sum);
}

}  // namespace

#else
#define HAS_AVX512 0
#endif
