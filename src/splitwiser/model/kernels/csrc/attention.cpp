// Attention over the paged KV pool on a CPU, and the writing of keys and values into the pool.
//
// A request's new tokens are its last ones; each sees its request's tokens from a first position up to its own. Requests with
// one new token (decode) are bound by reading keys and values: work is divided into (request, span of its tokens, range of kv
// heads), each piece reads its keys once and their values once, and the spans of a request are merged at last (Dao et al.,
// Flash-Decoding, 2023). Requests with several new tokens (prefill) are bound by arithmetic: work is divided into (request, kv
// head, range of new tokens); each piece packs its keys and values for bfloat16 dot products and processes them in tiles with
// an online softmax (Dao, FlashAttention-2, arXiv 2307.08691).
//
// The pool holds numbers of the queries' type, or int8: a head's key or value is then its numbers as multiples of a scale,
// the float that follows them. Decode multiplies these whole numbers, with queries as whole numbers of 16 bits.
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

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define HAS_BF16_DOT 1
#include <immintrin.h>
#else
#define HAS_BF16_DOT 0
#endif

namespace {

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, _Float16& out) { out = static_cast<_Float16>(x); }
inline void from_float(float x, bfloat16& out) { out = to_bfloat16(x); }

// The numbers that a key or a value of `size` numbers takes in the pool.
template <typename S>
constexpr int64_t stored_size(int64_t size) {
    return std::is_same_v<S, int8_t> ? size + static_cast<int64_t>(sizeof(float)) : size;
}

// Returns what the `size` numbers of a stored key or value are multiples of.
inline float scale_of(const int8_t* stored, int64_t size) {
    float scale;
    std::memcpy(&scale, stored + size, sizeof scale);
    return scale;
}
template <typename S>
inline float scale_of(const S*, int64_t) {
    return 1.0f;
}

constexpr int64_t LANES = 16;

// Returns the greatest of f(0) to f(count - 1) and `least`. Compilers do not vectorise a plain loop of it, as a NaN would make
// the order matter.
template <typename F>
inline float greatest(int64_t count, float least, F f) {
    float most[LANES];
    std::fill_n(most, LANES, least);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) most[lane] = std::max(most[lane], f(i + lane));
    for (; i < count; ++i) most[0] = std::max(most[0], f(i));
    return *std::max_element(most, most + LANES);
}

// Returns the greatest magnitude of some numbers.
template <typename T>
inline float greatest_magnitude(const T* numbers, int64_t size) {
    return greatest(size, 0.0f, [&](int64_t i) { return std::fabs(to_float(numbers[i])); });
}

// Returns the whole number nearest to x, of less than 22 bits: a sum with 1.5 * 2^23 has it in its last bits.
inline int32_t to_whole(float x) {
    const float sum = x + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    return bits - 0x4b400000;
}

// The arguments of one call, described at attention() below: T is the type of queries, S that of the pool.
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

// ---- decode, one new token: kv heads [first, last) of a request, over `count` of its tokens

constexpr int64_t SPAN = 512;  // tokens of a piece at most; always the same, so that sums do not depend on the threads
// Where the keys or values of a span's tokens lie, and what is read after them: rows past the last token are for prefetching.
template <typename S>
struct Rows {
    const S* of[SPAN + 2 * LANES];

    // `zero` is where those of slot 0 lie, and slots are `stride` apart.
    template <typename T>
    Rows(const Call<T, S>& c, int64_t request, int64_t begin, int64_t count, const S* zero, int64_t stride) {
        c.each_slot(request, begin, count, [&](int64_t token, int64_t slot) { of[token] = zero + slot * stride; });
        std::fill(of + count, of + count + 2 * LANES, of[count - 1]);
    }

    // Has what is read next follow the `count` tokens, of which 16 are read at a time.
    void follow(const Rows& next, int64_t count) {
        std::copy_n(next.of, LANES, of + (count + LANES - 1) / LANES * LANES);
    }
};

