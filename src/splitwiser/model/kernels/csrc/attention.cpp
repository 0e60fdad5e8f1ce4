// Attention over the paged KV pool on a CPU, and the writing of keys and values into the pool.
//
// A request's new tokens are its last ones; each sees its request's tokens from a first position up to its own. Requests with
// one new token (decode) are bound by reading keys and values: work is divided into (request, range of kv heads), and each
// piece reads its tokens' keys once and their values once. Requests with several new tokens (prefill) are bound by arithmetic:
// work is divided into (request, kv head, range of new tokens); each piece packs its keys and values for bfloat16 dot products
// and processes them in tiles with an online softmax (Dao, FlashAttention-2, arXiv 2307.08691).
//
// Pieces are divided among the OpenMP threads of PyTorch's own OpenMP library, so torch.set_num_threads applies here too. Sums
// and the softmax are in float32 for every dtype of the pool.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "functions.h"
#include "parts.h"
#include "tiles.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAS_BF16_DOT 1
#include <immintrin.h>
#else
#define HAS_BF16_DOT 0
#endif

namespace {

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, _Float16& out) { out = static_cast<_Float16>(x); }
inline void from_float(float x, bfloat16& out) { out = to_bfloat16(x); }

// The arguments of one call, described at attention() below.
template <typename T>
struct Call {
    const T *query, *keys, *values;
    const int64_t *tables, *starts, *offsets, *lengths;
    const float *sinks, *bias;
    int64_t bias_entries, bias_by_position;
    T* output;
    int64_t query_stride, requests, heads, kv_heads, key_dim, value_dim, block_tokens, table_width;
    float scaling, softcap;  // softcap 0: no soft-cap

    int64_t group() const { return heads / kv_heads; }
    const T* key(int64_t slot, int64_t head) const { return keys + (slot * kv_heads + head) * key_dim; }
    const T* value(int64_t slot, int64_t head) const { return values + (slot * kv_heads + head) * value_dim; }
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

// ---- decode, one new token: kv heads [first, last) of a request, over its tokens in `count` slots

template <typename T>
void find_slots(const Call<T>& c, int64_t request, int64_t begin, int64_t count, int64_t* slots) {
    const int64_t* block = c.tables + request * c.table_width + begin / c.block_tokens;
    int64_t within = begin % c.block_tokens;  // a division for each token would take as long as reading its keys
    for (int64_t token = 0; token < count; ++token) {
        slots[token] = *block * c.block_tokens + within;
        if (++within == c.block_tokens) ++block, within = 0;
    }
}

template <typename T>
void score_tokens(const Call<T>& c, int64_t request, int64_t first, int64_t last, const int64_t* slots, int64_t count,
                  float* scores) {
    thread_local Scratch<float> queries_memory;
    const int64_t rows = (last - first) * c.group();
    float* queries = queries_memory.take(rows * c.key_dim);
    const T* own = c.query + c.offsets[request] * c.query_stride + first * c.group() * c.key_dim;
    for (int64_t i = 0; i < rows * c.key_dim; ++i) queries[i] = to_float(own[i]);
    for (int64_t token = 0; token < count; ++token) {
        const T* key = c.key(slots[token], first);
        for (int64_t row = 0; row < rows; ++row) {
            const T* k = key + row / c.group() * c.key_dim;
            const float* q = queries + row * c.key_dim;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < c.key_dim; ++i) sum += q[i] * to_float(k[i]);
            scores[row * count + token] = sum;
        }
    }
}

template <typename T>
void sum_values(const Call<T>& c, int64_t first, int64_t last, const int64_t* slots, int64_t count, const float* weights,
                float* sums) {
    const int64_t rows = (last - first) * c.group();
    for (int64_t token = 0; token < count; ++token) {
        const T* value = c.value(slots[token], first);
        for (int64_t row = 0; row < rows; ++row) {
            const T* v = value + row / c.group() * c.value_dim;
            float* sum = sums + row * c.value_dim;
            const float weight = weights[row * count + token];
#pragma omp simd
            for (int64_t i = 0; i < c.value_dim; ++i) sum[i] += weight * to_float(v[i]);
        }
    }
}

#if HAS_BF16_DOT

constexpr int64_t LANES = 16;
constexpr float LOG2_E = 1.44269504f;

inline __mmask32 first_pairs(int64_t numbers) { return numbers >= 32 ? ~__mmask32{0} : (__mmask32{1} << numbers) - 1; }
inline __mmask16 first_lanes(int64_t numbers) { return numbers >= 16 ? ~__mmask16{0} : (__mmask16{1} << numbers) - 1; }

// Returns which of 16 lanes from `at` on are among the first `numbers`.
inline __mmask16 lanes_from(int64_t at, int64_t numbers) { return first_lanes(std::max<int64_t>(0, numbers - at)); }

