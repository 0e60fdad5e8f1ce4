// Attention of requests with one new token, which is bound by reading keys and values: work is divided into (request, span of
// its tokens, range of kv heads), each piece reads its keys once and their values once, and the spans of a request are merged at
// last (Dao et al., Flash-Decoding, 2023). Numbers of int8 are multiplied as they are, with queries and weights as whole numbers
// of 16 bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "parts.h"

namespace {

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

// Returns the scales of 16 keys or values of `size` numbers: by single loads, of which a gather takes several times as long.
inline __m512 scales_of(const int8_t* const* rows, int64_t size) {
    const auto of = [&](int64_t i) { return scale_of(rows[i], size); };
    return _mm512_setr_ps(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), of(13),
                          of(14), of(15));
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

// The same for whole numbers, the queries' of 16 bits, whose sums are exact.
struct Int8Scores {
    int16_t* queries;
    float* scales;
    int64_t size, padded;

    Int8Scores(const bfloat16* own, int64_t rows, int64_t size) : size(size), padded((size + 31) / 32 * 32) {
        thread_local Scratch<int16_t> numbers_memory;
        thread_local Scratch<float> scales_memory;
        queries = numbers_memory.take(rows * padded), scales = scales_memory.take(rows);
        std::fill_n(queries, rows * padded, int16_t{0});
        const auto limit = static_cast<float>(std::min<int64_t>(INT16_MAX, INT32_MAX / (127 * size)));  // sums fit in 32 bits
        for (int64_t row = 0; row < rows; ++row, own += size) {
            const float most = greatest_magnitude(own, size), factor = most > 0.0f ? limit / most : 0.0f;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i)
                queries[row * padded + i] = static_cast<int16_t>(to_whole(to_float(own[i]) * factor));
            scales[row] = most / limit;
        }
    }

    template <typename F>
    void of(const int8_t* const* keys, int64_t offset, int64_t row, int64_t end, F store) const {
        const __m512 key_scales = scales_of(keys, offset + size);
        for (; row < end; ++row) {
            __m512i sums[LANES];
            for (auto& sum : sums) sum = _mm512_setzero_si512();
            for (int64_t at = 0; at < size; at += 32) {
                const __mmask32 part = first_pairs(size - at);
                const __m512i query = _mm512_load_si512(queries + row * padded + at);
                for (int64_t i = 0; i < LANES; ++i) {
                    const __m256i key = _mm256_maskz_loadu_epi8(part, keys[i] + offset + at);
                    sums[i] = _mm512_dpwssd_epi32(sums[i], query, _mm512_cvtepi8_epi16(key));
                }
            }
            const __m512 factors = _mm512_mul_ps(key_scales, _mm512_set1_ps(scales[row]));
            store(row, _mm512_mul_ps(_mm512_cvtepi32_ps(reduce_lanes(sums)), factors));
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

// Adds the weighted values of up to 16 tokens to the sums of ROWS rows of one head, `width` apart, for 64 numbers of the head,
// of which the last ones may be missing. The weights of consecutive rows are SPAN apart.
template <int ROWS>
inline void sum_part(const bfloat16* const* values, int64_t tokens, int64_t offset, int64_t numbers, const float* weights,
                     float* sums, int64_t width) {
    const __mmask32 parts[2] = {first_pairs(numbers), first_pairs(std::max<int64_t>(0, numbers - 32))};
    __m512 sum[ROWS][4];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_loadu_ps(sums + r * width + j * LANES);
    for (int64_t i = 0; i < tokens; ++i)
        for (int j = 0; j < 2; ++j) {
            __m512 a, b;
            load_halves(values[i] + offset + j * 32, parts[j], a, b);
            for (int r = 0; r < ROWS; ++r) {
                const __m512 weight = _mm512_set1_ps(weights[r * SPAN + i]);
                sum[r][2 * j] = _mm512_fmadd_ps(weight, a, sum[r][2 * j]);
                sum[r][2 * j + 1] = _mm512_fmadd_ps(weight, b, sum[r][2 * j + 1]);
            }
        }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j) _mm512_storeu_ps(sums + r * width + j * LANES, sum[r][j]);
}

// The same for all `rows` rows of a head's group.
struct Bfloat16Values {
    static int64_t place_of_sum(int64_t i) { return i / 32 * 32 + i % 2 * LANES + i % 32 / 2; }

    static void add(const bfloat16* const* values, int64_t tokens, int64_t offset, int64_t value_dim, const float* weights,
                    int64_t rows, float* sums, int64_t width) {
        constexpr int64_t AT_A_TIME = 4;  // rows
        for (int64_t row = 0; row < rows; row += AT_A_TIME)
            for (int64_t at = 0; at < value_dim; at += 64) {
                const auto part = [&](auto some) {
                    sum_part<some()>(values, tokens, offset + at, value_dim - at, weights + row * SPAN, sums + row * width + at,
                                     width);
                };
                switch (std::min(AT_A_TIME, rows - row)) {
                    case 1: part(std::integral_constant<int, 1>{}); break;
                    case 2: part(std::integral_constant<int, 2>{}); break;
                    case 3: part(std::integral_constant<int, 3>{}); break;
                    default: part(std::integral_constant<int, 4>{});
                }
            }
    }
};

// The same for whole numbers: weights times the scales of their values become whole numbers of 16 bits without a sign, as 256
// times `high` plus `low`, relative to the greatest of the 16 tokens. For VNNI the numbers of each four tokens are interleaved.
struct Int8Values {
    static int64_t place_of_sum(int64_t i) { return i / 64 * 64 + i / 4 % 4 * LANES + i % 64 / 16 * 4 + i % 4; }

    static void add(const int8_t* const* values, int64_t tokens, int64_t offset, int64_t value_dim, const float* weights,
                    int64_t rows, float* sums, int64_t width) {
        constexpr int64_t AT_A_TIME = 4;  // rows
        const __mmask16 present = first_lanes(tokens);
        const __m512 scales = scales_of(values, offset + value_dim);
        for (int64_t first = 0; first < rows; first += AT_A_TIME) {
            const int64_t some = std::min(AT_A_TIME, rows - first);
            Whole whole[AT_A_TIME];
            for (int64_t r = 0; r < some; ++r)
                whole[r] = Whole(_mm512_maskz_mul_ps(present, scales, _mm512_loadu_ps(weights + (first + r) * SPAN)));
            for (int64_t at = 0; at < value_dim; at += 64) {
                const __mmask64 part = value_dim - at >= 64 ? ~__mmask64{0} : (__mmask64{1} << (value_dim - at)) - 1;
                __m512i quads[4][4];
                for (int64_t quad = 0; quad < 4; ++quad) interleave(values + 4 * quad, offset + at, part, quads[quad]);
                for (int64_t r = 0; r < some; ++r) add_row(quads, whole[r], sums + (first + r) * width + at);
            }
        }
    }

  private:
    // The weights of 16 tokens: `unit` times 256 times a byte of `high` plus one of `low`.
    struct Whole {
        alignas(16) int32_t high[4], low[4];
        float unit;

        Whole() = default;
        explicit Whole(__m512 weights) {
            constexpr float LARGEST = 65535.0f, LEAST = 1e-30f;  // beside a span's greatest weight, 1; the quotient is finite
            const float most = _mm512_reduce_max_ps(weights), factor = most > LEAST ? LARGEST / most : 0.0f;
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(weights, _mm512_set1_ps(factor)));
            _mm_store_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
            _mm_store_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(whole));
            unit = most / LARGEST;
        }
    };