template <typename T, typename S>
void score_tokens(const Call<T, S>& c, int64_t request, int64_t first, int64_t last, const Rows<S>& keys, int64_t count,
                  float* scores) {
    thread_local Scratch<float> queries_memory;
    const int64_t rows = (last - first) * c.group();
    float* queries = queries_memory.take(rows * c.key_dim);
    const T* own = c.query + c.offsets[request] * c.query_stride + first * c.group() * c.key_dim;
    for (int64_t i = 0; i < rows * c.key_dim; ++i) queries[i] = to_float(own[i]);
    for (int64_t token = 0; token < count; ++token)
        for (int64_t row = 0; row < rows; ++row) {
            const S* k = keys.of[token] + row / c.group() * stored_size<S>(c.key_dim);
            const float* q = queries + row * c.key_dim;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < c.key_dim; ++i) sum += q[i] * to_float(k[i]);
            scores[row * SPAN + token] = sum * scale_of(k, c.key_dim);
        }
}

// The place of a head's number `i` among its sums.
template <typename T, typename S>
int64_t place_of_sum(int64_t i) {
    return i;
}

template <typename T, typename S>
void sum_values(const Call<T, S>& c, int64_t first, int64_t last, const Rows<S>& values, int64_t count, const float* weights,
                float* sums) {
    const int64_t rows = (last - first) * c.group(), width = partial_size(c.value_dim);
    for (int64_t token = 0; token < count; ++token)
        for (int64_t row = 0; row < rows; ++row) {
            const S* v = values.of[token] + row / c.group() * stored_size<S>(c.value_dim);
            float* sum = sums + row * width;
            const float weight = weights[row * SPAN + token] * scale_of(v, c.value_dim);
#pragma omp simd
            for (int64_t i = 0; i < c.value_dim; ++i) sum[i] += weight * to_float(v[i]);
        }
}

#if HAS_BF16_DOT

constexpr float LOG2_E = 1.44269504f;

inline __mmask32 first_pairs(int64_t numbers) { return numbers >= 32 ? ~__mmask32{0} : (__mmask32{1} << numbers) - 1; }
inline __mmask16 first_lanes(int64_t numbers) { return numbers >= 16 ? ~__mmask16{0} : (__mmask16{1} << numbers) - 1; }

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

