// Products of small batches, and whole decoder layers for one in a single call: with a few rows so little is computed that the
// time is that of reading the weights and of the calls themselves.
//
// Weights are int8 (int8.cpp), or bfloat16 in the layout that oneDNN has for its dot products: panels of outputs (64 for AVX-512,
// 32 for AMX); in a panel, for each pair of inputs, the pair's weights for all outputs of the panel. Outputs are padded to whole
// panels, and inputs as far as oneDNN chooses. Python shows that a weight has this layout before it passes it here.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "compressed.h"
#include "functions.h"
#include "linear.h"
#include "parts.h"
#include "tiles.h"

#if HAS_AVX512 && defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif
extern "C" {

// A decoder layer, fused.py's _LayerStruct. If gated, `up` gives the gate and what it is multiplied by; otherwise what `down`
// takes.
struct Layer {
    Linear qkv, o, up, down;
    Norm input, post, query, key;  // query and key have no weights if heads are not normalised
    float linear, cubic, scaling, softcap;
    int64_t gated, heads, kv_heads, head_dim, half_angles;  // half_angles: both halves of a head are rotated by the same angles
};

// What follows the layers of a model, fused.py's _HeadStruct.
struct Head {
    Norm norm;
    Linear linear;
};

// A decode step, fused.py's _StepStruct; one token per request. keys and values hold the pool's of each layer. Without cosines
// nothing is rotated.
struct Step {
    const void *cosines, *sines;
    void *const *keys, *const *values;
    const int64_t *slots, *tables, *starts, *offsets, *lengths;
    int64_t rows, block_tokens, table_width, int8_pool, angles, angles_in_float32, threads;
};

}  // extern "C"

namespace {

#if HAS_BF16_DOT

constexpr int64_t MAX_ROWS = 128;  // as many as took less time than with oneDNN

// A block of outputs: where each part's weights of the first pair lie, and the distance from one pair's to the next.
struct OutputBlock {
    void read(int64_t pair, __m512i (&weights)[PARTS]) const {
        for (int j = 0; j < PARTS; ++j) weights[j] = _mm512_loadu_si512(parts[j] + pair * step);
    }

    const uint32_t* parts[PARTS];
    int64_t step;
};

// Returns where the weights of 16 outputs from `output` on lie, in whichever panel; past the last panel, those of its end.
const uint32_t* weights_from(const Linear& p, int64_t output) {
    output = std::min(output, (p.outputs - 1) / LANES * LANES);
    return static_cast<const uint32_t*>(p.packed) + output / p.panel * p.padded_inputs / 2 * p.panel + output % p.panel;
}

OutputBlock block_of(const Linear& p, int64_t first) {
    OutputBlock block;
    block.step = p.panel;
    for (int64_t j = 0; j < PARTS; ++j) block.parts[j] = weights_from(p, first + j * LANES);
    return block;
}

// Fetches weights that are multiplied next from memory into the L2 cache, a share at a time, while others are multiplied.
class Prefetch {
  public:
    static constexpr int64_t PAIRS = 32;  // that are multiplied after each share

    // `bytes` from `weights` on, which are all fetched when `pairs` pairs have been multiplied `blocks` times.
    Prefetch(const void* weights, int64_t bytes, int64_t blocks, int64_t pairs)
        : at_(static_cast<const char*>(weights)), end_(at_ + bytes) {
        const int64_t shares = blocks * ((pairs + PAIRS - 1) / PAIRS), lines = (bytes + LINE - 1) / LINE;
        share_ = (lines + shares - 1) / shares * LINE;
    }

    void next_share() {
        for (const char* end = std::min(end_, at_ + share_); at_ < end; at_ += LINE) _mm_prefetch(at_, _MM_HINT_T1);
    }

  private:
    static constexpr int64_t LINE = 64;

    const char *at_, *end_;
    int64_t share_;
};

template <int COUNT, typename Weights>
void multiply_block(const bfloat16* x, int64_t stride, Weights block, int64_t pairs, Prefetch& prefetch, float (*sums)[BLOCK]) {
    __m512 sum[COUNT][PARTS];
    for (auto& row : sum)
        for (auto& part : row) part = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs;) {
        prefetch.next_share();
        for (const int64_t end = std::min(pairs, pair + Prefetch::PAIRS); pair < end; ++pair) {
            __m512i weights[PARTS];
            block.read(pair, weights);
            for (int r = 0; r < COUNT; ++r) {
                int32_t both;
                std::memcpy(&both, x + r * stride + 2 * pair, sizeof both);
                for (int j = 0; j < PARTS; ++j)
                    sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)_mm512_set1_epi32(both), (__m512bh)weights[j]);
            }
        }
    }
    for (int r = 0; r < COUNT; ++r)
        for (int j = 0; j < PARTS; ++j) _mm512_storeu_ps(sums[r] + j * LANES, sum[r][j]);
}