    static void interleave(const int8_t* const* values, int64_t offset, __mmask64 part, __m512i (&quads)[4]) {
        const auto load = [&](int64_t i) { return _mm512_maskz_loadu_epi8(part, values[i] + offset); };
        const __m512i a = load(0), b = load(1), c = load(2), d = load(3);
        const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
        const __m512i low2 = _mm512_unpacklo_epi8(c, d), high2 = _mm512_unpackhi_epi8(c, d);
        quads[0] = _mm512_unpacklo_epi16(low, low2), quads[1] = _mm512_unpackhi_epi16(low, low2);
        quads[2] = _mm512_unpacklo_epi16(high, high2), quads[3] = _mm512_unpackhi_epi16(high, high2);
    }

    static void add_row(const __m512i (&quads)[4][4], const Whole& weights, float* sums) {
        __m512i upper[4], lower[4];
        for (int j = 0; j < 4; ++j) upper[j] = lower[j] = _mm512_setzero_si512();
        for (int quad = 0; quad < 4; ++quad) {
            const __m512i high = _mm512_set1_epi32(weights.high[quad]), low = _mm512_set1_epi32(weights.low[quad]);
            for (int j = 0; j < 4; ++j) {
                upper[j] = _mm512_dpbusd_epi32(upper[j], high, quads[quad][j]);
                lower[j] = _mm512_dpbusd_epi32(lower[j], low, quads[quad][j]);
            }
        }
        const __m512 unit = _mm512_set1_ps(weights.unit);
        for (int j = 0; j < 4; ++j) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(upper[j], 8), lower[j]);
            float* to = sums + j * LANES;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, _mm512_loadu_ps(to)));
        }
    }
};

template <typename S>
using Values = std::conditional_t<std::is_same_v<S, int8_t>, Int8Values, Bfloat16Values>;

template <>
inline int64_t place_of_sum<bfloat16, bfloat16>(int64_t i) {
    return Bfloat16Values::place_of_sum(i);
}
template <>
inline int64_t place_of_sum<bfloat16, int8_t>(int64_t i) {
    return Int8Values::place_of_sum(i);
}

template <typename S>
void sum_values(const Call<bfloat16, S>& c, int64_t first, int64_t last, const Rows<S>& values, int64_t count,
                const float* weights, float* sums) {
    const int64_t stored = stored_size<S>(c.value_dim), width = partial_size(c.value_dim);
    for (int64_t token = 0; token < count; token += LANES)
        for (int64_t head = 0; head < last - first; ++head) {
            prefetch(values.of + token + LANES, head * stored, stored);
            const int64_t row = head * c.group();
            Values<S>::add(values.of + token, std::min(LANES, count - token), head * stored, c.value_dim,
                           weights + row * SPAN + token, c.group(), sums + row * width, width);
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

}  // namespace

template <typename T, typename S>
void attend_decode(const Call<T, S>& c, int64_t threads) {
    const Spans spans = divide_into_spans({c.tables, c.starts, c.offsets, c.lengths, c.block_tokens, c.table_width}, c.requests,
                                          c.heads * partial_size(c.value_dim));
    with_team(threads, [&](Team& team) { attend_decode(team, c, spans); });
}

template void attend_decode(const Call<float, float>&, int64_t);
template void attend_decode(const Call<bfloat16, bfloat16>&, int64_t);
template void attend_decode(const Call<_Float16, _Float16>&, int64_t);
template void attend_decode(const Call<bfloat16, int8_t>&, int64_t);

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
