// Machine code to Instruction. AMX instructions are VEX encoded:
//
//   C4 | R X B 00010 | W vvvv L pp | opcode | modrm | [sib] | [displacement]       R, X, B and vvvv are stored inverted
//
// with map 2 (0F38) and W = L = 0 throughout. Compilers put no prefix before them, so none is accepted.
#define _GNU_SOURCE
#include <string.h>

#include "emulator.h"

static const int general_registers[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                          REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// The operation of an opcode, or -1. `pp` is the implied prefix (0, 66, F3, F2); reg and rm are the three low bits in modrm.
static int find_operation(int opcode, int pp, bool memory, int reg, int rm) {
    static const int load_store[4] = {-1, TILELOADDT1, TILESTORED, TILELOADD};
    static const int integer[4] = {TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD};
    switch (opcode) {
        case 0x49:
            if (memory && reg == 0 && pp < 2)
                return pp == 0 ? LDTILECFG : STTILECFG;
            if (!memory && reg == 0 && rm == 0 && pp == 0)
                return TILERELEASE;
            return !memory && rm == 0 && pp == 3 ? TILEZERO : -1;
        case 0x4B: return memory && rm == 4 ? load_store[pp] : -1;  // always with a SIB byte
        case 0x5C: return !memory && pp == 2 ? TDPBF16PS : -1;
        case 0x5E: return !memory ? integer[pp] : -1;
        default: return -1;
    }
}

bool decode(const uint8_t* code, const greg_t* registers, Instruction* out) {
    if ((code[0] != 0xC4 && code[0] != 0xCC) || (code[1] & 0x1F) != 2 || code[2] & 0x84)
        return false;
    const int r = ~code[1] >> 4 & 8, x = ~code[1] >> 3 & 8, b = ~code[1] >> 2 & 8;  // each the fourth bit of a register number
    const int vvvv = ~code[2] >> 3 & 15, modrm = code[4], mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
    const int operation = find_operation(code[3], code[2] & 3, mod != 3, reg, rm);
    if (operation < 0 || (operation < TDPBF16PS && vvvv != 0))
        return false;

    const uint8_t* next = code + 5;
    *out = (Instruction){.operation = (Operation)operation, .tile = reg | r, .a = rm | b, .b = vvvv};
    if (mod != 3) {
        int base = rm, index = 4, scale = 0;
        if (rm == 4) {
            base = *next & 7;
            index = (*next >> 3 & 7) | x;
            scale = *next >> 6;
            next++;
        }
        const bool no_base = mod == 0 && base == 5;
        int32_t displacement = 0;
        if (mod == 1) {
            displacement = (int8_t)*next++;
        } else if (mod == 2 || no_base) {
            memcpy(&displacement, next, 4);
            next += 4;
        }
        if (!no_base)
            out->address = (uint64_t)registers[general_registers[base | b]];
        else if (rm == 5)
            out->address = (uint64_t)next;  // relative to the next instruction
        out->address += (uint64_t)(int64_t)displacement;
        if (index != 4)  // the number of rsp: no index
            out->stride = (uint64_t)registers[general_registers[index]] << scale;
        if (operation == LDTILECFG || operation == STTILECFG)
            out->address += out->stride;
    }
    out->length = (int)(next - code);
    return true;
}
