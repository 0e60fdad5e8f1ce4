// bfloat16 weights compressed without loss, to three quarters of their bytes. The exponents in a matrix take few values, and
// so do the high bytes of its weights, the sign and all bits of the exponent but the last: of each weight the low byte is kept
// as it is, and of the high one the 4 bits of its number in a table of 16. DFloat11 (arXiv 2504.11651) and ZipNN (arXiv
// 2411.05239) code exponents in fewer bits but of various lengths, which vector instructions cannot widen as fast as memory is
// read.
//
// The weights are layer.cpp's, in panels of 64 outputs. A group is the weights of a pair of inputs for a panel, four vectors.
// For every two of these it has one of low bytes, the first one's at even places and the second one's at odd places, and 4 bits
// of each byte of another for the high bytes, where it is the other way round: so two instructions put the two together.
// Each panel has its own table, and the groups with a weight whose high byte is not in it are kept plain besides.

#pragma once

#include "linear.h"

#if HAS_AVX512 && defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
#define HAS_COMPRESSED 1

namespace {

constexpr int64_t HIGH_BYTES = 16, GROUP_BYTES = 192, PLAIN_BYTES = 256;
constexpr int64_t AHEAD = 4096;  // bytes; took the least time of 0, 1024, 2048 and 4096

// Where the parts of a compressed matrix begin, each at a multiple of 64 bytes: tables, (panels, HIGH_BYTES); groups, (panels,
// pairs, GROUP_BYTES); firsts, (panels + 1), of each panel the number of its first entry in escapes; escapes, numbers of the
// pairs kept plain, in order, with END behind those of each panel; and the plain groups in the same order, without an END's.
struct CompressedParts {
    static constexpr int32_t END = INT32_MAX;

    CompressedParts(int64_t panels, int64_t pairs)
        : groups(aligned(panels * HIGH_BYTES)), firsts(groups + panels * pairs * GROUP_BYTES),
          escapes(aligned(firsts + (panels + 1) * sizeof(int32_t))) {}

    int64_t plain(int64_t entries) const { return aligned(escapes + entries * sizeof(int32_t)); }
    static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

    const int64_t groups, firsts, escapes;
};

// The weights of a pair of inputs for 64 outputs, as they were.
struct alignas(64) PlainGroup {
    uint8_t bytes[PLAIN_BYTES];
};

// Reads the groups of a panel, one after another.
class CompressedPanel {
  public:
    CompressedPanel(const void* weights, int64_t panels, int64_t pairs, int64_t panel) {
        const CompressedParts parts(panels, pairs);
        const auto* at = static_cast<const uint8_t*>(weights);
        const auto* firsts = reinterpret_cast<const int32_t*>(at + parts.firsts);
        table_ = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + panel * HIGH_BYTES)));
        groups_ = at + parts.groups + panel * pairs * GROUP_BYTES;
        escape_ = reinterpret_cast<const int32_t*>(at + parts.escapes) + firsts[panel];
        plain_ = at + parts.plain(firsts[panels]) + (firsts[panel] - panel) * PLAIN_BYTES;
    }

    const void* groups() const { return groups_; }

    void read(int64_t pair, __m512i (&weights)[PARTS]) {
        if (__builtin_expect(pair == *escape_, 0)) {
            for (int j = 0; j < PARTS; ++j) weights[j] = _mm512_loadu_si512(plain_ + j * 64);
            plain_ += PLAIN_BYTES, ++escape_;
            return;
        }
        const uint8_t* group = groups_ + pair * GROUP_BYTES;
        // what the processor fetches by itself is not enough where more is computed between two reads
        for (int64_t line = 0; line < GROUP_BYTES; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(group) + AHEAD + line, _MM_HINT_T0);
        const __m512i numbers = _mm512_loadu_si512(group);  // each in half a byte; the table is repeated for other bits above
        for (int half = 0; half < 2; ++half) {
            const __m512i low = _mm512_loadu_si512(group + 64 * (half + 1));
            const __m512i high = _mm512_permutexvar_epi8(half ? _mm512_srli_epi16(numbers, 4) : numbers, table_);
            weights[2 * half] = even_and_odd(low, high);
            weights[2 * half + 1] = _mm512_shldi_epi16(high, low, 8);
        }
    }

    // Returns the bytes of one vector at even places and those of another at odd ones.
    static __m512i even_and_odd(__m512i even, __m512i odd) { return _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd); }

  private:
    __m512i table_;
    const uint8_t *groups_, *plain_;
    const int32_t* escape_;
};

// Reads a panel and keeps it as it was before.
struct Widening {
    void read(int64_t pair, __m512i (&weights)[PARTS]) {
        panel.read(pair, weights);
        for (int j = 0; j < PARTS; ++j) _mm512_store_si512(to[pair].bytes + 64 * j, weights[j]);
    }

    CompressedPanel panel;
    PlainGroup* to;
};

}  // namespace

#else
#define HAS_COMPRESSED 0
#endif