// Returns the sum of the lanes of each of 16 vectors, in their order.
inline __m512 reduce_lanes(const __m512 (&a)[LANES]) {
    __m512 fours[4];
    for (int i = 0; i < 4; ++i) {
        const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
        const __m512 high =
            _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
        const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
    }
    const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

// Returns 2^x to float32's precision: a Taylor series of the fraction in [-1/2, 1/2], scaled by the exponent.
inline __m512 power_of_2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.52527338e-5f);
    for (const float coefficient :
         {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(p, whole);
}

// Replaces every score by e^((score - highest) * scaling); returns their total.
inline float exponentiate(float* scores, int64_t count, float highest, float scaling) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = 0; at < count; at += LANES) {
        const __mmask16 part = first_lanes(count - at);
        const __m512 score = _mm512_sub_ps(_mm512_maskz_loadu_ps(part, scores + at), _mm512_set1_ps(highest));
        const __m512 power = power_of_2(_mm512_mul_ps(score, _mm512_set1_ps(scaling * LOG2_E)));
        total = _mm512_mask_add_ps(total, part, total, power);
        _mm512_mask_storeu_ps(scores + at, part, power);
    }
    return _mm512_reduce_add_ps(total);
}

// Writes where the keys or values of 16 tokens from `token` on lie, given where those of slot 0 do; past the last token, its
// own are repeated.
inline void find_rows(const bfloat16* zero, int64_t stride, const int64_t* slots, int64_t token, int64_t count,
                      const bfloat16** rows) {
    for (int64_t i = 0; i < LANES; ++i) rows[i] = zero + slots[std::min(token + i, count - 1)] * stride;
}

// Prefetches what is to be read next: it may lie in another block, which the processor's own prefetcher cannot foresee.
inline void prefetch(const bfloat16* const* rows, int64_t offset, int64_t numbers) {
    for (int64_t i = 0; i < LANES; ++i)
        for (int64_t at = 0; at < numbers; at += 32)
            _mm_prefetch(reinterpret_cast<const char*>(rows[i] + offset + at), _MM_HINT_T0);
}

// As above, for 16 tokens at a time; the next 16 are prefetched meanwhile.
template <>
void score_tokens(const Call<bfloat16>& c, int64_t request, int64_t first, int64_t last, const int64_t* slots, int64_t count,
                  float* scores) {
    const bfloat16* own = c.query + c.offsets[request] * c.query_stride + first * c.group() * c.key_dim;
    const int64_t stride = c.kv_heads * c.key_dim;
    for (int64_t token = 0; token < count; token += LANES) {
        const bfloat16 *keys[LANES], *next[LANES];
        find_rows(c.key(0, first), stride, slots, token, count, keys);
        find_rows(c.key(0, first), stride, slots, token + LANES, count, next);
        const __mmask16 mask = first_lanes(count - token);
        for (int64_t head = 0; head < last - first; ++head) {
            const int64_t offset = head * c.key_dim;
            prefetch(next, offset, c.key_dim);
            for (int64_t row = head * c.group(); row < (head + 1) * c.group(); ++row) {
                __m512 sums[LANES];
                for (auto& sum : sums) sum = _mm512_setzero_ps();
                for (int64_t at = 0; at < c.key_dim; at += 32) {
                    const __mmask32 part = first_pairs(c.key_dim - at);
                    const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(part, own + row * c.key_dim + at);
                    for (int64_t i = 0; i < LANES; ++i)
                        sums[i] = _mm512_dpbf16_ps(sums[i], q, (__m512bh)_mm512_maskz_loadu_epi16(part, keys[i] + offset + at));
                }
                _mm512_mask_storeu_ps(scores + row * count + token, mask, reduce_lanes(sums));
            }
        }
    }
}

