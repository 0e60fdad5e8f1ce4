// AMX for processors without it: in place of csrc/tiles.cpp, it emulates each tile instruction, at which such a processor
// raises SIGILL. So the machine code that runs is the one that a processor with AMX runs.
//
// Instructions do what Intel's manual says (Software Developer's Manual, volume 2: LDTILECFG to TILEZERO, TDPBF16PS, TDPBUSD),
// and end the process where they would raise a fault, with one exception: denormal numbers are not taken for zeros.

#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64;

struct Tile {
    int rows, bytes;
    uint8_t at[MAX_ROWS][MAX_BYTES];
};
thread_local Tile tiles[TILES];

[[noreturn]] void fault(const char* reason) {
    std::fprintf(stderr, "emulated AMX: %s\n", reason);
    std::abort();
}

void configure(const uint8_t* from) {
    if (from[0] != 1) fault("LDTILECFG of another palette than 1");
    for (int i = 1; i < 16; ++i)
        if (from[i]) fault("LDTILECFG with a first row or reserved bytes");
    for (int i = 0; i < 16; ++i) {
        uint16_t bytes;
        std::memcpy(&bytes, from + 16 + 2 * i, sizeof bytes);
        const uint8_t rows = from[48 + i];
        if (rows > MAX_ROWS || bytes > MAX_BYTES || !rows != !bytes || (i >= TILES && rows))
            fault("LDTILECFG of a shape that does not exist");
        if (i < TILES) tiles[i] = {rows, bytes, {}};
    }
}

Tile& used(int number) {
    if (number >= TILES || tiles[number].rows == 0) fault("a tile that is not configured");
    return tiles[number];
}

void check_product(const Tile& sum, const Tile& x, const Tile& weight) {
    if (&sum == &x || &sum == &weight || &x == &weight) fault("a product of a tile with itself");
    if (sum.rows != x.rows || x.bytes != 4 * weight.rows || sum.bytes != weight.bytes || sum.bytes % 4)
        fault("a product of tiles that do not fit");
}

