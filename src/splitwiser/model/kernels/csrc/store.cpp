// The writing of keys and values into the KV pool.

#include <cstdint>
#include <cstring>

#include "functions.h"
#include "pool.h"

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