template <typename Weights>
void multiply_block_dot(const bfloat16* x, int64_t stride, const Weights& block, int64_t rows, int64_t pairs,
                        Prefetch& prefetch, float (*sums)[BLOCK]) {
    switch (rows) {
        case 1: return multiply_block<1>(x, stride, block, pairs, prefetch, sums);
        case 2: return multiply_block<2>(x, stride, block, pairs, prefetch, sums);
        case 3: return multiply_block<3>(x, stride, block, pairs, prefetch, sums);
        case 4: return multiply_block<4>(x, stride, block, pairs, prefetch, sums);
        case 5: return multiply_block<5>(x, stride, block, pairs, prefetch, sums);
        default: return multiply_block<ROWS>(x, stride, block, pairs, prefetch, sums);
    }
}

// Calls f with what reads the weights of 64 outputs from `output` on. Compressed ones are widened when a thread reads them for
// its `first` block of rows and, if there are `more` blocks, kept for these.
template <typename F>
void with_weights(const Linear& p, int64_t output, bool first, bool more, F f) {
#if HAS_COMPRESSED
    if (p.compressed) {
        const int64_t panels = (p.outputs + BLOCK - 1) / BLOCK, pairs = p.padded_inputs / 2;
        thread_local std::vector<PlainGroup> widened;
        if (more) widened.resize(pairs);
        if (!first) {
            const auto* from = reinterpret_cast<const uint32_t*>(widened.data());
            return f(OutputBlock{{from, from + LANES, from + 2 * LANES, from + 3 * LANES}, BLOCK});
        }
        const CompressedPanel panel(p.packed, panels, pairs, output / BLOCK);
        return more ? f(Widening{panel, widened.data()}) : f(panel);
    }
#endif
    f(block_of(p, output));
}

// Returns what a thread that multiplies `blocks` blocks of rows fetches meanwhile: the weights of the next 64 outputs, from
// `output` on, if they are compressed. Their first block has to widen them, and would wait for memory besides, which would be
// idle during all others. Plain weights are read as fast without.
Prefetch prefetch_of(const Linear& p, int64_t output, int64_t blocks) {
    const int64_t pairs = p.padded_inputs / 2;
#if HAS_COMPRESSED
    if (p.compressed && blocks > 1 && output < p.outputs) {
        const CompressedPanel panel(p.packed, (p.outputs + BLOCK - 1) / BLOCK, pairs, output / BLOCK);
        return {panel.groups(), pairs * GROUP_BYTES, blocks, pairs};
    }
#endif
    return {nullptr, 0, blocks, pairs};
}

void multiply_by_dots(Team& team, const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows) {
    const int64_t blocks = (p.outputs + BLOCK - 1) / BLOCK, pairs = p.inputs / 2;
    const int64_t group = rows_of_task(rows, blocks, team.threads()), groups = (rows + group - 1) / group;
    team.each(groups * blocks, [&](int64_t begin, int64_t last) {
        for (int64_t task = begin; task < last; ++task) {
            const int64_t output = task % blocks * BLOCK, start = task / blocks * group, end = std::min(rows, start + group);
            Prefetch prefetch = prefetch_of(p, output + BLOCK, (end - start + ROWS - 1) / ROWS);
            for (int64_t first = start; first < end; first += ROWS) {
                float sums[ROWS][BLOCK];
                const int64_t count = std::min(ROWS, end - first);
                with_weights(p, output, first == start, end - start > ROWS, [&](const auto& weights) {
                    multiply_block_dot(x + first * p.inputs, p.inputs, weights, count, pairs, prefetch, sums);
                });
                for (int64_t r = 0; r < count; ++r)
                    for (int64_t j = 0; j < BLOCK && output + j < p.outputs; j += LANES)
                        finish(p, _mm512_loadu_ps(sums[r] + j), residual, y, (first + r) * p.outputs, output + j);
            }
        }
    });
}