inline __m512i reduce_lanes(const __m512i (&a)[LANES]) {
    __m512i fours[4];
    for (int i = 0; i < 4; ++i) {
        const auto both = [&](int j) {
            return _mm512_add_epi32(_mm512_unpacklo_epi32(a[j], a[j + 1]), _mm512_unpackhi_epi32(a[j], a[j + 1]));
        };
        const __m512i low = both(4 * i), high = both(4 * i + 2);
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    const auto both = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return both(both(fours[0], fours[1]), both(fours[2], fours[3]));
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

// Prefetches what is to be read next: it may lie in another block, which the processor's own prefetcher cannot foresee. It goes
// to L2, since L1 can wait for too few lines at a time to use all of the memory's bandwidth.
template <typename S>
inline void prefetch(const S* const* rows, int64_t offset, int64_t numbers) {
    for (int64_t i = 0; i < LANES; ++i)
        for (int64_t at = 0; at < numbers; at += 64 / sizeof(S))
            _mm_prefetch(reinterpret_cast<const char*>(rows[i] + offset + at), _MM_HINT_T1);
}

// Returns the scales of 16 keys or values of `size` numbers.
inline __m512 scales_of(const int8_t* const* rows, int64_t size) {
    const auto eight = [&](int64_t from) {
        return _mm512_i64gather_ps(_mm512_loadu_si512(rows + from), reinterpret_cast<const void*>(size), 1);
    };
    return _mm512_insertf32x8(_mm512_castps256_ps512(eight(0)), eight(8), 1);
}

// Multiplies 16 keys by the queries of one head's group, the span's rows from `row` on.
struct Bfloat16Scores {
    const bfloat16* queries;
    int64_t size;

    Bfloat16Scores(const bfloat16* queries, int64_t, int64_t size) : queries(queries), size(size) {}

    template <typename F>
    void of(const bfloat16* const* keys, int64_t offset, int64_t row, int64_t end, F store) const {
        for (; row < end; ++row) {
            __m512 sums[LANES];
            for (auto& sum : sums) sum = _mm512_setzero_ps();
            for (int64_t at = 0; at < size; at += 32) {
                const __mmask32 part = first_pairs(size - at);
                const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(part, queries + row * size + at);
                for (int64_t i = 0; i < LANES; ++i)
                    sums[i] = _mm512_dpbf16_ps(sums[i], q, (__m512bh)_mm512_maskz_loadu_epi16(part, keys[i] + offset + at));
            }
            store(row, reduce_lanes(sums));
        }
    }
};

// The same for whole numbers. The queries' are of 16 bits, as 256 times `high` plus `low`; keys have 128 added, since VNNI
// takes one operand without a sign, which is taken off at last. Sums are exact, modulo 2^32 on the way.
struct Int8Scores {
    int8_t *high, *low;
    float* scales;
    int32_t* excess;
    int64_t size, padded;

    Int8Scores(const bfloat16* queries, int64_t rows, int64_t size) : size(size), padded((size + 63) / 64 * 64) {
        thread_local Scratch<int8_t> numbers_memory;
        thread_local Scratch<float> scales_memory;
        thread_local Scratch<int32_t> excess_memory;
        high = numbers_memory.take(2 * rows * padded), low = high + rows * padded;
        scales = scales_memory.take(rows), excess = excess_memory.take(rows);
        std::memset(high, 0, 2 * rows * padded);
        const auto limit = static_cast<float>(std::min<int64_t>(127 * 256, INT32_MAX / (127 * size)));  // sums fit in 32 bits
        for (int64_t row = 0; row < rows; ++row) {
            const bfloat16* own = queries + row * size;
            const float most = greatest_magnitude(own, size), factor = most > 0.0f ? limit / most : 0.0f;
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < size; ++i) {
                const int32_t whole = to_whole(to_float(own[i]) * factor);
                const auto lower = static_cast<int8_t>(whole);
                low[row * padded + i] = lower;
                high[row * padded + i] = static_cast<int8_t>((whole - lower) >> 8);
                sum += whole;
            }
            scales[row] = most / limit;
            excess[row] = 128 * sum;
        }
    }

    template <typename F>
    void of(const int8_t* const* keys, int64_t offset, int64_t row, int64_t end, F store) const {
        const __m512 key_scales = scales_of(keys, offset + size);
        for (; row < end; ++row) {
            __m512i sums[LANES];
            for (auto& sum : sums) sum = _mm512_setzero_si512();
            for (int64_t at = 0; at < size; at += 64) {
                const __mmask64 part = size - at >= 64 ? ~__mmask64{0} : (__mmask64{1} << (size - at)) - 1;
                const __m512i h = _mm512_load_si512(high + row * padded + at), l = _mm512_load_si512(low + row * padded + at);
                for (int64_t i = 0; i < LANES; ++i) {
                    const __m512i key = _mm512_xor_si512(_mm512_maskz_loadu_epi8(part, keys[i] + offset + at),
                                                         _mm512_set1_epi8(-128));
                    const __m512i upper = _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), key, h), 8);
                    sums[i] = _mm512_dpbusd_epi32(_mm512_add_epi32(sums[i], upper), key, l);
                }
            }
            const __m512i total = _mm512_sub_epi32(reduce_lanes(sums), _mm512_set1_epi32(excess[row]));
            store(row, _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(key_scales, _mm512_set1_ps(scales[row]))));
        }
    }
};

// As above, for 16 tokens at a time; those further on are prefetched meanwhile.
template <typename S>
void score_tokens(const Call<bfloat16, S>& c, int64_t request, int64_t first, int64_t last, const Rows<S>& keys,
                  int64_t count, float* scores) {
    const bfloat16* own = c.query + c.offsets[request] * c.query_stride + first * c.group() * c.key_dim;
    using Scores = std::conditional_t<std::is_same_v<S, int8_t>, Int8Scores, Bfloat16Scores>;
    const Scores products(own, (last - first) * c.group(), c.key_dim);
    const int64_t stored = stored_size<S>(c.key_dim);
    for (int64_t token = 0; token < count; token += LANES)
        for (int64_t head = 0; head < last - first; ++head) {
            prefetch(keys.of + token + LANES, head * stored, stored);
            products.of(keys.of + token, head * stored, head * c.group(), (head + 1) * c.group(),
                        [&](int64_t row, __m512 sums) { _mm512_storeu_ps(scores + row * SPAN + token, sums); });
        }
}

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

template <>
inline int64_t place_of_sum<bfloat16, bfloat16>(int64_t i) {
    return i / 32 * 32 + i % 2 * LANES + i % 32 / 2;
}

