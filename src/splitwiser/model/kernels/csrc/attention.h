// What attention of decode (decode_attention.cpp) and of prefill (prefill_attention.cpp) share: a call's arguments, and how
// numbers are read. Sums and the softmax are in float32 for every dtype of the pool.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "pool.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define HAS_BF16_DOT 1
#include <immintrin.h>
#else
#define HAS_BF16_DOT 0
#endif

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, _Float16& out) { out = static_cast<_Float16>(x); }
inline void from_float(float x, bfloat16& out) { out = to_bfloat16(x); }

// The arguments of one call, described at attention(): T is the type of queries, S that of the pool.
template <typename T, typename S>
struct Call {
    const T* query;
    const S *keys, *values;
    const int64_t *tables, *starts, *offsets, *lengths;
    const float *sinks, *bias;
    int64_t bias_entries, bias_by_position;
    T* output;
    int64_t query_stride, requests, heads, kv_heads, key_dim, value_dim, block_tokens, table_width;
    float scaling, softcap;  // softcap 0: no soft-cap

    int64_t group() const { return heads / kv_heads; }
    // Calls f(token, slot) for `count` of a request's tokens from position `begin` on.
    template <typename F>
    void each_slot(int64_t request, int64_t begin, int64_t count, F f) const {
        const int64_t* block = tables + request * table_width + begin / block_tokens;
        int64_t within = begin % block_tokens;  // a division for each token would take as long as reading its keys
        for (int64_t token = 0; token < count; ++token) {
            f(token, *block * block_tokens + within);
            if (++within == block_tokens) ++block, within = 0;
        }
    }
    const S* key(int64_t slot, int64_t head) const { return keys + (slot * kv_heads + head) * stored_size<S>(key_dim); }
    const S* value(int64_t slot, int64_t head) const { return values + (slot * kv_heads + head) * stored_size<S>(value_dim); }
    const float* sink(int64_t head) const { return sinks ? sinks + head : nullptr; }

    // Adds a head's biases to the scores of `count` keys from position `begin` on, of which the query at position `own` sees
    // those up to its own position; the others' scores stay.
    void add_bias(int64_t head, int64_t own, int64_t begin, int64_t count, float* scores) const {
        const float *table = bias + head * bias_entries, last = table[bias_entries - 1];
        const int64_t seen = std::min(count, own + 1 - begin);
        if (bias_by_position) {
            const int64_t within = std::min(seen, bias_entries - begin);
#pragma omp simd
            for (int64_t i = 0; i < within; ++i) scores[i] += table[begin + i];
            for (int64_t i = std::max<int64_t>(0, within); i < seen; ++i) scores[i] += last;
        } else {
            const int64_t far = std::min(seen, own + 1 - begin - bias_entries);
            for (int64_t i = 0; i < far; ++i) scores[i] += last;
#pragma omp simd
            for (int64_t i = std::max<int64_t>(0, far); i < seen; ++i) scores[i] += table[own - begin - i];
        }
    }
};

// A buffer that grows as needed, aligned to 64 bytes; its old content is not kept.
template <typename T>
class Scratch {
  public:
    T* take(int64_t count) {
        if (static_cast<int64_t>(bytes_.size()) < count * static_cast<int64_t>(sizeof(T)) + 64)
            bytes_.resize(count * sizeof(T) + 64);
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 63) & ~uintptr_t{63});
    }

  private:
    std::vector<char> bytes_;
};

// Attends from the one new token of each request.
template <typename T, typename S>
void attend_decode(const Call<T, S>& call, int64_t threads);

#if HAS_BF16_DOT

// Attends from every new token of each request, in tiles if they may be used.
template <typename S>
void attend_prefill(const Call<bfloat16, S>& call, bool in_tiles, int64_t threads);

constexpr float LOG2_E = 1.44269504f;

inline __mmask32 first_pairs(int64_t numbers) { return numbers >= 32 ? ~__mmask32{0} : (__mmask32{1} << numbers) - 1; }
inline __mmask16 first_lanes(int64_t numbers) { return numbers >= 16 ? ~__mmask16{0} : (__mmask16{1} << numbers) - 1; }

// Loads 32 numbers, of which the last ones may be missing, as float32: of bfloat16 those at even places and those at odd ones,
// which a shift or a mask makes float32; of int8 the first 16 and the others.
inline void load_halves(const bfloat16* from, __mmask32 part, __m512& a, __m512& b) {
    const __m512i both = _mm512_maskz_loadu_epi16(part, from);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
}
inline void load_halves(const int8_t* from, __mmask32 part, __m512& a, __m512& b) {
    const __m256i both = _mm256_maskz_loadu_epi8(part, from);
    a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(both)));
    b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(both, 1)));
}

#endif