float number(const uint8_t* from) {  // of a bfloat16
    const uint32_t bits = static_cast<uint32_t>(from[0] | from[1] << 8) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

void multiply_bfloat16(Tile& sum, const Tile& x, const Tile& weight) {
    for (int m = 0; m < sum.rows; ++m) {
        float products[2][MAX_BYTES / 4] = {};
        for (int k = 0; k < x.bytes / 4; ++k)
            for (int i = 0; i < 2; ++i)
                for (int n = 0; n < sum.bytes / 4; ++n)
                    products[i][n] =
                        std::fma(number(&x.at[m][4 * k + 2 * i]), number(&weight.at[k][4 * n + 2 * i]), products[i][n]);
        for (int n = 0; n < sum.bytes / 4; ++n) {
            float total;
            std::memcpy(&total, &sum.at[m][4 * n], sizeof total);
            total += products[0][n] + products[1][n];
            std::memcpy(&sum.at[m][4 * n], &total, sizeof total);
        }
    }
}

void multiply_bytes(Tile& sum, const Tile& x, const Tile& weight) {  // unsigned x, signed weights
    for (int m = 0; m < sum.rows; ++m)
        for (int k = 0; k < x.bytes / 4; ++k)
            for (int n = 0; n < sum.bytes / 4; ++n) {
                int32_t total;
                std::memcpy(&total, &sum.at[m][4 * n], sizeof total);
                for (int i = 0; i < 4; ++i) total += x.at[m][4 * k + i] * static_cast<int8_t>(weight.at[k][4 * n + i]);
                std::memcpy(&sum.at[m][4 * n], &total, sizeof total);
            }
}

// An instruction's registers, as a processor numbers them.
class Registers {
  public:
    explicit Registers(ucontext_t* context) : all_(context->uc_mcontext.gregs) {}
    int64_t at(int number) const {
        static constexpr int places[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return all_[places[number]];
    }
    const uint8_t* next() const { return reinterpret_cast<const uint8_t*>(all_[REG_RIP]); }
    void move_on(const uint8_t* to) { all_[REG_RIP] = reinterpret_cast<greg_t>(to); }

  private:
    greg_t* all_;
};

// A tile instruction: VEX's prefix, an opcode and its operands.
struct Instruction {
    int prefix, opcode, reg, rm, other;  // prefix: 0 none, 1 66, 2 F3, 3 F2
    bool in_memory;
    int64_t address, stride;
    const uint8_t* end;
};

// Reads the instruction at `code`; returns whether it is one of 0F38's with a VEX prefix of three bytes.
bool read(const Registers& registers, const uint8_t* code, Instruction& out) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return false;
    const bool more_index = !(code[1] & 0x40), more_base = !(code[1] & 0x20);
    const int mode = code[4] >> 6, rm = code[4] & 7;
    out = {code[2] & 3, code[3], code[4] >> 3 & 7, rm, ~code[2] >> 3 & 15, mode != 3, 0, 0, code + 5};
    if (!out.in_memory) return true;
    int base = rm;
    if (rm == 4) {
        const uint8_t both = *out.end++;
        base = both & 7;
        const int index = (both >> 3 & 7) + 8 * more_index;
        if (index != 4) out.stride = registers.at(index) << (both >> 6);
    }
    if (mode == 0 && base == 5) fault("an address without a base");
    out.address = registers.at(base + 8 * more_base);
    if (mode == 1) out.address += static_cast<int8_t>(*out.end++);
    if (mode == 2) {
        int32_t distance;
        std::memcpy(&distance, out.end, sizeof distance);
        out.address += distance, out.end += sizeof distance;
    }
    return true;
}

// Returns whether the instruction is one that is emulated here.
bool run(const Instruction& i) {
    auto* memory = reinterpret_cast<uint8_t*>(i.address);
    if (i.opcode == 0x49 && i.in_memory && i.prefix == 0) configure(memory + i.stride);
    else if (i.opcode == 0x49 && !i.in_memory && i.prefix == 0) std::memset(tiles, 0, sizeof tiles);  // TILERELEASE
    else if (i.opcode == 0x49 && !i.in_memory && i.prefix == 3) std::memset(used(i.reg).at, 0, sizeof tiles[0].at);  // TILEZERO
    else if (i.opcode == 0x4b && i.in_memory && i.prefix == 3) {  // TILELOADD
        Tile& tile = used(i.reg);
        for (int row = 0; row < tile.rows; ++row) std::memcpy(tile.at[row], memory + row * i.stride, tile.bytes);
    } else if (i.opcode == 0x4b && i.in_memory && i.prefix == 2) {  // TILESTORED
        const Tile& tile = used(i.reg);
        for (int row = 0; row < tile.rows; ++row) std::memcpy(memory + row * i.stride, tile.at[row], tile.bytes);
    } else if ((i.opcode == 0x5c && i.prefix == 2) || (i.opcode == 0x5e && i.prefix == 1)) {
        Tile &sum = used(i.reg), &x = used(i.rm), &weight = used(i.other);
        check_product(sum, x, weight);
        i.opcode == 0x5c ? multiply_bfloat16(sum, x, weight) : multiply_bytes(sum, x, weight);
    } else
        return false;
    return true;
}

void emulate(int, siginfo_t*, void* context) {
    Registers registers(static_cast<ucontext_t*>(context));
    Instruction instruction;
    if (!read(registers, registers.next(), instruction) || !run(instruction)) fault("another unknown instruction");
    registers.move_on(instruction.end);
}

}  // namespace

extern "C" int may_use_tiles() {
    static const bool may = [] {
        struct sigaction action = {};
        action.sa_sigaction = emulate;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        return sigaction(SIGILL, &action, nullptr) == 0;
    }();
    return may;
}