// Adds the weighted values of up to 16 tokens to the sums of ROWS rows of one head, `width` apart, for 64 numbers of the head,
// of which the last ones may be missing. The weights of consecutive rows are `stride` apart.
template <int ROWS, typename S>
inline void sum_part(const S* const* values, int64_t tokens, int64_t offset, int64_t numbers, const float* weights,
                     int64_t stride, float* sums, int64_t width) {
    const __mmask32 parts[2] = {first_pairs(numbers), first_pairs(std::max<int64_t>(0, numbers - 32))};
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_loadu_ps(sums + r * width + j * LANES);
    for (int64_t i = 0; i < tokens; ++i)
        for (int j = 0; j < 2; ++j) {
            __m512 a, b;
            load_halves(values[i] + offset + j * 32, parts[j], a, b);
            for (int r = 0; r < ROWS; ++r) {
                const __m512 weight = _mm512_set1_ps(weights[r * stride + i]);
                sum[r][2 * j] = _mm512_fmadd_ps(weight, a, sum[r][2 * j]);
                sum[r][2 * j + 1] = _mm512_fmadd_ps(weight, b, sum[r][2 * j + 1]);
            }
        }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) _mm512_storeu_ps(sums + r * width + j * LANES, sum[r][j]);
}

template <typename S>
void sum_values(const Call<bfloat16, S>& c, int64_t first, int64_t last, const Rows<S>& values, int64_t count,
                const float* weights, float* sums) {
    constexpr int64_t AT_A_TIME = 4;  // rows
    const int64_t stored = stored_size<S>(c.value_dim), width = partial_size(c.value_dim);
    for (int64_t token = 0; token < count; token += LANES) {
        const int64_t tokens = std::min(LANES, count - token);
        for (int64_t head = 0; head < last - first; ++head) {
            prefetch(values.of + token + LANES, head * stored, stored);
            const int64_t end = (head + 1) * c.group();
            for (int64_t row = head * c.group(); row < end; row += AT_A_TIME) {
                const int64_t some = std::min(AT_A_TIME, end - row);
                const float* own = weights + row * SPAN + token;
                int64_t stride = SPAN;
                alignas(64) float scaled[AT_A_TIME * LANES];
                if constexpr (std::is_same_v<S, int8_t>) {
                    const __m512 scales = scales_of(values.of + token, head * stored + c.value_dim);
                    for (int64_t r = 0; r < some; ++r)
                        _mm512_store_ps(scaled + r * LANES, _mm512_mul_ps(scales, _mm512_loadu_ps(own + r * SPAN)));
                    own = scaled, stride = LANES;
                }
                for (int64_t at = 0; at < c.value_dim; at += 64) {
                    const auto add = [&](auto rows) {
                        sum_part<rows()>(values.of + token, tokens, head * stored + at, c.value_dim - at, own, stride,
                                         sums + row * width + at, width);
                    };
                    switch (some) {
                        case 1: add(std::integral_constant<int, 1>{}); break;
                        case 2: add(std::integral_constant<int, 2>{}); break;
                        case 3: add(std::integral_constant<int, 3>{}); break;
                        default: add(std::integral_constant<int, 4>{});
                    }
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

// What a head has made of a span: the sums of its weighted values, still to be divided by the total of the weights, which are
// relative to that of a score of `highest`.
struct Partial {
    float *sums, *total, *highest;
};

// Turns a head's scores of a span from position `begin` on into weights. The first span of a request has the head's sink.
template <typename T, typename S>
void weigh(const Call<T, S>& c, int64_t request, int64_t head, int64_t begin, int64_t count, const float* sink, float* score,
           const Partial& partial) {
    float scaling = c.scaling;
    if (c.softcap != 0.0f || c.bias || sink || scaling <= 0.0f) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) score[i] *= scaling;
        scaling = 1.0f;
    }
    if (c.softcap != 0.0f)
        for (int64_t i = 0; i < count; ++i) score[i] = c.softcap * std::tanh(score[i] / c.softcap);
    if (c.bias) c.add_bias(head, c.lengths[request] - 1, begin, count, score);
    const float highest = greatest(count, sink ? *sink : score[0], [&](int64_t i) { return score[i]; });
    *partial.total = exponentiate(score, count, highest, scaling) + (sink ? std::exp(*sink - highest) : 0.0f);
    *partial.highest = highest * scaling;
}

// The partials of a step's requests: for each span, `heads` of them.
struct Partials {
    float* memory;
    int64_t heads, width;

    Partial of(int64_t span, int64_t head) const {
        float* at = memory + (span * heads + head) * partial_size(width);
        return {at, at + padded_sums(width), at + padded_sums(width) + 1};
    }
};

// Writes a head's output, of its partials from span `from` to before `to`.
template <typename T, typename S>
void write_output(const Call<T, S>& c, int64_t request, int64_t head, const Partials& partials, int64_t from, int64_t to) {
    const Partial sum = partials.of(from, head);
    for (int64_t span = from + 1; span < to; ++span) {
        const Partial next = partials.of(span, head);
        const float highest = std::max(*sum.highest, *next.highest);
        const float factor = std::exp(*sum.highest - highest), other = std::exp(*next.highest - highest);
#pragma omp simd
        for (int64_t i = 0; i < padded_sums(c.value_dim); ++i) sum.sums[i] = sum.sums[i] * factor + next.sums[i] * other;
        *sum.total = *sum.total * factor + *next.total * other;
        *sum.highest = highest;
    }
    T* out = c.output + (c.offsets[request] * c.heads + head) * c.value_dim;
    for (int64_t i = 0; i < c.value_dim; ++i) from_float(sum.sums[place_of_sum<T, S>(i)] / *sum.total, out[i]);
}

// Makes the partials of kv heads [first, last) of a request's span `number`, which is span `span` of the step.
template <typename T, typename S>
void attend_span(const Call<T, S>& c, const Partials& partials, int64_t request, int64_t number, int64_t span, int64_t first,
                 int64_t last) {
    thread_local Scratch<float> scores_memory;
    const int64_t begin = c.starts[c.offsets[request]] + number * SPAN, count = std::min(SPAN, c.lengths[request] - begin);
    float* scores = scores_memory.take((last - first) * c.group() * SPAN);
    Rows<S> keys(c, request, begin, count, c.key(0, first), c.kv_heads * stored_size<S>(c.key_dim));
    const Rows<S> values(c, request, begin, count, c.value(0, first), c.kv_heads * stored_size<S>(c.value_dim));
    keys.follow(values, count);
    score_tokens(c, request, first, last, keys, count, scores);
    for (int64_t head = first * c.group(); head < last * c.group(); ++head) {
        const Partial partial = partials.of(span, head);
        const float* sink = number ? nullptr : c.sink(head);
        weigh(c, request, head, begin, count, sink, scores + (head - first * c.group()) * SPAN, partial);
        std::fill_n(partial.sums, padded_sums(c.value_dim), 0.0f);
    }
    sum_values(c, first, last, values, count, scores, partials.of(span, first * c.group()).sums);
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

// Loads 32 numbers of a stored key or value, of which the last ones may be missing, as bfloat16.
inline __m512i load_bfloat16(const bfloat16* from, __mmask32 part, float) { return _mm512_maskz_loadu_epi16(part, from); }
inline __m512i load_bfloat16(const int8_t* from, __mmask32 part, float scale) {
    __m512 a, b;
    load_halves(from, part, a, b);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, _mm512_set1_ps(scale)), _mm512_mul_ps(a, _mm512_set1_ps(scale)));
}

// Packs a head's keys in `count` slots into panels of 64: pair j of all 64 keys, then pair j + 1, up to `padded` pairs.
// Zeros pad pairs and the last panel.
template <typename S>
void pack_keys(const Call<bfloat16, S>& c, int64_t head, const int64_t* slots, int64_t count, int64_t padded,
               uint32_t* packed) {
    for (int64_t token = 0; token < count || token % PANEL; token += LANES) {
        uint32_t* panel = packed + token / PANEL * PANEL * padded + token % PANEL;
        for (int64_t at = 0; at < padded; at += LANES) {
            __m512i rows[LANES];
            for (int64_t i = 0; i < LANES; ++i) {
                rows[i] = _mm512_setzero_si512();
                if (token + i >= count) continue;
                const S* key = c.key(slots[token + i], head);
                const __mmask32 part = first_pairs(std::max<int64_t>(0, c.key_dim - 2 * at));
                rows[i] = load_bfloat16(key + 2 * at, part, scale_of(key, c.key_dim));
            }
            transpose(rows);
            for (int64_t j = 0; j < std::min(LANES, padded - at); ++j) _mm512_store_si512(panel + (at + j) * PANEL, rows[j]);
        }
    }
}

// Packs the values of the same tokens, interleaving those of each two tokens. Zeros pad to a whole panel.
template <typename S>
void pack_values(const Call<bfloat16, S>& c, int64_t head, const int64_t* slots, int64_t count, uint32_t* packed) {
    for (int64_t token = 0; token < count || token % PANEL; token += 2) {
        const auto load = [&](int64_t token, int64_t at) {
            if (token >= count) return _mm512_setzero_si512();
            const S* value = c.value(slots[token], head);
            const __m512i numbers = load_bfloat16(value + at, first_pairs(LANES), scale_of(value, c.value_dim));
            return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers));
        };
        for (int64_t at = 0; at < c.value_dim; at += LANES) {
            const __m512i low = load(token, at), high = load(token + 1, at);
            _mm512_store_si512(packed + token / 2 * c.value_dim + at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// Copies the queries of rows [row, row + count) of a piece, ordered by token and then by head of the group, to a distance of
// `padded` pairs, with zeros after each.
template <typename S>
void pack_queries(const Call<bfloat16, S>& c, int64_t request, int64_t head, int64_t row, int64_t count, int64_t padded,
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
template <typename S>
inline float update_softmax(const Call<bfloat16, S>& c, Softmax& s, int64_t step, int64_t position, float* scores,
                            int64_t keys, bfloat16* weights) {
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
template <typename Products, typename S>
void attend_rows(const Call<bfloat16, S>& c, int64_t request, int64_t head, int64_t row, int64_t count, int64_t begin,
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

template <typename Products, typename S>
void attend_prefill_piece(const Call<bfloat16, S>& c, int64_t request, int64_t head, int64_t from, int64_t to) {
    thread_local Scratch<uint32_t> keys_memory, values_memory;
    thread_local Scratch<int64_t> slots_memory;
    const int64_t first_token = c.offsets[request], tokens = c.offsets[request + 1] - first_token;
    const int64_t begin = *std::min_element(c.starts + first_token + from, c.starts + first_token + to);
    const int64_t count = c.lengths[request] - tokens + to - begin, padded = (count + PANEL - 1) / PANEL * PANEL;
    const int64_t pairs = c.key_dim / 2, unit = Products::PAIRS_AT_A_TIME, padded_pairs = (pairs + unit - 1) / unit * unit;
    uint32_t* keys = keys_memory.take(padded * padded_pairs);
    uint32_t* values = values_memory.take(padded * c.value_dim / 2);
    int64_t* slots = slots_memory.take(count);
    c.each_slot(request, begin, count, [&](int64_t token, int64_t slot) { slots[token] = slot; });
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

template <typename T, typename S>
void attend_decode(Team& team, const Call<T, S>& c, const Spans& spans) {
    // spans of all heads are read fastest; with too few of them to balance the threads, their heads are divided
    const int64_t count = spans.first[c.requests], wanted = count >= 4 * team.threads() ? 1 : team.threads();
    const int64_t heads_per_piece = (c.kv_heads + wanted - 1) / wanted;
    const int64_t pieces = (c.kv_heads + heads_per_piece - 1) / heads_per_piece;
    const Partials partials{spans.partials, c.heads, c.value_dim};
    team.each(count * pieces, [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t span = piece / pieces, first = piece % pieces * heads_per_piece;
            const int64_t request = std::upper_bound(spans.first, spans.first + c.requests, span) - spans.first - 1;
            attend_span(c, partials, request, span - spans.first[request], span, first,
                        std::min(first + heads_per_piece, c.kv_heads));
        }
    });
    team.each(c.requests * c.heads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t request = row / c.heads;
            write_output(c, request, row % c.heads, partials, spans.first[request], spans.first[request + 1]);
        }
    });
}

template <typename T, typename S>
void attend_decode(const Call<T, S>& c, int64_t threads) {
    const Spans spans = divide_into_spans({c.tables, c.starts, c.offsets, c.lengths, c.block_tokens, c.table_width}, c.requests,
                                          c.heads * partial_size(c.value_dim));
    with_team(threads, [&](Team& team) { attend_decode(team, c, spans); });
}

#if HAS_BF16_DOT

template <typename S>
void attend_prefill(const Call<bfloat16, S>& c, bool in_tiles, int64_t threads) {
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

Spans divide_into_spans(const Places& places, int64_t requests, int64_t partial_numbers) {
    thread_local std::vector<int64_t> first;
    thread_local Scratch<float> partials;
    first.assign(1, 0);
    for (int64_t i = 0; i < requests; ++i)
        first.push_back(first.back() + (places.lengths[i] - places.starts[places.offsets[i]] + SPAN - 1) / SPAN);
    return {first.data(), partials.take(first.back() * partial_numbers)};
}

// Attention of one new token of each request, as attention() computes it, from queries query_stride numbers apart.
void decode_attention(Team& team, const Heads& heads, const Places& places, const Spans& spans, const bfloat16* query,
                      int64_t query_stride, const void* keys, const void* values, bool int8, float scaling, float softcap,
                      bfloat16* output, int64_t requests) {
    const auto attend = [&](auto type) {
        using S = decltype(type);
        const Call<bfloat16, S> call{query, static_cast<const S*>(keys), static_cast<const S*>(values), places.tables,
                                     places.starts, places.offsets, places.lengths, nullptr, nullptr, 0, 0, output,
                                     query_stride, requests, heads.heads, heads.kv_heads, heads.head_dim, heads.head_dim,
                                     places.block_tokens, places.table_width, scaling, softcap};
        attend_decode(team, call, spans);
    };
    if (int8) return attend(int8_t{});
    attend(bfloat16{});
}

// Returns whether attention() supports requests with several new tokens, in tiles or not. dtype is the pool's: 0 float32, 1
// bfloat16, 2 float16, 3 int8.
extern "C" int attention_supports_prefill(int64_t dtype, int64_t key_dim, int64_t value_dim) {
    return HAS_BF16_DOT && (dtype == 1 || dtype == 3) && key_dim % 2 == 0 && value_dim % 16 == 0;
}

// Attention of each request's new tokens over the pool, whose dtype is that of query and output; with int8, these are bfloat16.
// The tokens of query (tokens, heads, key_dim) are query_stride numbers
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
    const auto attend = [&](auto type, auto stored) {
        using T = decltype(type);
        using S = decltype(stored);
        const Call<T, S> call{static_cast<const T*>(query), static_cast<const S*>(keys), static_cast<const S*>(values), tables,
                              starts, offsets, lengths, sinks, bias, bias_entries, bias_by_position, static_cast<T*>(output),
                              query_stride, requests, heads, kv_heads, key_dim, value_dim, block_tokens, table_width, scaling,
                              softcap};
#if HAS_BF16_DOT
        if constexpr (std::is_same_v<T, bfloat16>)
            if (offsets[requests] > requests) return attend_prefill(call, in_tiles && may_use_tiles(), threads);
#endif
        attend_decode(call, threads);
    };
    if (dtype == 0) attend(float{}, float{});
    if (dtype == 1) attend(bfloat16{}, bfloat16{});
    if (dtype == 2) attend(_Float16{}, _Float16{});
    if (dtype == 3) attend(bfloat16{}, int8_t{});
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

namespace {

// Writes `size` numbers as int8, and their scale behind them.
template <typename T>
void quantise(const T* from, int64_t size, int8_t* to) {
    const float most = greatest_magnitude(from, size), scale = most / 127, factor = most > 0.0f ? 127 / most : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<int8_t>(to_whole(to_float(from[i]) * factor));
    std::memcpy(to + size, &scale, sizeof scale);
}

}  // namespace

// As store(), into a pool of int8. dtype is that of keys and values, 0 float32, 1 bfloat16, 2 float16; strides and sizes are in
// numbers.
extern "C" void store_int8(int64_t dtype, const void* keys, const void* values, const int64_t* slots, int8_t* pool_keys,
                           int8_t* pool_values, int64_t tokens, int64_t key_stride, int64_t value_stride, int64_t kv_heads,
                           int64_t key_dim, int64_t value_dim, int64_t threads) {
    const auto store_all = [&](auto type, const void* from, int64_t stride, int64_t size, int8_t* pool) {
        const auto* numbers = static_cast<const decltype(type)*>(from);
        const int64_t stored = stored_size<int8_t>(size);
#pragma omp parallel for num_threads(threads) if (tokens > 64)
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t head = 0; head < kv_heads; ++head)
                quantise(numbers + token * stride + head * size, size, pool + (slots[token] * kv_heads + head) * stored);
    };
    const auto store_both = [&](auto type) {
        store_all(type, keys, key_stride, key_dim, pool_keys);
        store_all(type, values, value_stride, value_dim, pool_values);
    };
    if (dtype == 0) store_both(float{});
    if (dtype == 1) store_both(bfloat16{});
    if (dtype == 2) store_both(_Float16{});
}