bool uses_tiles(const Linear& p, int64_t rows) {
    constexpr int64_t TILE_INPUTS = TILE_ROW_BYTES / sizeof(bfloat16);
    return rows > p.dot_rows && !p.scales && p.inputs % TILE_INPUTS == 0 && may_use_tiles();
}

#if HAS_AMX

void multiply_in_tiles(Team& team, const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows) {
    const auto columns = [&](int64_t output) {
        const auto at = [&](int64_t first) { return reinterpret_cast<const char*>(weights_from(p, first)); };
        return TileColumns{{at(output), at(output + LANES)}, p.panel * static_cast<int64_t>(sizeof(uint32_t))};
    };
    multiply_in_tiles<Bfloat16Tiles, float>(
        team, x, p.inputs * sizeof *x, rows, p.outputs, columns, [&](int64_t row, int64_t output, const float* sums) {
            finish(p, _mm512_load_ps(sums), residual, y, row * p.outputs, output);
        });
}

#endif

// Has each thread fetch the first weights of its share of p while it waits for others.
void fetch_while_waiting(Team& team, const Linear& p) {
    constexpr int64_t BYTES = 128 << 10;  // at most; 64, 256 and 512 KiB were no better
    const int64_t blocks = (p.outputs + BLOCK - 1) / BLOCK, first = team.first_of(blocks);
    int64_t bytes = BLOCK * p.padded_inputs * (p.scales ? 1 : sizeof(bfloat16));  // of the weights of a block
    const char* weights = static_cast<const char*>(p.packed) + first * bytes;
#if HAS_COMPRESSED
    if (p.compressed) {
        const int64_t pairs = p.padded_inputs / 2;
        weights = static_cast<const char*>(CompressedPanel(p.packed, blocks, pairs, first).groups());
        bytes = pairs * GROUP_BYTES;
    }
#endif
    team.fetch_while_waiting(weights, std::min(BYTES, bytes * (blocks - first)));
}

// y = x W^T + bias + residual, or with relu max(0, x W^T + bias); x is (rows, inputs), with room for whole tiles if it
// uses_tiles(), and y and residual are (rows, outputs). residual may be null or y. quantised is for int8 weights. `next` is what
// is multiplied by next, or null.
void multiply(Team& team, const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows,
              const Quantised& quantised, const Linear* next) {
    if (next) fetch_while_waiting(team, *next);
    if (p.scales) return multiply_int8(team, p, x, residual, y, rows, quantised);
#if HAS_AMX
    if (uses_tiles(p, rows)) return multiply_in_tiles(team, p, x, residual, y, rows);
#endif
    multiply_by_dots(team, p, x, residual, y, rows);
}

// Returns x (rows, inputs) with room for whole tiles: itself, or a copy in memory of the calling thread.
const bfloat16* with_room(const bfloat16* x, int64_t rows, int64_t inputs) {
    if (in_whole_tiles(rows) == rows) return x;
    thread_local std::vector<bfloat16> copy;
    copy.resize(in_whole_tiles(rows) * inputs);
    std::copy_n(x, rows * inputs, copy.data());
    return copy.data();
}

// Where a layer's parts leave what the next ones take.
struct Workspace {
    bfloat16 *normed, *joint, *attended, *up, *gated;
    Quantised quantised;

    // Returns places for all of `layers` and the head, which may be null, in memory of the calling thread.
    static Workspace of(const Layer* layers, int64_t count, const Head* head, int64_t rows) {
        int64_t width = 0, joint = 0, own = 0, up = 0, inner = 0, inputs = head ? head->linear.padded_inputs : 0;
        for (const Layer* l = layers; l < layers + count; ++l) {
            width = std::max(width, l->qkv.inputs), joint = std::max(joint, l->qkv.outputs), own = std::max(own, l->o.inputs);
            up = std::max(up, l->up.outputs), inner = std::max(inner, l->down.inputs);
            for (const Linear* p : {&l->qkv, &l->o, &l->up, &l->down}) inputs = std::max(inputs, p->padded_inputs);
        }
        thread_local std::vector<bfloat16> numbers;
        thread_local std::vector<uint8_t> integers;
        thread_local std::vector<float> scales;
        numbers.resize(in_whole_tiles(rows) * (width + joint + own + up + inner));
        integers.resize(in_whole_tiles(rows) * inputs);
        scales.resize(rows);
        bfloat16* at = numbers.data();
        const auto take = [&](int64_t size) { return std::exchange(at, at + in_whole_tiles(rows) * size); };
        return {take(width), take(joint), take(own), take(up), take(inner), {integers.data(), scales.data()}};
    }
};