// Adds the weighted values of up to 16 tokens to the sums of ROWS rows of one head, for 64 numbers of the head, of which the
// last ones may be missing. Numbers at even and at odd places are added up apart, since each are a shift or a mask away from
// being float32.
template <int ROWS>
inline void sum_part(const bfloat16* const* values, int64_t tokens, int64_t offset, int64_t numbers, int64_t value_dim,
                     const float* weights, int64_t count, float* sums) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    const __m512i lows = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i highs = _mm512_add_epi32(lows, _mm512_set1_epi32(8));
    __m512 even[ROWS][2], odd[ROWS][2];
    for (int j = 0; j < 2; ++j)
        for (int r = 0; r < ROWS; ++r) {
            const float* sum = sums + r * value_dim + j * 2 * LANES;
            const __m512 low = _mm512_maskz_loadu_ps(lanes_from(j * 2 * LANES, numbers), sum);
            const __m512 high = _mm512_maskz_loadu_ps(lanes_from((2 * j + 1) * LANES, numbers), sum + LANES);
            even[r][j] = _mm512_permutex2var_ps(low, evens, high);
            odd[r][j] = _mm512_permutex2var_ps(low, odds, high);
        }
    for (int64_t i = 0; i < tokens; ++i)
        for (int j = 0; j < 2; ++j) {
            const __mmask32 part = first_pairs(std::max<int64_t>(0, numbers - j * 32));
            const __m512i both = _mm512_maskz_loadu_epi16(part, values[i] + offset + j * 32);
            const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
            for (int r = 0; r < ROWS; ++r) {
                const __m512 weight = _mm512_set1_ps(weights[r * count + i]);
                even[r][j] = _mm512_fmadd_ps(weight, low, even[r][j]);
                odd[r][j] = _mm512_fmadd_ps(weight, high, odd[r][j]);
            }
        }
    for (int j = 0; j < 2; ++j)
        for (int r = 0; r < ROWS; ++r) {
            float* sum = sums + r * value_dim + j * 2 * LANES;
            const __m512 low = _mm512_permutex2var_ps(even[r][j], lows, odd[r][j]);
            const __m512 high = _mm512_permutex2var_ps(even[r][j], highs, odd[r][j]);
            _mm512_mask_storeu_ps(sum, lanes_from(j * 2 * LANES, numbers), low);
            _mm512_mask_storeu_ps(sum + LANES, lanes_from((2 * j + 1) * LANES, numbers), high);
        }
}

template <>
void sum_values(const Call<bfloat16>& c, int64_t first, int64_t last, const int64_t* slots, int64_t count,
                const float* weights, float* sums) {
    const int64_t stride = c.kv_heads * c.value_dim;
    for (int64_t token = 0; token < count; token += LANES) {
        const bfloat16 *values[LANES], *next[LANES];
        find_rows(c.value(0, first), stride, slots, token, count, values);
        find_rows(c.value(0, first), stride, slots, token + LANES, count, next);
        const int64_t tokens = std::min(LANES, count - token);
        for (int64_t head = 0; head < last - first; ++head) {
            prefetch(next, head * c.value_dim, c.value_dim);
            const int64_t end = (head + 1) * c.group();
            for (int64_t row = head * c.group(); row < end; row += 4)
                for (int64_t at = 0; at < c.value_dim; at += 64) {
                    const auto add = [&](auto rows) {
                        sum_part<rows()>(values, tokens, head * c.value_dim + at, c.value_dim - at, c.value_dim,
                                         weights + row * count + token, count, sums + row * c.value_dim + at);
                    };
                    switch (std::min<int64_t>(4, end - row)) {
                        case 1: add(std::integral_constant<int, 1>{}); break;
                        case 2: add(std::integral_constant<int, 2>{}); break;
                        case 3: add(std::integral_constant<int, 3>{}); break;
                        default: add(std::integral_constant<int, 4>{});
                    }
                }
        }
    }
}

#else

inline float exponentiate(float* scores, int64_t count, float highest, float scaling) {
    float total = 0.0f;
    for (int64_t i = 0; i < count; ++i) total += scores[i] = std::exp((scores[i] - highest) * scaling);
    return total;
}

#endif

// Turns a head's scores into weights; returns the total that these are still to be divided by.
template <typename T>
float weigh(const Call<T>& c, int64_t request, int64_t head, int64_t begin, int64_t count, float* score) {
    const float* sink = c.sink(head);
    float scaling = c.scaling;
    if (!std::is_same_v<T, bfloat16> || c.softcap != 0.0f || c.bias || sink || scaling <= 0.0f) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) score[i] *= scaling;
        scaling = 1.0f;
    }
    if (c.softcap != 0.0f)
        for (int64_t i = 0; i < count; ++i) score[i] = c.softcap * std::tanh(score[i] / c.softcap);
    if (c.bias) c.add_bias(head, c.lengths[request] - 1, begin, count, score);
    float highest = sink ? *sink : score[0];
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; ++i) highest = std::max(highest, score[i]);
    const float total = exponentiate(score, count, highest, scaling) + (sink ? std::exp(*sink - highest) : 0.0f);
    if (std::is_same_v<T, bfloat16>) return total;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) score[i] /= total;
    return 1.0f;
}

template <typename T>
void attend_decode_piece(const Call<T>& c, int64_t request, int64_t first, int64_t last) {
    thread_local Scratch<float> scores_memory, sums_memory, totals_memory;
    thread_local Scratch<int64_t> slots_memory;
    const int64_t begin = c.starts[c.offsets[request]], count = c.lengths[request] - begin;
    const int64_t rows = (last - first) * c.group();
    float* scores = scores_memory.take(rows * count);
    float* sums = sums_memory.take(rows * c.value_dim);
    float* totals = totals_memory.take(rows);
    int64_t* slots = slots_memory.take(count);
    find_slots(c, request, begin, count, slots);
    score_tokens(c, request, first, last, slots, count, scores);
    for (int64_t row = 0; row < rows; ++row)
        totals[row] = weigh(c, request, first * c.group() + row, begin, count, scores + row * count);
    std::fill(sums, sums + rows * c.value_dim, 0.0f);
    sum_values(c, first, last, slots, count, scores, sums);
    T* out = c.output + (c.offsets[request] * c.heads + first * c.group()) * c.value_dim;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < c.value_dim; ++i)
            from_float(sums[row * c.value_dim + i] / totals[row], out[row * c.value_dim + i]);
}

