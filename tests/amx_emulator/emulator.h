// The software unit: tiles, the instructions that work on them, and the faults they raise. No signals here (trap.c).
#pragma once

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <ucontext.h>

enum { TILES = 8, MAX_ROWS = 16, ROW_BYTES = 64, CONFIGURATION_BYTES = 64 };

// One thread's tile state. All zero = no configuration loaded, as in a new thread.
typedef struct {
    uint8_t palette, start_row;
    uint8_t rows[TILES];
    uint16_t row_bytes[TILES];
    _Alignas(64) uint8_t data[TILES][MAX_ROWS][ROW_BYTES];
} Tiles;

typedef enum {
    // clang-format off
    LDTILECFG, STTILECFG, TILERELEASE,                 // configuration
    TILELOADD, TILELOADDT1, TILESTORED, TILEZERO,      // data
    TDPBF16PS, TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD,     // dot products
    // clang-format on
    OPERATIONS
} Operation;

extern const char* const operation_names[OPERATIONS];

typedef struct {
    Operation operation;
    int length;        // bytes
    int tile, a, b;    // 0..15: the tile that is loaded, stored or accumulated into; the two factors
    uint64_t address;  // of the memory operand, of the first row of a tile
    uint64_t stride;   // bytes from row to row, may wrap around (a negative stride)
} Instruction;

typedef struct {
    int signal;  // what Linux sends for it: SIGILL for #UD and #NM, SIGSEGV for #GP; 0 = no fault
    const char* reason;
} Fault;

// decode.c: reads the instruction at `code`; false when it is none of the emulated ones. After a first byte of 0xCC (int3, the
// mark of the fast mode) the rest is read as if it were still 0xC4.
bool decode(const uint8_t* code, const greg_t* registers, Instruction* out);

// execute.c
Fault execute(const Instruction* in, Tiles* tiles);
// The 64 bytes of LDTILECFG and STTILECFG. Loading clears the tiles; a fault leaves everything as it was.
Fault load_configuration(const uint8_t bytes[CONFIGURATION_BYTES], Tiles* tiles);
void store_configuration(const Tiles* tiles, uint8_t bytes[CONFIGURATION_BYTES]);
