// The parts of a layer that a team of threads computes together; each is described where it is defined.

#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "team.h"

extern "C" {

struct Linear;

// A norm of rows by their root mean square or, if centred, by their mean and standard deviation; fused.py's _NormStruct. The
// weight has offset added to it; bias may be null.
struct Norm {
    const void *weight, *bias;
    float offset, epsilon;
    int64_t centred;
};

}  // extern "C"

// The sizes of a row of queries, keys and values: `heads` query heads, kv_heads key heads and as many value heads.
struct Heads {
    int64_t heads, kv_heads, head_dim;
};

// A row's angles, and how much of each head they rotate; see rotate_heads().
struct Angles {
    const void *cosines, *sines;
    int64_t in_float32, rotary, count;
};

// The slots of the pool that hold each request's tokens; see attention().
struct Places {
    const int64_t *tables, *starts, *offsets, *lengths;
    int64_t block_tokens, table_width;
};

// How a decode step's contexts are divided: `first` has the number of each request's first span, and of all spans; `partials`
// is room for what heads make of them.
struct Spans {
    const int64_t* first;
    float* partials;
};

// The numbers that a head's sums take, of which 64 are added up at a time, and those of its partial.
constexpr int64_t padded_sums(int64_t value_dim) { return (value_dim + 63) / 64 * 64; }
constexpr int64_t partial_size(int64_t value_dim) { return padded_sums(value_dim) + 16; }

// Where the inputs of an int8 product lie as integers, (rows, padded_inputs), and their scales, (rows).
struct Quantised {
    uint8_t* numbers;
    float* scales;
};

void norm(Team& team, const Norm& norm, const bfloat16* x, bfloat16* y, int64_t rows, int64_t width);
void gate(Team& team, const bfloat16* x, bfloat16* y, float linear, float cubic, int64_t rows, int64_t width);
void rotate(Team& team, const Heads& heads, const Angles& angles, const Norm& query, const Norm& key, bfloat16* joint,
            int64_t rows, int64_t width);
// Returns the spans of a decode step, in memory of the calling thread, with room for partial_numbers numbers for each.
Spans divide_into_spans(const Places& places, int64_t requests, int64_t partial_numbers);
void decode_attention(Team& team, const Heads& heads, const Places& places, const Spans& spans, const bfloat16* query,
                      int64_t query_stride, const void* keys, const void* values, bool int8, float scaling, float softcap,
                      bfloat16* output, int64_t requests);
void multiply_int8(Team& team, const Linear& linear, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows,
                   const Quantised& quantised);