// ---- prefill: new tokens [from, to) of a request, one kv head

#if HAS_BF16_DOT

constexpr int64_t PANEL = 64;  // keys that are packed side by side, and computed with by halves at least
constexpr float MASKED_SCORE = -1e30f;  // finite, so that the difference of two is a number

// Transposes a matrix of 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&a)[LANES]) {
    __m512i b[LANES];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // a[4 * k + i]: column 4 * lane + i of rows 4 * k and the three after
        const __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88),
                      high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        b[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        b[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        b[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    std::copy(b, b + LANES, a);
}

// Packs a head's keys in `count` slots into panels of 64: pair j of all 64 keys, then pair j + 1, up to `padded` pairs.
// Zeros pad pairs and the last panel.
void pack_keys(const Call<bfloat16>& c, int64_t head, const int64_t* slots, int64_t count, int64_t padded, uint32_t* packed) {
    const int64_t pairs = c.key_dim / 2;
    for (int64_t token = 0; token < count || token % PANEL; token += LANES) {
        uint32_t* panel = packed + token / PANEL * PANEL * padded + token % PANEL;
        for (int64_t at = 0; at < padded; at += LANES) {
            __m512i rows[LANES];
            for (int64_t i = 0; i < LANES; ++i)
                rows[i] = token + i < count
                              ? _mm512_maskz_loadu_epi32(first_lanes(pairs - at), c.key(slots[token + i], head) + 2 * at)
                              : _mm512_setzero_si512();
            transpose(rows);
            for (int64_t j = 0; j < std::min(LANES, padded - at); ++j) _mm512_store_si512(panel + (at + j) * PANEL, rows[j]);
        }
    }
}

// Packs the values of the same tokens, interleaving those of each two tokens. Zeros pad to a whole panel.
void pack_values(const Call<bfloat16>& c, int64_t head, const int64_t* slots, int64_t count, uint32_t* packed) {
    for (int64_t token = 0; token < count || token % PANEL; token += 2) {
        const bfloat16* even = token < count ? c.value(slots[token], head) : nullptr;
        const bfloat16* odd = token + 1 < count ? c.value(slots[token + 1], head) : nullptr;
        for (int64_t at = 0; at < c.value_dim; at += LANES) {
            const __mmask16 all = ~__mmask16{0};
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even ? all : 0, even + at));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd ? all : 0, odd + at));
            _mm512_store_si512(packed + token / 2 * c.value_dim + at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// Copies the queries of rows [row, row + count) of a piece, ordered by token and then by head of the group, to a distance of
// `padded` pairs, with zeros after each.
void pack_queries(const Call<bfloat16>& c, int64_t request, int64_t head, int64_t row, int64_t count, int64_t padded,
                  bfloat16* packed) {
    for (int64_t r = 0; r < count; ++r, packed += 2 * padded) {
        const int64_t token = c.offsets[request] + (row + r) / c.group(), own = head * c.group() + (row + r) % c.group();
        std::memcpy(packed, c.query + token * c.query_stride + own * c.key_dim, c.key_dim * sizeof *packed);
        std::memset(packed + c.key_dim, 0, (2 * padded - c.key_dim) * sizeof *packed);
    }
}

// Products by bfloat16 pairs, for QUERIES queries at a time, and KEYS keys per step of their online softmax, which GROUPS of
// such queries read from the nearest cache one after another. Rows past the last query may hold anything.
struct PairProducts {
    static constexpr int64_t QUERIES = 6;  // with 64 keys or values, their sums fill 24 of 32 registers
    static constexpr int64_t GROUPS = 8, KEYS = 128, KEYS_AT_A_TIME = PANEL / 2, PAIRS_AT_A_TIME = 1;

    static __m512bh pair_of(const bfloat16* from) {
        int32_t pair;
        std::memcpy(&pair, from, sizeof pair);
        return (__m512bh)_mm512_set1_epi32(pair);
    }

    // Computes the scores of the queries for `count` keys; those of consecutive queries are KEYS apart.
    static void score(const bfloat16* queries, const uint32_t* keys, int64_t count, int64_t pairs, float* scores) {
        for (int64_t at = 0; at < count; at += PANEL)
            if (at + PANEL <= count)
                score_panel<4>(queries, keys + at * pairs, pairs, scores + at);
            else
                score_panel<2>(queries, keys + at * pairs, pairs, scores + at);
    }

    // Adds the weighted values of `count` tokens to the sums of the queries; the weights of consecutive ones are KEYS apart.
    static void add_values(const bfloat16* weights, const uint32_t* values, int64_t count, int64_t value_dim, float* sums) {
        for (int64_t at = 0; at < value_dim; at += 4 * LANES)
            switch (std::min<int64_t>(4, (value_dim - at) / LANES)) {
                case 1: add_part<1>(weights, values + at, count, value_dim, sums + at); break;
                case 2: add_part<2>(weights, values + at, count, value_dim, sums + at); break;
                case 3: add_part<3>(weights, values + at, count, value_dim, sums + at); break;
                default: add_part<4>(weights, values + at, count, value_dim, sums + at);
            }
    }

  private:
    template <int PARTS>
    static void score_panel(const bfloat16* queries, const uint32_t* panel, int64_t pairs, float* scores) {
        __m512 sum[QUERIES][PARTS];
        for (auto& row : sum)
            for (auto& part : row) part = _mm512_setzero_ps();
        for (int64_t pair = 0; pair < pairs; ++pair) {
            __m512bh key[PARTS];
            for (int j = 0; j < PARTS; ++j) key[j] = (__m512bh)_mm512_load_si512(panel + pair * PANEL + j * LANES);
            for (int64_t r = 0; r < QUERIES; ++r) {
                const __m512bh query = pair_of(queries + 2 * (r * pairs + pair));
                for (int j = 0; j < PARTS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], query, key[j]);
            }
        }
        for (int64_t r = 0; r < QUERIES; ++r)
            for (int j = 0; j < PARTS; ++j) _mm512_store_ps(scores + r * KEYS + j * LANES, sum[r][j]);
    }

    template <int PARTS>
    static void add_part(const bfloat16* weights, const uint32_t* values, int64_t count, int64_t value_dim, float* sums) {
        __m512 sum[QUERIES][PARTS];
        for (int64_t r = 0; r < QUERIES; ++r)
            for (int j = 0; j < PARTS; ++j) sum[r][j] = _mm512_load_ps(sums + r * value_dim + j * LANES);
        for (int64_t pair = 0; pair < count / 2; ++pair) {
            __m512bh value[PARTS];
            for (int j = 0; j < PARTS; ++j) value[j] = (__m512bh)_mm512_load_si512(values + pair * value_dim + j * LANES);
            for (int64_t r = 0; r < QUERIES; ++r) {
                const __m512bh weight = pair_of(weights + r * KEYS + 2 * pair);
                for (int j = 0; j < PARTS; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], weight, value[j]);
            }
        }
        for (int64_t r = 0; r < QUERIES; ++r)
            for (int j = 0; j < PARTS; ++j) _mm512_store_ps(sums + r * value_dim + j * LANES, sum[r][j]);
    }
};

