// The operations between a transformer's matrix products, in one pass each over bfloat16 on a CPU; all sums are in float32.
//
// Rows are divided among the OpenMP threads of PyTorch's own OpenMP library if there is enough work for them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "functions.h"
#include "parts.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // numbers; waking the threads takes as long as computing some ten thousand

inline void normalise(const Norm& norm, const bfloat16* x, bfloat16* y, int64_t width) {
    const auto *weight = static_cast<const bfloat16*>(norm.weight), *bias = static_cast<const bfloat16*>(norm.bias);
    float mean = 0.0f, squares = 0.0f;
    if (norm.centred) {
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < width; ++i) mean += to_float(x[i]);
        mean /= static_cast<float>(width);
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(width) + norm.epsilon), offset = norm.offset;
    if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
            y[i] = to_bfloat16((to_float(x[i]) - mean) * factor * (to_float(weight[i]) + offset) + to_float(bias[i]));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = to_bfloat16((to_float(x[i]) - mean) * factor * (to_float(weight[i]) + offset));
    }
}

// Returns e^x within a few units in the last place (a polynomial of the Cephes library), in a form that vectorises.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float shift = 12582912.0f;  // adding and subtracting it rounds to an integer
    const float integer = (x * 1.44269504f + shift) - shift;
    const float rest = x - integer * 0.693359375f + integer * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(integer) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

template <typename T>
void rotate_rows(const Heads& h, const Angles& angles, const Norm& query, const Norm& key, bfloat16* joint, int64_t first,
                 int64_t end, int64_t width) {
    const int64_t count = angles.count, half = angles.rotary / 2, second = count == angles.rotary ? half : 0;
    thread_local std::vector<float> memory;
    memory.resize(2 * count + h.head_dim);
    float *cosine = memory.data(), *sine = cosine + count, *x = sine + count;
    for (int64_t row = first; row < end; ++row) {
        for (int64_t i = 0; i < count; ++i) cosine[i] = to_float(static_cast<const T*>(angles.cosines)[row * count + i]);
        for (int64_t i = 0; i < count; ++i) sine[i] = to_float(static_cast<const T*>(angles.sines)[row * count + i]);
        for (int64_t head = 0; head < h.heads + h.kv_heads; ++head) {
            bfloat16* own = joint + row * width + head * h.head_dim;
            if (query.weight) normalise(head < h.heads ? query : key, own, own, h.head_dim);
            for (int64_t i = 0; i < angles.rotary; ++i) x[i] = to_float(own[i]);
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float one = x[i], other = x[i + half];
                own[i] = to_bfloat16(one * cosine[i] - other * sine[i]);
                own[i + half] = to_bfloat16(other * cosine[i + second] + one * sine[i + second]);
            }
        }
    }
}

int64_t worth(int64_t threads, int64_t numbers) { return numbers > WORTH_THREADS ? threads : 1; }

}  // namespace

void norm(Team& team, const Norm& norm, const bfloat16* x, bfloat16* y, int64_t rows, int64_t width) {
    team.each(rows, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) normalise(norm, x + row * width, y + row * width, width);
    });
}

void gate(Team& team, const bfloat16* x, bfloat16* y, float linear, float cubic, int64_t rows, int64_t width) {
    team.each(rows, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) {
            const bfloat16 *gates = x + row * 2 * width, *ups = gates + width;
            bfloat16* out = y + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                const float value = to_float(gates[i]);
                const float power = exponential(-value * (linear + cubic * value * value));
                out[i] = to_bfloat16(value / (1.0f + power) * to_float(ups[i]));
            }
        }
    });
}

void rotate(Team& team, const Heads& heads, const Angles& angles, const Norm& query, const Norm& key, bfloat16* joint,
            int64_t rows, int64_t width) {
    team.each(rows, [&](int64_t first, int64_t end) {
        if (angles.in_float32)
            rotate_rows<float>(heads, angles, query, key, joint, first, end, width);
        else
            rotate_rows<bfloat16>(heads, angles, query, key, joint, first, end, width);
    });
}

// y = x / sqrt(mean of squares + epsilon) * (weight + offset); x and y (rows, width) are contiguous.
extern "C" void rms_norm(const void* x, const void* weight, void* y, float offset, float epsilon, int64_t rows,
                         int64_t width, int64_t threads) {
    with_team(worth(threads, rows * width), [&](Team& team) {
        const Norm own{weight, nullptr, offset, epsilon, 0};
        norm(team, own, static_cast<const bfloat16*>(x), static_cast<bfloat16*>(y), rows, width);
    });
}

// y = f(gate) * up with f(x) = x / (1 + exp(-(linear * x + cubic * x^3))): (linear, cubic) is (1, 0) for SiLU and
// (1.5958, 0.0714) for GELU's approximation with tanh. A row of x holds gate and then up, each of width; y is (rows, width).
extern "C" void gate(const void* x, void* y, float linear, float cubic, int64_t rows, int64_t width, int64_t threads) {
    with_team(worth(threads, 4 * rows * width), [&](Team& team) {
        gate(team, static_cast<const bfloat16*>(x), static_cast<bfloat16*>(y), linear, cubic, rows, width);
    });
}

// Applies rotary position embeddings (Su et al., RoFormer, arXiv 2104.09864) in place: rotates the first `rotary` numbers of
// each query and key head by the row's angles; with weights, each head is first normalised as by rms_norm. A row of joint
// holds `heads` query heads, then kv_heads key heads, then the values, which are not changed. cosines and sines are (rows,
// angles), in float32 or bfloat16; angles is rotary, or half of it if both halves of a head are rotated by the same angles.
extern "C" void rotate_heads(void* joint, const void* cosines, const void* sines, int64_t angles_in_float32,
                             const void* query_weight, const void* key_weight, float offset, float epsilon, int64_t rows,
                             int64_t width, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rotary,
                             int64_t angles, int64_t threads) {
    with_team(worth(threads, rows * width), [&](Team& team) {
        const Norm query{query_weight, nullptr, offset, epsilon, 0}, key{key_weight, nullptr, offset, epsilon, 0};
        rotate(team, {heads, kv_heads, head_dim}, {cosines, sines, angles_in_float32, rotary, angles}, query, key,
               static_cast<bfloat16*>(joint), rows, width);
    });
}

// tokens[row] = the place of the largest number of the row, the first of equal ones; x is (rows, width). As integers with the sign
// of their value, the bits of numbers that are not NaN are in the order of the numbers (-0 comes before 0).
extern "C" void argmax(const void* x, int64_t* tokens, int64_t rows, int64_t width, int64_t threads) {
    const auto* from = static_cast<const int16_t*>(x);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1 && rows * width > WORTH_THREADS)
    for (int64_t row = 0; row < rows; ++row) {
        const int16_t* numbers = from + row * width;
        int16_t most = INT16_MIN;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; ++i) {
            const int16_t ordered = static_cast<int16_t>(numbers[i] ^ ((numbers[i] >> 15) & 0x7fff));
            most = std::max(most, ordered);
        }
        const auto largest = static_cast<int16_t>(most ^ ((most >> 15) & 0x7fff));
        tokens[row] = std::find(numbers, numbers + width, largest) - numbers;
    }
}
