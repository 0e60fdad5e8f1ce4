// Compresses weights, and widens them for products that take them plain.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "compressed.h"
#include "functions.h"
#include "team.h"

// Returns whether this processor has the instructions for compressed weights.
extern "C" int supports_compressed() { return HAS_COMPRESSED; }

#if HAS_COMPRESSED

namespace {

// The high bytes of a panel's weights: its table, and the number of each byte in it, or ESCAPE.
struct HighBytes {
    static constexpr uint8_t ESCAPE = 0x80;

    HighBytes(const uint16_t* weights, int64_t count) {
        int64_t counts[256] = {};
        for (int64_t i = 0; i < count; ++i) ++counts[weights[i] >> 8];
        int order[256];
        std::iota(order, order + 256, 0);
        const auto more = [&](int one, int other) { return counts[one] > counts[other]; };
        std::partial_sort(order, order + HIGH_BYTES, order + 256, more);
        std::memset(numbers, ESCAPE, sizeof numbers);
        for (int i = 0; i < HIGH_BYTES; ++i) table[i] = order[i], numbers[order[i]] = i;
    }

    __m512i look_up(__m512i bytes) const {
        const auto half = [&](int first) {
            return _mm512_permutex2var_epi8(_mm512_loadu_si512(numbers + first), bytes,
                                            _mm512_loadu_si512(numbers + first + 64));
        };
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), half(0), half(128));
    }

    uint8_t table[HIGH_BYTES];
    alignas(64) uint8_t numbers[256];
};

// Compresses a group; returns whether it can be.
bool compress_group(const HighBytes& high_bytes, const uint16_t* weights, uint8_t* group) {
    __m512i numbers[2];
    for (int half = 0; half < 2; ++half) {
        const __m512i one = _mm512_loadu_si512(weights + 64 * half), other = _mm512_loadu_si512(weights + 64 * half + 32);
        const __m512i low = CompressedPanel::even_and_odd(one, _mm512_slli_epi16(other, 8));
        const __m512i high = CompressedPanel::even_and_odd(_mm512_srli_epi16(other, 8), one);
        _mm512_storeu_si512(group + 64 * (half + 1), low);
        numbers[half] = high_bytes.look_up(high);
    }
    _mm512_storeu_si512(group, _mm512_or_si512(numbers[0], _mm512_slli_epi16(numbers[1], 4)));
    return _mm512_movepi8_mask(_mm512_or_si512(numbers[0], numbers[1])) == 0;
}

}  // namespace

// Compresses weights of `panels` panels of 64 outputs and `pairs` pairs of inputs into `to`. Returns the number of bytes that
// they then take, or 0 if these would be more than `limit`.
extern "C" int64_t compress(const void* packed, int64_t panels, int64_t pairs, void* to, int64_t limit) {
    const CompressedParts parts(panels, pairs);
    auto* at = static_cast<uint8_t*>(to);
    std::vector<int32_t> firsts, escapes;
    std::vector<const uint16_t*> plain;
    if (parts.escapes > limit) return 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
        const auto* weights = static_cast<const uint16_t*>(packed) + panel * pairs * 2 * BLOCK;
        const HighBytes high_bytes(weights, pairs * 2 * BLOCK);
        std::memcpy(at + panel * HIGH_BYTES, high_bytes.table, HIGH_BYTES);
        firsts.push_back(escapes.size());
        for (int64_t pair = 0; pair < pairs; ++pair, weights += 2 * BLOCK)
            if (!compress_group(high_bytes, weights, at + parts.groups + (panel * pairs + pair) * GROUP_BYTES))
                escapes.push_back(pair), plain.push_back(weights);
        escapes.push_back(CompressedParts::END);
    }
    firsts.push_back(escapes.size());
    const int64_t begin = parts.plain(escapes.size()), size = begin + plain.size() * PLAIN_BYTES;
    if (size > limit) return 0;
    std::memcpy(at + parts.firsts, firsts.data(), firsts.size() * sizeof firsts[0]);
    std::memcpy(at + parts.escapes, escapes.data(), escapes.size() * sizeof escapes[0]);
    for (size_t i = 0; i < plain.size(); ++i) std::memcpy(at + begin + i * PLAIN_BYTES, plain[i], PLAIN_BYTES);
    return size;
}

// Writes the weights as they were to `to`.
extern "C" void widen(const void* compressed, int64_t panels, int64_t pairs, void* to, int64_t threads) {
    with_team(threads, [&](Team& team) {
        team.each(panels, [&](int64_t panel, int64_t end) {
            for (; panel < end; ++panel) {
                Widening widening{{compressed, panels, pairs, panel}, static_cast<PlainGroup*>(to) + panel * pairs};
                __m512i weights[PARTS];
                for (int64_t pair = 0; pair < pairs; ++pair) widening.read(pair, weights);
            }
        });
    });
}

#endif