#if HAS_AMX

// The same by tiles, which must be configured.
struct TileProducts {
    static constexpr int64_t QUERIES = 2 * TILE_ROWS, GROUPS = 1, KEYS = 128, KEYS_AT_A_TIME = 2 * LANES;
    static constexpr int64_t PAIRS_AT_A_TIME = LANES;

    static void score(const bfloat16* queries, const uint32_t* keys, int64_t count, int64_t pairs, float* scores) {
        for (int64_t at = 0; at < count; at += KEYS_AT_A_TIME) {
            const uint32_t* first = keys + at / PANEL * PANEL * pairs + at % PANEL;
            multiply_tiles<Bfloat16Tiles, 2, 2>(queries, pairs * sizeof *keys, columns(first, PANEL), pairs / LANES,
                                                scores + at, KEYS * sizeof *scores, false, false);
        }
    }

    static void add_values(const bfloat16* weights, const uint32_t* values, int64_t count, int64_t value_dim, float* sums) {
        const int64_t steps = count / (2 * LANES), weights_stride = KEYS * sizeof *weights, stride = value_dim * sizeof *sums;
        int64_t at = 0;
        for (; at + LANES < value_dim; at += 2 * LANES)
            multiply_tiles<Bfloat16Tiles, 2, 2>(weights, weights_stride, columns(values + at, value_dim), steps, sums + at,
                                                stride, true, false);
        if (at < value_dim)
            multiply_tiles<Bfloat16Tiles, 2, 1>(weights, weights_stride, columns(values + at, value_dim), steps, sums + at,
                                                stride, true, false);
    }

  private:
    static TileColumns columns(const uint32_t* first, int64_t stride) {
        const auto* start = reinterpret_cast<const char*>(first);
        return {{start, start + TILE_ROW_BYTES}, static_cast<int64_t>(stride * sizeof *first)};
    }
};

#endif

