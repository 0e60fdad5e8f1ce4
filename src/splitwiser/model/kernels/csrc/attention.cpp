// Attention over the paged KV pool on a CPU. A request's new tokens are its last ones; each sees its request's tokens from a
// first position up to its own. Work is divided among the threads of PyTorch's own OpenMP library, so torch.set_num_threads
// applies here too.

#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "functions.h"

// Returns whether attention() supports requests with several new tokens, in tiles or not. dtype is the pool's: 0 float32, 1
// bfloat16, 2 float16, 3 int8.
extern "C" int attention_supports_prefill(int64_t dtype, int64_t key_dim, int64_t value_dim) {
    return HAS_BF16_DOT && (dtype == 1 || dtype == 3) && key_dim % 2 == 0 && value_dim % 16 == 0;
}

// Attention of each request's new tokens over the pool, whose dtype is that of query and output; with int8, these are bfloat16.
// The tokens of query (tokens, heads, key_dim) are query_stride numbers apart; output (tokens, heads, value_dim) is contiguous;
// keys and values are one layer of the pool. Tokens offsets[i] to offsets[i + 1] - 1 are the last of request i's lengths[i]
// tokens, which lie in the blocks of its row of tables (requests, table_width); each token sees positions from starts[token] up
// to its own. sinks (heads) and bias (heads, bias_entries) may be null; a bias is chosen by the distance from key to query, or by
// the key's position if bias_by_position. Each request has one new token unless attention_supports_prefill(). in_tiles: prefill
// uses tiles if it may.
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
