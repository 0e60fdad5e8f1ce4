// Products of small batches, and a whole decoder layer for one in a single call: with a few rows so little is computed that the
// time is that of reading the weights and of the calls themselves.
//
// Weights are int8 (int8.cpp), or bfloat16 in the layout that oneDNN has for its dot products: panels of outputs (64 for AVX-512,
// 32 for AMX); in a panel, for each pair of inputs, the pair's weights for all outputs of the panel. Outputs are padded to whole
// panels, and inputs as far as oneDNN chooses. Python shows that a weight has this layout before it passes it here.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "bfloat16.h"
#include "functions.h"
#include "linear.h"

#if HAS_AVX512 && defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#else
#define HAS_BF16_DOT 0
#endif
#if HAS_BF16_DOT && defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_AMX 0
#endif

extern "C" {

struct Norm {
    const void* weight;
    float offset, epsilon;
};

// A decoder layer, fused.py's _LayerStruct.
struct Layer {
    Linear qkv, o, gate_up, down;
    Norm input, post, query, key;  // query and key have no weights if heads are not normalised
    float linear, cubic, scaling, softcap;
    int64_t heads, kv_heads, head_dim, half_angles;  // half_angles: both halves of a head are rotated by the same angles
};

// A decode step at one layer, fused.py's _StepStruct; one token per request.
struct Step {
    const void *cosines, *sines;
    void *keys, *values;
    const int64_t *slots, *tables, *starts, *offsets, *lengths;
    int64_t rows, block_tokens, table_width, angles, angles_in_float32, threads;
};

}  // extern "C"

namespace {

#if HAS_BF16_DOT

// Largest numbers of rows: with AVX-512 as many as took less time here than with oneDNN; with AMX those of a tile.
constexpr int64_t MAX_ROWS_DOT = 128, MAX_ROWS_AMX = 16;

// A block of outputs: where each part's weights of the first pair lie, and the distance from one pair's to the next.
struct OutputBlock {
    const uint32_t* parts[PARTS];
    int64_t step;
};

// Returns the block of outputs from `first` on, in whichever panels it lies. Parts past the last panel read its end instead.
OutputBlock block_of(const Linear& p, int64_t first) {
    OutputBlock block;
    block.step = p.panel;
    for (int64_t j = 0; j < PARTS; ++j) {
        const int64_t output = std::min(first + j * LANES, (p.outputs - 1) / LANES * LANES);
        const int64_t panel_start = output / p.panel * p.padded_inputs / 2 * p.panel;
        block.parts[j] = static_cast<const uint32_t*>(p.packed) + panel_start + output % p.panel;
    }
    return block;
}

template <int COUNT>
void multiply_block(const bfloat16* x, int64_t stride, const OutputBlock& block, int64_t pairs, float (*sums)[BLOCK]) {
    __m512 sum[COUNT][PARTS];
    for (auto& row : sum)
        for (auto& part : row) part = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair) {
        __m512bh weight[PARTS];
        for (int j = 0; j < PARTS; ++j) weight[j] = (__m512bh)_mm512_loadu_si512(block.parts[j] + pair * block.step);
        for (int r = 0; r < COUNT; ++r) {
            int32_t both;
            std::memcpy(&both, x + r * stride + 2 * pair, sizeof both);
            for (int j = 0; j < PARTS; ++j)
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)_mm512_set1_epi32(both), weight[j]);
        }
    }
    for (int r = 0; r < COUNT; ++r)
        for (int j = 0; j < PARTS; ++j) _mm512_storeu_ps(sums[r] + j * LANES, sum[r][j]);
}

void multiply_block_dot(const bfloat16* x, int64_t stride, const OutputBlock& block, int64_t rows, int64_t pairs,
                        float (*sums)[BLOCK]) {
    switch (rows) {
        case 1: return multiply_block<1>(x, stride, block, pairs, sums);
        case 2: return multiply_block<2>(x, stride, block, pairs, sums);
        case 3: return multiply_block<3>(x, stride, block, pairs, sums);
        case 4: return multiply_block<4>(x, stride, block, pairs, sums);
        case 5: return multiply_block<5>(x, stride, block, pairs, sums);
        default: return multiply_block<ROWS>(x, stride, block, pairs, sums);
    }
}