Angles angles_of(const Layer& l, const void* cosines, const void* sines, int64_t count, int64_t in_float32) {
    return {cosines, sines, in_float32, l.half_angles ? 2 * count : count, count};
}

// joint = the queries, keys and values of each row of x, rotated if there are angles.
void project(Team& team, const Layer& l, const Angles& angles, const bfloat16* x, bfloat16* joint, int64_t rows,
             const Workspace& w) {
    norm(team, l.input, x, w.normed, rows, l.qkv.inputs);
    multiply(team, l.qkv, w.normed, nullptr, joint, rows, w.quantised, &l.o);
    if (angles.cosines) rotate(team, {l.heads, l.kv_heads, l.head_dim}, angles, l.query, l.key, joint, rows, l.qkv.outputs);
}

// y = the layer's output for rows of which `attended` is that of its attention, with room for whole tiles if l.o uses_tiles().
void complete(Team& team, const Layer& l, const bfloat16* attended, const bfloat16* residual, bfloat16* y, int64_t rows,
              const Workspace& w, const Linear* next) {
    multiply(team, l.o, attended, residual, y, rows, w.quantised, &l.up);
    norm(team, l.post, y, w.normed, rows, l.up.inputs);
    multiply(team, l.up, w.normed, nullptr, w.up, rows, w.quantised, &l.down);
    if (l.gated) gate(team, w.up, w.gated, l.linear, l.cubic, rows, l.down.inputs);
    multiply(team, l.down, l.gated ? w.gated : w.up, y, y, rows, w.quantised, next);
}

// Calls f(team, workspace, first, count) for all rows of a layer: for chunks of them, each on a thread of its own, so that what
// an operation leaves for the next one stays in that core's cache; or, if these are too few, for all at once.
template <typename F>
void each_chunk(const Layer& l, int64_t rows, int64_t threads, F f) {
    constexpr int64_t CHUNK = 192, UNIT = HAS_AMX ? 2 * TILE_ROWS : ROWS;  // rows
    const int64_t wanted = (rows + CHUNK - 1) / CHUNK, chunks = (wanted + threads - 1) / threads * threads;
    if (wanted < threads) {
        const Workspace w = Workspace::of(&l, 1, nullptr, rows);
        return with_team(threads, [&](Team& team) { f(team, w, 0, rows); });
    }
    const int64_t size = ((rows + chunks - 1) / chunks + UNIT - 1) / UNIT * UNIT;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += size) {
        const int64_t count = std::min(size, rows - first);
        with_team(1, [&](Team& alone) { f(alone, Workspace::of(&l, 1, nullptr, count), first, count); });
    }
}

Places places_of(const Step& s) { return {s.tables, s.starts, s.offsets, s.lengths, s.block_tokens, s.table_width}; }

// to = layer(from), of which `number` is the number in the step; `next` is multiply()'s.
void run_layer(Team& team, const Layer& l, const Step& s, const Spans& spans, int64_t number, const Workspace& w,
               const bfloat16* from, bfloat16* to, const Linear* next) {
    const int64_t joint_width = l.qkv.outputs, kv_width = l.kv_heads * l.head_dim;
    project(team, l, angles_of(l, s.cosines, s.sines, s.angles, s.angles_in_float32), from, w.joint, s.rows, w);
    team.each(s.rows, [&](int64_t first, int64_t end) {
        const bfloat16* keys = w.joint + first * joint_width + l.heads * l.head_dim;
        const int64_t stride = joint_width * sizeof *keys, bytes = kv_width * sizeof *keys;
        if (s.int8_pool)
            return store_int8(1, keys, keys + kv_width, s.slots + first, static_cast<int8_t*>(s.keys[number]),
                              static_cast<int8_t*>(s.values[number]), end - first, joint_width, joint_width, l.kv_heads,
                              l.head_dim, l.head_dim, 1);
        store(reinterpret_cast<const char*>(keys), reinterpret_cast<const char*>(keys + kv_width), s.slots + first,
              static_cast<char*>(s.keys[number]), static_cast<char*>(s.values[number]), end - first, stride, stride, bytes,
              bytes, 1);
    });
    decode_attention(team, {l.heads, l.kv_heads, l.head_dim}, places_of(s), spans, w.joint, joint_width, s.keys[number],
                     s.values[number], s.int8_pool, l.scaling, l.softcap, w.attended, s.rows);
    complete(team, l, w.attended, from, to, s.rows, w, next);
}

