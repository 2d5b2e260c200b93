// The tile registers of AMX: eight, of up to 16 tile rows of 64 bytes. Everything is in an anonymous namespace; no compiler flag is needed.
//
// The instructions are written in assembly: GCC's intrinsics lack what tells the compiler which memory they read (_tile_loadd in 12 to 16,
// _tile_loadconfig in 12 and 13), so that it deletes or delays stores to a tile's memory. All are volatile, which keeps their order among
// each other: the compiler cannot see that they read and write tile registers. A register's number is a template parameter because it is
// part of the instruction.
#pragma once

#include <cstdint>

#include "unaligned.hpp"

namespace ov_ext {
namespace {

constexpr uint64_t tile_rows = 16, tile_row_bytes = 64, tile_bytes = tile_rows * tile_row_bytes;

// The operand of ldtilecfg, with Intel's names: colsb = bytes of each tile row, rows = number of tile rows.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the operand of ldtilecfg");

// Owns the tile registers of this thread and hands them back at the end of its scope: oneDNN's kernels run on the same threads and look at
// the palette before they load their own configuration.
class TileRegisters {
  public:
    TileRegisters() = default;
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
    INLINE ~TileRegisters() { __asm__ volatile("tilerelease"); }

    INLINE void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }  // zeroes all tiles
};

// stride: bytes from tile row to tile row in memory. Any address will do, aligned or not. Only the tile rows that the configuration gives
// the register are read or written.
template <int tile>
INLINE void load_tile(const void* from, uint64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void store_tile(void* to, uint64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// sum += a * b: s8 by s8 to s32, or bf16 to f32. The three are different registers. What the lanes (4 bytes) of the three tiles hold, for
// integers (bf16: 2 inputs in a lane instead of 4):
//
//     a: tile row m, lane r      inputs 4r ... 4r + 3 of row m of activations
//     b: tile row r, lane c      the same inputs of output c
//     sum: tile row m, lane c    += sum over r and over the inputs of a lane
//
// a and sum need as many tile rows as there are rows of activations, b one for each lane of a.
template <bool integer, int sum, int a, int b>
INLINE void multiply_tiles() {
    if (integer)
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    else
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

}  // namespace
}  // namespace ov_ext