#if HAS_AMX

constexpr int64_t TILE_PAIRS = 16;

// Whether the system lets this process use AMX tiles, which a process must request.
bool may_use_amx() {
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, and the number of the tiles' processor state
    static const bool may = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    return may;
}

// Configures this thread's tiles for a product while the object lives: 0 to 3 for the sums of a block's parts, 4 and 5 for the
// inputs and the weights of 16 pairs, 6 and 7 for those of the remaining pairs.
class Tiles {
  public:
    Tiles(int64_t rows, int64_t pairs) {
        for (int sums = 0; sums < PARTS; ++sums) shape(sums, rows, LANES);
        if (pairs >= TILE_PAIRS) shape(4, rows, TILE_PAIRS), shape(5, TILE_PAIRS, LANES);
        if (const int64_t left = pairs % TILE_PAIRS) shape(6, rows, left), shape(7, left, LANES);
        asm volatile("" : : "r"(&shapes_) : "memory");  // GCC 12 does not know that the load reads all of it
        _tile_loadconfig(&shapes_);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    void shape(int tile, int64_t rows, int64_t columns) {
        shapes_.rows[tile] = static_cast<uint8_t>(rows);
        shapes_.row_bytes[tile] = static_cast<uint16_t>(columns * 4);  // a column is a float32 sum or a pair of bfloat16
    }
    struct {
        uint8_t palette = 1, first_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes_;  // in the processor's format
};

// Adds the products of as many pairs as the given tiles hold to a block's sums; tile numbers must be literals.
#define ADD_PRODUCTS(INPUTS, WEIGHTS)                          \
    do {                                                       \
        const int64_t at = pair * block.step;                  \
        _tile_loadd(INPUTS, x + 2 * pair, x_bytes);            \
        _tile_loadd(WEIGHTS, block.parts[0] + at, step_bytes); \
        _tile_dpbf16ps(0, INPUTS, WEIGHTS);                    \
        _tile_loadd(WEIGHTS, block.parts[1] + at, step_bytes); \
        _tile_dpbf16ps(1, INPUTS, WEIGHTS);                    \
        _tile_loadd(WEIGHTS, block.parts[2] + at, step_bytes); \
        _tile_dpbf16ps(2, INPUTS, WEIGHTS);                    \
        _tile_loadd(WEIGHTS, block.parts[3] + at, step_bytes); \
        _tile_dpbf16ps(3, INPUTS, WEIGHTS);                    \
    } while (false)

void multiply_block_amx(const bfloat16* x, int64_t stride, const OutputBlock& block, int64_t pairs, float (*sums)[BLOCK]) {
    const int64_t x_bytes = stride * sizeof *x, step_bytes = block.step * sizeof *block.parts[0];
    int64_t pair = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; pair + TILE_PAIRS <= pairs; pair += TILE_PAIRS) ADD_PRODUCTS(4, 5);
    if (pair < pairs) ADD_PRODUCTS(6, 7);
    _tile_stored(0, sums[0], sizeof *sums);
    _tile_stored(1, sums[0] + LANES, sizeof *sums);
    _tile_stored(2, sums[0] + 2 * LANES, sizeof *sums);
    _tile_stored(3, sums[0] + 3 * LANES, sizeof *sums);
}

#endif

// y = x W^T + bias + residual, or with relu max(0, x W^T + bias); x is (rows, inputs), y and residual (rows, outputs). residual
// may be null or y.
void multiply(const Linear& p, const bfloat16* x, const bfloat16* residual, bfloat16* y, int64_t rows, int64_t threads) {
    if (p.scales) return multiply_int8(&p, x, residual, y, rows, threads);
    const int64_t pairs = p.inputs / 2, blocks = (p.outputs + BLOCK - 1) / BLOCK;
    bool in_tiles = false;
#if HAS_AMX
    in_tiles = may_use_amx();
#endif
    const int64_t group = in_tiles ? rows : rows_of_task(rows, blocks, threads), groups = (rows + group - 1) / group;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if HAS_AMX
        std::optional<Tiles> tiles;
        if (in_tiles) tiles.emplace(rows, pairs);
#endif
#pragma omp for schedule(static) collapse(2) nowait
        for (int64_t task = 0; task < groups; ++task)
            for (int64_t number = 0; number < blocks; ++number) {
                const OutputBlock block = block_of(p, number * BLOCK);
                const int64_t end = std::min(rows, (task + 1) * group), step = in_tiles ? rows : ROWS;
                for (int64_t first = task * group; first < end; first += step) {
                    float sums[MAX_ROWS_AMX][BLOCK];
                    const int64_t count = std::min(step, end - first);
#if HAS_AMX
                    if (in_tiles)
                        multiply_block_amx(x, p.inputs, block, pairs, sums);
                    else
#endif
                        multiply_block_dot(x + first * p.inputs, p.inputs, block, count, pairs, sums);
                    for (int64_t r = 0; r < count; ++r)
                        for (int64_t j = 0; j < BLOCK && number * BLOCK + j < p.outputs; j += LANES) {
                            const __m512 sum = _mm512_loadu_ps(sums[r] + j);
                            finish(p, sum, residual, y, (first + r) * p.outputs, number * BLOCK + j);
                        }
                }
            }
    }
}

