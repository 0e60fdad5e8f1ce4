// Attention of one new token a request over the block pool, on a CPU.
//
// Work is cut into (request, range of kv heads) and shared out to OpenMP threads: those of PyTorch's own OpenMP library, so
// torch.set_num_threads holds here too. Each piece streams once over its tokens' keys and once over their values; sums and
// the softmax are in float32 whatever the pool's type.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline float to_float(bfloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, _Float16& out) { out = static_cast<_Float16>(x); }
inline void from_float(float x, bfloat16& out) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Shape {
    int64_t requests, heads, kv_heads, key_dim, value_dim, block_tokens, table_width;
    float scaling, softcap;  // softcap 0: none
};

template <typename T>
void attend(const T* query, const T* keys, const T* values, const int64_t* tables, const int64_t* starts,
            const int64_t* lengths, const float* sinks, T* output, const Shape& s, int64_t heads_a_piece, int64_t request,
            int64_t first) {
    const int64_t group = s.heads / s.kv_heads;
    const int64_t last = std::min(first + heads_a_piece, s.kv_heads);
    const int64_t begin = starts[request], end = lengths[request], count = end - begin;
    const int64_t rows = (last - first) * group;
    const int64_t* table = tables + request * s.table_width;
    thread_local std::vector<float> queries, scores, sums;
    queries.resize(rows * s.key_dim);
    scores.resize(rows * count);
    sums.assign(rows * s.value_dim, 0.0f);

    const T* own = query + (request * s.heads + first * group) * s.key_dim;
    for (int64_t i = 0; i < rows * s.key_dim; ++i) queries[i] = to_float(own[i]) * s.scaling;

    for (int64_t token = 0; token < count; ++token) {
        const int64_t position = begin + token;
        const int64_t slot = table[position / s.block_tokens] * s.block_tokens + position % s.block_tokens;
        const T* key = keys + (slot * s.kv_heads + first) * s.key_dim;
        for (int64_t row = 0; row < rows; ++row) {
            const T* k = key + row / group * s.key_dim;
            const float* q = queries.data() + row * s.key_dim;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < s.key_dim; ++i) sum += q[i] * to_float(k[i]);
            scores[row * count + token] = sum;
        }
    }

    for (int64_t row = 0; row < rows; ++row) {
        float* score = scores.data() + row * count;
        if (s.softcap != 0.0f)
            for (int64_t i = 0; i < count; ++i) score[i] = s.softcap * std::tanh(score[i] / s.softcap);
        const float* sink = sinks ? sinks + first * group + row : nullptr;
        float most = sink ? *sink : score[0];
        for (int64_t i = 0; i < count; ++i) most = std::max(most, score[i]);
        float total = sink ? std::exp(*sink - most) : 0.0f;
        for (int64_t i = 0; i < count; ++i) total += score[i] = std::exp(score[i] - most);
        for (int64_t i = 0; i < count; ++i) score[i] /= total;
    }

    for (int64_t token = 0; token < count; ++token) {
        const int64_t position = begin + token;
        const int64_t slot = table[position / s.block_tokens] * s.block_tokens + position % s.block_tokens;
        const T* value = values + (slot * s.kv_heads + first) * s.value_dim;
        for (int64_t row = 0; row < rows; ++row) {
            const T* v = value + row / group * s.value_dim;
            float* sum = sums.data() + row * s.value_dim;
            const float weight = scores[row * count + token];
#pragma omp simd
            for (int64_t i = 0; i < s.value_dim; ++i) sum[i] += weight * to_float(v[i]);
        }
    }

    T* out = output + (request * s.heads + first * group) * s.value_dim;
    for (int64_t i = 0; i < rows * s.value_dim; ++i) from_float(sums[i], out[i]);
}

template <typename T>
void run(const void* query, const void* keys, const void* values, const int64_t* tables, const int64_t* starts,
         const int64_t* lengths, const float* sinks, void* output, const Shape& s, int64_t threads) {
    // whole requests stream best; with fewer requests than would keep the threads busy, their heads are cut up
    const int64_t wanted = threads == 1 ? 1 : (4 * threads + s.requests - 1) / s.requests;
    const int64_t heads_a_piece = std::max<int64_t>(1, s.kv_heads / std::min(wanted, s.kv_heads));
    const int64_t pieces = (s.kv_heads + heads_a_piece - 1) / heads_a_piece;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t piece = 0; piece < s.requests * pieces; ++piece)
        attend(static_cast<const T*>(query), static_cast<const T*>(keys), static_cast<const T*>(values), tables, starts,
               lengths, sinks, static_cast<T*>(output), s, heads_a_piece, piece / pieces, piece % pieces * heads_a_piece);
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16. query (requests, heads, key_dim) and output (requests, heads, value_dim) are
// contiguous; keys and values are one layer of the pool; a request sees its positions starts[i] to lengths[i] - 1, which
// lie in the blocks of its row of tables (requests, table_width). sinks (heads) may be null.
extern "C" void decode_attention(int64_t dtype, const void* query, const void* keys, const void* values,
                                 const int64_t* tables, const int64_t* starts, const int64_t* lengths, const float* sinks,
                                 void* output, int64_t requests, int64_t heads, int64_t kv_heads, int64_t key_dim,
                                 int64_t value_dim, int64_t block_tokens, int64_t table_width, float scaling,
                                 float softcap, int64_t threads) {
    const Shape s{requests, heads, kv_heads, key_dim, value_dim, block_tokens, table_width, scaling, softcap};
    if (dtype == 0) run<float>(query, keys, values, tables, starts, lengths, sinks, output, s, threads);
    if (dtype == 1) run<bfloat16>(query, keys, values, tables, starts, lengths, sinks, output, s, threads);
    if (dtype == 2) run<_Float16>(query, keys, values, tables, starts, lengths, sinks, output, s, threads);
}