// Returns 2^x to 18 bits, more than a bfloat16 weight keeps: a polynomial of the fraction in [0, 1), scaled by the exponent.
inline __m512 rough_power_of_2(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(1.35341678e-2f);
    for (const float coefficient : {5.20114601e-2f, 2.41442755e-1f, 6.93003833e-1f, 1.00000262f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(p, x);
}

// The online softmax of a query: which of its head's keys it sees, the number (times log2 e) that is subtracted from scores,
// and the sum of the weights so far, by lanes.
struct Softmax {
    int64_t head, low, high;  // keys [low, high), counted from the piece's first
    float subtracted;
    __m512 totals;
};

// One step of it: turns the scores of some keys (a multiple of 32), whose first is the piece's number `step` and at position
// `position`, into weights. Returns the factor by which the query's sums so far must be multiplied.
inline float update_softmax(const Call<bfloat16>& c, Softmax& s, int64_t step, int64_t position, float* scores, int64_t keys,
                            bfloat16* weights) {
    // what is subtracted stays while weights are below 2^SLACK, which bfloat16 and float32 hold as exactly as smaller ones
    constexpr float SLACK = 8.0f;
    const int64_t low = s.low - step, high = s.high - step;
    float factor = c.scaling * LOG2_E;
    if (c.softcap != 0.0f || c.bias) {
        for (int64_t i = 0; i < keys; ++i) {
            scores[i] *= c.scaling;
            if (c.softcap != 0.0f) scores[i] = c.softcap * std::tanh(scores[i] / c.softcap);
        }
        if (c.bias) c.add_bias(s.head, position + high - 1, position, keys, scores);
        factor = LOG2_E;
    }
    __m512 maxima = _mm512_set1_ps(MASKED_SCORE);
    for (int64_t at = 0; at < keys; at += LANES) {
        __m512 score = _mm512_load_ps(scores + at);
        if (at < low || at + LANES > high) {
            const __mmask16 seen = first_lanes(std::max<int64_t>(0, high - at)) & ~first_lanes(std::max<int64_t>(0, low - at));
            score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(MASKED_SCORE), score);
            _mm512_store_ps(scores + at, score);
        }
        maxima = _mm512_max_ps(maxima, score);
    }
    float rescale = 1.0f;
    maxima = _mm512_mul_ps(maxima, _mm512_set1_ps(factor));
    if (_mm512_cmp_ps_mask(maxima, _mm512_set1_ps(s.subtracted + SLACK), _CMP_GT_OQ)) {
        const float highest = _mm512_reduce_max_ps(maxima);
        rescale = std::exp2(s.subtracted - highest);
        s.subtracted = highest;
        s.totals = _mm512_mul_ps(s.totals, _mm512_set1_ps(rescale));
    }
    const __m512 factors = _mm512_set1_ps(factor), subtracted = _mm512_set1_ps(s.subtracted);
    for (int64_t at = 0; at < keys; at += 2 * LANES) {
        const __m512 a = rough_power_of_2(_mm512_fmsub_ps(_mm512_load_ps(scores + at), factors, subtracted));
        const __m512 b = rough_power_of_2(_mm512_fmsub_ps(_mm512_load_ps(scores + at + LANES), factors, subtracted));
        s.totals = _mm512_add_ps(s.totals, _mm512_add_ps(a, b));
        _mm512_store_si512(weights + at, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return rescale;
}

// What a thread needs to attend from some queries at a time.
template <typename Products>
struct Workspace {
    float *scores, *sums;
    bfloat16 *queries, *weights;

    Workspace(int64_t padded_pairs, int64_t value_dim) {
        thread_local Scratch<float> scores_memory, sums_memory;
        thread_local Scratch<bfloat16> queries_memory, weights_memory;
        scores = scores_memory.take(Products::QUERIES * Products::KEYS);
        sums = sums_memory.take(Products::GROUPS * Products::QUERIES * value_dim);
        queries = queries_memory.take(Products::GROUPS * Products::QUERIES * 2 * padded_pairs);
        weights = weights_memory.take(Products::QUERIES * Products::KEYS);
    }
};

// Attends from `count` rows of a piece, from `row` on, over its packed keys and values, whose first is at position `begin`.
template <typename Products>
void attend_rows(const Call<bfloat16>& c, int64_t request, int64_t head, int64_t row, int64_t count, int64_t begin,
                 int64_t padded_pairs, const uint32_t* keys, const uint32_t* values, const Workspace<Products>& w) {
    constexpr int64_t QUERIES = Products::QUERIES, KEYS = Products::KEYS, KEYS_AT_A_TIME = Products::KEYS_AT_A_TIME;
    const int64_t first_token = c.offsets[request], tokens = c.offsets[request + 1] - first_token;
    Softmax softmax[Products::GROUPS * QUERIES];
    int64_t lowest = INT64_MAX;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t token = (row + r) / c.group(), own = head * c.group() + (row + r) % c.group();
        const float* sink = c.sink(own);
        softmax[r] = {own, c.starts[first_token + token] - begin, c.lengths[request] - tokens + token + 1 - begin,
                      sink ? *sink * LOG2_E : MASKED_SCORE, _mm512_zextps128_ps512(_mm_set_ss(sink ? 1.0f : 0.0f))};
        lowest = std::min(lowest, softmax[r].low);
    }
    pack_queries(c, request, head, row, count, padded_pairs, w.queries);
    std::fill(w.sums, w.sums + Products::GROUPS * QUERIES * c.value_dim, 0.0f);
    const int64_t to = softmax[count - 1].high;
    for (int64_t step = lowest / PANEL * PANEL; step < to; step += KEYS)
        for (int64_t first = 0; first < count; first += QUERIES) {
            const int64_t end = std::min(first + QUERIES, count), seen = softmax[end - 1].high - step;
            if (seen <= 0) continue;
            const int64_t some = (std::min(KEYS, seen) + KEYS_AT_A_TIME - 1) / KEYS_AT_A_TIME * KEYS_AT_A_TIME;
            float* sums = w.sums + first * c.value_dim;
            Products::score(w.queries + first * 2 * padded_pairs, keys + step * padded_pairs, some, padded_pairs, w.scores);
            for (int64_t r = 0; r < end - first; ++r) {
                const float rescale = update_softmax(c, softmax[first + r], step, begin + step, w.scores + r * KEYS, some,
                                                     w.weights + r * KEYS);
                if (rescale != 1.0f)
                    for (int64_t i = 0; i < c.value_dim; ++i) sums[r * c.value_dim + i] *= rescale;
            }
            Products::add_values(w.weights, values + step / 2 * c.value_dim, some, c.value_dim, sums);
        }
    for (int64_t r = 0; r < count; ++r) {
        const int64_t token = first_token + (row + r) / c.group();
        bfloat16* output = c.output + (token * c.heads + softmax[r].head) * c.value_dim;
        const float total = _mm512_reduce_add_ps(softmax[r].totals);
        for (int64_t i = 0; i < c.value_dim; ++i) from_float(w.sums[r * c.value_dim + i] / total, output[i]);
    }
}

template <typename Products>
void attend_prefill_piece(const Call<bfloat16>& c, int64_t request, int64_t head, int64_t from, int64_t to) {
    thread_local Scratch<uint32_t> keys_memory, values_memory;
    thread_local Scratch<int64_t> slots_memory;
    const int64_t first_token = c.offsets[request], tokens = c.offsets[request + 1] - first_token;
    const int64_t begin = *std::min_element(c.starts + first_token + from, c.starts + first_token + to);
    const int64_t count = c.lengths[request] - tokens + to - begin, padded = (count + PANEL - 1) / PANEL * PANEL;
    const int64_t pairs = c.key_dim / 2, unit = Products::PAIRS_AT_A_TIME, padded_pairs = (pairs + unit - 1) / unit * unit;
    uint32_t* keys = keys_memory.take(padded * padded_pairs);
    uint32_t* values = values_memory.take(padded * c.value_dim / 2);
    int64_t* slots = slots_memory.take(count);
    find_slots(c, request, begin, count, slots);
    pack_keys(c, head, slots, count, padded_pairs, keys);
    pack_values(c, head, slots, count, values);
    const Workspace<Products> workspace(padded_pairs, c.value_dim);
    const int64_t end = to * c.group();
    constexpr int64_t ROWS = Products::GROUPS * Products::QUERIES;
    for (int64_t row = from * c.group(); row < end; row += ROWS)
        attend_rows(c, request, head, row, std::min(ROWS, end - row), begin, padded_pairs, keys, values, workspace);
}

#endif

// ---- all requests

template <typename T>
void attend_decode(Team& team, const Call<T>& c) {
    // whole requests are read fastest; with too few of them to balance the threads, their heads are divided
    const int64_t wanted = c.requests >= 4 * team.threads() ? 1 : team.threads();
    const int64_t heads_per_piece = (c.kv_heads + wanted - 1) / wanted;
    const int64_t pieces = (c.kv_heads + heads_per_piece - 1) / heads_per_piece;
    team.each(c.requests * pieces, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t first = piece % pieces * heads_per_piece;
            attend_decode_piece(c, piece / pieces, first, std::min(first + heads_per_piece, c.kv_heads));
        }
    });
}