#endif

}  // namespace

// Returns the largest number of rows that the functions below are for; 0 if this processor has no bfloat16 dot products.
extern "C" int max_small_rows() {
#if HAS_BF16_DOT
    return MAX_ROWS;
#else
    return 0;
#endif
}

#if HAS_BF16_DOT

extern "C" void multiply_small_batch(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows,
                                     int64_t threads) {
    const auto* from = static_cast<const bfloat16*>(x);
    if (uses_tiles(*linear, rows)) from = with_room(from, rows, linear->inputs);
    with_team(threads, [&](Team& team) {
        multiply(team, *linear, from, static_cast<const bfloat16*>(residual), static_cast<bfloat16*>(y), rows, {}, nullptr);
    });
}

// Runs `count` layers in a decode step of a small batch, each on the output of the one before and the first on x, (rows,
// width). Without a head y is (count, rows, width), the output of each; with one it is (rows, width), the output of the last, and
// logits, (rows, outputs of the head), are the head's of the norm of that.
extern "C" void layers_small_batch(const Layer* layers, int64_t count, const Step* step, const void* x, void* y,
                                   const Head* head, void* logits) {
    const Workspace workspace = Workspace::of(layers, count, head, step->rows);
    int64_t partial_numbers = 0;
    for (const Layer* l = layers; l < layers + count; ++l)
        partial_numbers = std::max(partial_numbers, l->heads * partial_size(l->head_dim));
    const Spans spans = divide_into_spans(places_of(*step), step->rows, partial_numbers);
    const int64_t width = layers->qkv.inputs, size = head ? 0 : step->rows * width;
    with_team(step->threads, [&](Team& team) {
        const auto* from = static_cast<const bfloat16*>(x);
        auto* to = static_cast<bfloat16*>(y);
        for (int64_t i = 0; i < count; ++i, from = to, to += size) {
            const Linear* next = i + 1 < count ? &layers[i + 1].qkv : head ? &head->linear : nullptr;
            run_layer(team, layers[i], *step, spans, i, workspace, from, to, next);
        }
        if (!head) return;
        norm(team, head->norm, from, workspace.normed, step->rows, width);
        multiply(team, head->linear, workspace.normed, nullptr, static_cast<bfloat16*>(logits), step->rows, workspace.quantised,
                 nullptr);
    });
}

// The parts of a layer before and after its attention, for any number of rows. x, residual and y are (rows, width); joint holds a
// row's queries, keys and values; cosines and sines, which may be null, are (rows, angles).
extern "C" void project_rows(const Layer* layer, const void* x, const void* cosines, const void* sines, int64_t angles,
                             int64_t angles_in_float32, void* joint, int64_t rows, int64_t threads) {
    const int64_t angles_size = angles * (angles_in_float32 ? sizeof(float) : sizeof(bfloat16));
    each_chunk(*layer, rows, threads, [&](Team& team, const Workspace& w, int64_t first, int64_t count) {
        const auto of_chunk = [&](const void* all) { return all ? static_cast<const char*>(all) + first * angles_size : nullptr; };
        project(team, *layer, angles_of(*layer, of_chunk(cosines), of_chunk(sines), angles, angles_in_float32),
                static_cast<const bfloat16*>(x) + first * layer->qkv.inputs,
                static_cast<bfloat16*>(joint) + first * layer->qkv.outputs, count, w);
    });
}

extern "C" void complete_rows(const Layer* layer, const void* attended, const void* residual, void* y, int64_t rows,
                              int64_t threads) {
    each_chunk(*layer, rows, threads, [&](Team& team, const Workspace& w, int64_t first, int64_t count) {
        const auto* own = static_cast<const bfloat16*>(attended) + first * layer->o.inputs;
        if (uses_tiles(layer->o, count)) own = with_room(own, count, layer->o.inputs);
        complete(team, *layer, own, static_cast<const bfloat16*>(residual) + first * layer->o.outputs,
                 static_cast<bfloat16*>(y) + first * layer->o.outputs, count, w, nullptr);
    });
}

#endif
