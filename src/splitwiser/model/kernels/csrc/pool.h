// The numbers of the KV pool: those of the model, or int8. A head's key or value is then its numbers as multiples of a scale,
// the float that follows them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bfloat16.h"

constexpr int64_t LANES = 16;  // float32 numbers that are computed side by side

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