template <typename T>
void attend_decode(const Call<T>& c, int64_t threads) {
    with_team(threads, [&](Team& team) { attend_decode(team, c); });
}

#if HAS_BF16_DOT

void attend_prefill(const Call<bfloat16>& c, bool in_tiles, int64_t threads) {
    struct Piece {
        int64_t request, head, from, to, keys;
    };
    // every piece packs all keys that it sees, so pieces are as large as possible while balancing the threads
    const int64_t tokens_per_piece = c.offsets[c.requests] * c.kv_heads / (8 * threads);
    const int64_t max_tokens = threads == 1 ? INT64_MAX : std::clamp<int64_t>(tokens_per_piece, 64, 512);
    std::vector<Piece> pieces;
    for (int64_t request = 0; request < c.requests; ++request) {
        const int64_t tokens = c.offsets[request + 1] - c.offsets[request], parts = 1 + (tokens - 1) / max_tokens;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t from = tokens * part / parts, to = tokens * (part + 1) / parts;
            for (int64_t head = 0; head < c.kv_heads; ++head)
                pieces.push_back({request, head, from, to, c.lengths[request] - tokens + to});
        }
    }
    const auto work = [](const Piece& piece) { return piece.keys * (piece.to - piece.from); };
    std::stable_sort(pieces.begin(), pieces.end(), [&](const Piece& a, const Piece& b) { return work(a) > work(b); });
    const auto attend = [&](auto products) {
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < pieces.size(); ++i)
            attend_prefill_piece<decltype(products)>(c, pieces[i].request, pieces[i].head, pieces[i].from, pieces[i].to);
    };