#endif

}  // namespace

// Returns the largest number of rows that the functions below support; 0 if this processor has no bfloat16 dot products.
extern "C" int max_small_rows() {
#if HAS_AMX
    if (may_use_amx()) return MAX_ROWS_AMX;
#endif
#if HAS_BF16_DOT
    return MAX_ROWS_DOT;
#else
    return 0;
#endif
}

#if HAS_BF16_DOT

extern "C" void multiply_small_batch(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows,
                                     int64_t threads) {
    multiply(*linear, static_cast<const bfloat16*>(x), static_cast<const bfloat16*>(residual), static_cast<bfloat16*>(y),
             rows, threads);
}

// y = layer(x) for a decode step of a small batch; x and y are (rows, width).
extern "C" void layer_small_batch(const Layer* layer, const Step* step, const void* x, void* y) {
    const Layer& l = *layer;
    const Step& s = *step;
    const int64_t width = l.qkv.inputs, joint_width = l.qkv.outputs, inner = l.down.inputs;
    const int64_t own_width = l.heads * l.head_dim, kv_width = l.kv_heads * l.head_dim, size = sizeof(bfloat16);
    thread_local std::vector<bfloat16> memory;
    memory.resize(s.rows * (width + joint_width + own_width + 3 * inner));
    bfloat16 *normed = memory.data(), *joint = normed + s.rows * width, *attended = joint + s.rows * joint_width;
    bfloat16 *gate_up = attended + s.rows * own_width, *gated = gate_up + s.rows * 2 * inner;
    const auto* from = static_cast<const bfloat16*>(x);
    auto* to = static_cast<bfloat16*>(y);

    rms_norm(from, l.input.weight, normed, l.input.offset, l.input.epsilon, s.rows, width, s.threads);
    multiply(l.qkv, normed, nullptr, joint, s.rows, s.threads);
    rotate_heads(joint, s.cosines, s.sines, s.angles_in_float32, l.query.weight, l.key.weight, l.query.offset,
                 l.query.epsilon, s.rows, joint_width, l.heads, l.kv_heads, l.head_dim, l.half_angles ? 2 * s.angles : s.angles,
                 s.angles, s.threads);
    const char* keys = reinterpret_cast<const char*>(joint + own_width);
    store(keys, keys + kv_width * size, s.slots, static_cast<char*>(s.keys), static_cast<char*>(s.values), s.rows,
          joint_width * size, joint_width * size, kv_width * size, kv_width * size, 1);
    attention(1, joint, s.keys, s.values, s.tables, s.starts, s.offsets, s.lengths, nullptr, nullptr, 0, 0, attended,
              joint_width, s.rows, l.heads, l.kv_heads, l.head_dim, l.head_dim, s.block_tokens, s.table_width, l.scaling,
              l.softcap, s.threads);
    multiply(l.o, attended, from, to, s.rows, s.threads);
    rms_norm(to, l.post.weight, normed, l.post.offset, l.post.epsilon, s.rows, width, s.threads);
    multiply(l.gate_up, normed, nullptr, gate_up, s.rows, s.threads);
    gate(gate_up, gated, l.linear, l.cubic, s.rows, inner, s.threads);
    multiply(l.down, gated, to, to, s.rows, s.threads);
}

#endif
