// Attention of requests with several new tokens, which is bound by arithmetic: work is divided into (request, kv head, range of
// new tokens); each piece packs its keys and values for products of bfloat16 pairs and processes them in blocks with an online
// softmax (Dao, FlashAttention-2, arXiv 2307.08691).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "tiles.h"

#if HAS_BF16_DOT

namespace {

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

}  // namespace

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

template void attend_prefill(const Call<bfloat16, bfloat16>&, bool, int64_t);
template void attend_prefill(const Call<bfloat16, int8_t>&, bool, int64_t);

#endif