#pragma omp parallel num_threads(threads)
    {
#if HAS_AMX
        if (in_tiles) {
            const Tiles tiles;
            attend(TileProducts{});
        } else
#endif
            attend(PairProducts{});
    }
}

#endif

}  // namespace

// Attention of one new token of each request, as attention() computes it, from queries query_stride numbers apart.
void decode_attention(Team& team, const Heads& heads, const Places& places, const bfloat16* query, int64_t query_stride,
                      const void* keys, const void* values, float scaling, float softcap, bfloat16* output, int64_t requests) {
    attend_decode(team, Call<bfloat16>{query, static_cast<const bfloat16*>(keys), static_cast<const bfloat16*>(values),
                                       places.tables, places.starts, places.offsets, places.lengths, nullptr, nullptr, 0, 0,
                                       output, query_stride, requests, heads.heads, heads.kv_heads, heads.head_dim,
                                       heads.head_dim, places.block_tokens, places.table_width, scaling, softcap});
}

// Returns whether attention() supports requests with several new tokens, in tiles or not. dtype: 0 float32, 1 bfloat16, 2
// float16.
extern "C" int attention_supports_prefill(int64_t dtype, int64_t key_dim, int64_t value_dim) {
    return HAS_BF16_DOT && dtype == 1 && key_dim % 2 == 0 && value_dim % 16 == 0;
}

// Attention of each request's new tokens over the pool. The tokens of query (tokens, heads, key_dim) are query_stride numbers
// apart; output (tokens, heads, value_dim) is contiguous; keys and values are one layer of the pool. Tokens offsets[i] to
// offsets[i + 1] - 1 are the last of request i's lengths[i] tokens, which lie in the blocks of its row of tables (requests,
// table_width); each token sees positions from starts[token] up to its own. sinks (heads) and bias (heads, bias_entries) may be
// null; a bias is chosen by the distance from key to query, or by the key's position if bias_by_position. Each request has
// one new token unless attention_supports_prefill(). in_tiles: prefill uses tiles if it may.
extern "C" void attention(int64_t dtype, const void* query, const void* keys, const void* values, const int64_t* tables,
                          const int64_t* starts, const int64_t* offsets, const int64_t* lengths, const float* sinks,
                          const float* bias, int64_t bias_entries, int64_t bias_by_position, void* output,
                          int64_t query_stride, int64_t requests, int64_t heads, int64_t kv_heads, int64_t key_dim,
                          int64_t value_dim, int64_t block_tokens, int64_t table_width, float scaling, float softcap,
                          int64_t in_tiles, int64_t threads) {
    const auto call = [&](auto type) {
        using T = decltype(type);
        return Call<T>{static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values),
                       tables, starts, offsets, lengths, sinks, bias, bias_entries, bias_by_position, static_cast<T*>(output),
                       query_stride, requests, heads, kv_heads, key_dim, value_dim, block_tokens, table_width, scaling,
                       softcap};
    };
#if HAS_BF16_DOT
    if (dtype == 1 && offsets[requests] > requests)
        return attend_prefill(call(bfloat16{}), in_tiles && may_use_tiles(), threads);
#endif
    if (dtype == 0) attend_decode(call(float{}), threads);
    if (dtype == 1) attend_decode(call(bfloat16{}), threads);
    if (dtype == 2) attend_decode(call(_Float16{}), threads);
}

// Copies each token's keys (key_bytes bytes, at a distance of key_stride bytes) and values into its slot of a layer.
extern "C" void store(const char* keys, const char* values, const int64_t* slots, char* pool_keys, char* pool_values,
                      int64_t tokens, int64_t key_stride, int64_t value_stride, int64_t key_bytes, int64_t value_bytes,
                      int64_t threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 64)
    for (int64_t token = 0; token < tokens; ++token) {
        std::memcpy(pool_keys + slots[token] * key_bytes, keys + token * key_stride, key_bytes);
        std::memcpy(pool_values + slots[token] * value_bytes, values + token * value_stride, value_bytes);
    }
}
