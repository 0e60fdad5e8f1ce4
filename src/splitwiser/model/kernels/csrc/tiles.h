// AMX: matrices of 16 rows of 64 bytes (tiles), which one instruction multiplies. A tile of weights has, for each of 16 groups
// of inputs (two of bfloat16, or four of int8), the group's weights for 16 outputs.

#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

constexpr int64_t TILE_ROWS = 16, TILE_ROW_BYTES = 64;

// Returns the number of rows of the tiles that hold so many.
inline int64_t in_whole_tiles(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

#if HAS_AMX

#include <immintrin.h>

namespace {

// Configures this thread's eight tiles, all as large as they can be, while the object lives.
class Tiles {
  public:
    Tiles() {
        struct {
            uint8_t palette = 1, first_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;  // in the processor's format
        for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = TILE_ROW_BYTES, shapes.rows[tile] = TILE_ROWS;
        asm volatile("ldtilecfg (%0)" : : "r"(&shapes) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease" : : : "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// The instructions, with which the compiler's own functions cannot be given a template's numbers.
template <int TILE>
inline void load_tile(const char* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void store_tile(char* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// Pairs of bfloat16, with sums in float32.
struct Bfloat16Tiles {
    template <int SUM, int X, int WEIGHT>
    static void add() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHT));
    }
};

// Unsigned bytes by signed ones, with sums in int32.
struct Int8Tiles {
    template <int SUM, int X, int WEIGHT>
    static void add() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(WEIGHT));
    }
};

// Fetches a tile that is needed soon, since its rows may lie where the processor's own prefetcher does not foresee them.
inline void prefetch_tile(const char* from, int64_t stride) {
    for (int64_t row = 0; row < TILE_ROWS; ++row) _mm_prefetch(from + row * stride, _MM_HINT_T0);
}

// Where the weights of 32 outputs lie: the first row of each half's first tile, and the distance of rows, in bytes.
struct TileColumns {
    const char* halves[2];
    int64_t stride;
};

// Multiplies 16 * ROWS rows of x, `steps` times 64 bytes wide, with the weights of 16 * COLUMNS outputs; the products are
// stored in sums, or added to them if `onto`. Strides are in bytes. Tiles 0 to 3 hold sums, 4 and 5 x, 6 and 7 weights. Weights
// that are `far`, in memory, are fetched ahead.
template <typename Numbers, int ROWS, int COLUMNS>
inline void multiply_tiles(const void* x, int64_t x_stride, const TileColumns& weights, int64_t steps, void* sums,
                           int64_t sums_stride, bool onto, bool far) {
    static_assert(1 <= ROWS && ROWS <= 2 && 1 <= COLUMNS && COLUMNS <= 2);
    constexpr int64_t AHEAD = 4;  // steps
    const char* row = static_cast<const char*>(x);
    char* sum = static_cast<char*>(sums);
    char* lower = sum + TILE_ROWS * sums_stride;
    if (onto) {
        load_tile<0>(sum, sums_stride);
        if constexpr (COLUMNS == 2) load_tile<1>(sum + TILE_ROW_BYTES, sums_stride);
        if constexpr (ROWS == 2) load_tile<2>(lower, sums_stride);
        if constexpr (ROWS == 2 && COLUMNS == 2) load_tile<3>(lower + TILE_ROW_BYTES, sums_stride);
    } else {
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
    }
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t at = step * TILE_ROWS * weights.stride;
        if (far)
            for (int half = 0; half < COLUMNS; ++half)
                prefetch_tile(weights.halves[half] + at + AHEAD * TILE_ROWS * weights.stride, weights.stride);
        load_tile<4>(row + step * TILE_ROW_BYTES, x_stride);
        load_tile<6>(weights.halves[0] + at, weights.stride);
        Numbers::template add<0, 4, 6>();
        if constexpr (COLUMNS == 2) load_tile<7>(weights.halves[1] + at, weights.stride);
        if constexpr (COLUMNS == 2) Numbers::template add<1, 4, 7>();
        if constexpr (ROWS == 2) load_tile<5>(row + TILE_ROWS * x_stride + step * TILE_ROW_BYTES, x_stride);
        if constexpr (ROWS == 2) Numbers::template add<2, 5, 6>();
        if constexpr (ROWS == 2 && COLUMNS == 2) Numbers::template add<3, 5, 7>();
    }
    store_tile<0>(sum, sums_stride);
    if constexpr (COLUMNS == 2) store_tile<1>(sum + TILE_ROW_BYTES, sums_stride);
    if constexpr (ROWS == 2) store_tile<2>(lower, sums_stride);
    if constexpr (ROWS == 2 && COLUMNS == 2) store_tile<3>(lower + TILE_ROW_BYTES, sums_stride);
}

// Multiplies all rows of x, x_stride bytes each, with the weights of `outputs` outputs. x has whole tiles, of which the rows
// past the last may hold anything. columns(output) says where the weights of 32 outputs lie, and finish(row, output, sums)
// takes the sums of a row for 16 of them.
template <typename Numbers, typename Sum, typename Columns, typename Finish>
void multiply_in_tiles(Team& team, const void* x, int64_t x_stride, int64_t rows, int64_t outputs, const Columns& columns,
                       const Finish& finish) {
    constexpr int64_t BLOCK_ROWS = 2 * TILE_ROWS, BLOCK_OUTPUTS = 32, NEAR_BYTES = 512 << 10;  // within a core's own cache
    const int64_t blocks = (outputs + BLOCK_OUTPUTS - 1) / BLOCK_OUTPUTS, steps = x_stride / TILE_ROW_BYTES;
    const int64_t group = std::max<int64_t>(1, NEAR_BYTES / x_stride / BLOCK_ROWS) * BLOCK_ROWS;
    const int64_t groups = (rows + group - 1) / group;
    const Tiles tiles;
    alignas(TILE_ROW_BYTES) Sum sums[BLOCK_ROWS][BLOCK_OUTPUTS];
    team.each(groups * blocks, [&](int64_t begin, int64_t last) {
        for (int64_t task = begin; task < last; ++task) {
            const int64_t output = task % blocks * BLOCK_OUTPUTS, start = task / blocks * group;
            const int64_t end = std::min(rows, start + group);
            const TileColumns weights = columns(output);
            for (int64_t first = start; first < end; first += BLOCK_ROWS) {
                const char* from = static_cast<const char*>(x) + first * x_stride;
                const int64_t count = std::min(BLOCK_ROWS, end - first);
                const bool far = first == start;
                if (count > TILE_ROWS)
                    multiply_tiles<Numbers, 2, 2>(from, x_stride, weights, steps, sums, sizeof *sums, false, far);
                else
                    multiply_tiles<Numbers, 1, 2>(from, x_stride, weights, steps, sums, sizeof *sums, false, far);
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < BLOCK_OUTPUTS && output + j < outputs; j += 16)
                        finish(first + r, output + j, sums[r] + j);
            }
        }
    });
}

}  // namespace

#endif
