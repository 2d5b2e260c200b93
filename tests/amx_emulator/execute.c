// What the instructions do, after Intel's Software Developer's Manual, and compared bit for bit with the real unit by the tests.
#include <immintrin.h>
#include <string.h>

#include "emulator.h"

const char* const operation_names[OPERATIONS] = {"ldtilecfg", "sttilecfg", "tilerelease", "tileloadd", "tileloaddt1", "tilestored",
                                                 "tilezero",  "tdpbf16ps", "tdpbssd",     "tdpbsud",   "tdpbusd",     "tdpbuud"};

// Defined when the program runs under AddressSanitizer.
extern void* __asan_region_is_poisoned(void* begin, size_t size) __attribute__((weak));

static Fault invalid(const char* reason) { return (Fault){SIGILL, reason}; }
static Fault protection(const char* reason) { return (Fault){SIGSEGV, reason}; }
static const Fault none = {0, NULL};

// ------------------------------------------------------------------------------------------------------- configuration
// byte 0 palette, 1 start_row, 2..15 reserved, 16..47 bytes in a row of 16 tiles, 48..63 rows of 16 tiles; tiles above 7 reserved

Fault load_configuration(const uint8_t bytes[CONFIGURATION_BYTES], Tiles* tiles) {
    uint16_t row_bytes[16];
    memcpy(row_bytes, bytes + 16, sizeof(row_bytes));
    const uint8_t* rows = bytes + 48;
    if (bytes[0] == 0) {
        memset(tiles, 0, sizeof(*tiles));
        return none;
    }
    if (bytes[0] != 1)
        return protection("#GP: palette is neither 0 nor 1");
    for (int i = 2; i < 16; i++)
        if (bytes[i])
            return protection("#GP: a reserved byte of the configuration is set");
    for (int i = 0; i < 16; i++) {
        if (i >= TILES && (row_bytes[i] || rows[i]))
            return protection("#GP: a tile above 7 is configured");
        if (row_bytes[i] > ROW_BYTES || rows[i] > MAX_ROWS)
            return protection("#GP: a tile has more than 16 rows or 64 bytes in a row");
        if (!row_bytes[i] != !rows[i])
            return protection("#GP: a tile has rows of no bytes, or bytes but no rows");
    }
    memset(tiles, 0, sizeof(*tiles));
    tiles->palette = 1;
    tiles->start_row = bytes[1];
    memcpy(tiles->row_bytes, row_bytes, sizeof(tiles->row_bytes));
    memcpy(tiles->rows, rows, sizeof(tiles->rows));
    return none;
}

void store_configuration(const Tiles* tiles, uint8_t bytes[CONFIGURATION_BYTES]) {
    memset(bytes, 0, CONFIGURATION_BYTES);
    bytes[0] = tiles->palette;
    bytes[1] = tiles->start_row;
    memcpy(bytes + 16, tiles->row_bytes, sizeof(tiles->row_bytes));
    memcpy(bytes + 48, tiles->rows, sizeof(tiles->rows));
}

static Fault check_tile(const Tiles* tiles, int tile) {
    if (!tiles->palette)
        return invalid("#UD: no tile configuration is loaded");
    if (tile >= TILES)
        return invalid("#UD: tile number above 7");
    if (!tiles->rows[tile])
        return invalid("#UD: the tile is not configured (no rows)");
    return none;
}

// ---------------------------------------------------------------------------------------------------- loads and stores

static Fault move_rows(const Instruction* in, Tiles* tiles) {
    Fault fault = check_tile(tiles, in->tile);
    if (fault.signal)
        return fault;
    const int rows = tiles->rows[in->tile];
    const size_t bytes = tiles->row_bytes[in->tile];
    if (bytes % 4)
        return invalid("#UD: bytes in a row are not a multiple of 4");
    if (tiles->start_row >= rows)
        return invalid("#UD: start_row is not below the number of rows");
    for (int row = tiles->start_row; row < rows; row++) {
        void* memory = (void*)(in->address + (uint64_t)row * in->stride);
        if (__asan_region_is_poisoned && __asan_region_is_poisoned(memory, bytes))
            return protection("AddressSanitizer: a row of the tile lies outside valid memory");
        if (in->operation == TILESTORED)
            memcpy(memory, tiles->data[in->tile][row], bytes);
        else
            memcpy(tiles->data[in->tile][row], memory, bytes);
    }
    tiles->start_row = 0;
    return none;
}

// -------------------------------------------------------------------------------------------------------- dot products
// A is [rows][depth] and B [depth][columns] of 32-bit groups, each two bf16 or four bytes. All 16 columns are computed, as one
// vector: what lies beyond the configured ones can never be read.

// As instructions, because the order of the operands decides which of two NaNs survives, and a compiler may change it.
__attribute__((target("avx512f"))) static inline __m512 fused(__m512 a, __m512 b, __m512 c) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
}

__attribute__((target("avx512f"))) static inline __m512 sum(__m512 a, __m512 b) {
    __asm__("vaddps %1, %0, %0" : "+v"(a) : "v"(b));
    return a;
}

// The even and the odd elements have sums of their own over the depth, which are added to each other and then to C.
__attribute__((target("avx512f"))) static __m512i multiply_bf16(__m512i c, const uint32_t* a, const __m512i* b, int depth) {
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < depth; k++) {
        const __m512i a_even = _mm512_set1_epi32((int)(a[k] << 16)), a_odd = _mm512_set1_epi32((int)(a[k] & 0xFFFF0000));
        const __m512i b_even = _mm512_slli_epi32(b[k], 16), b_odd = _mm512_and_si512(b[k], upper);
        even = fused(_mm512_castsi512_ps(a_even), _mm512_castsi512_ps(b_even), even);
        odd = fused(_mm512_castsi512_ps(a_odd), _mm512_castsi512_ps(b_odd), odd);
    }
    return _mm512_castps_si512(sum(_mm512_castsi512_ps(c), sum(even, odd)));
}

// Four products of bytes for each sum; sums wrap around at 32 bits.
__attribute__((target("avx512f"))) static __m512i multiply_bytes(__m512i c, const uint32_t* a, const __m512i* b, int depth, bool a_signed,
                                                                 bool b_signed) {
    for (int k = 0; k < depth; k++)
        for (unsigned shift = 0; shift < 32; shift += 8) {
            const uint8_t a_byte = (uint8_t)(a[k] >> shift);
            const __m512i a_wide = _mm512_set1_epi32(a_signed ? (int8_t)a_byte : a_byte);
            const __m512i b_high = _mm512_slli_epi32(b[k], 24 - shift);
            const __m512i b_wide = b_signed ? _mm512_srai_epi32(b_high, 24) : _mm512_srli_epi32(b_high, 24);
            c = _mm512_add_epi32(c, _mm512_mullo_epi32(a_wide, b_wide));
        }
    return c;
}

__attribute__((target("avx512f"), noinline))  // noinline: no arithmetic may move across a change of the floating-point mode
static void multiply(const Instruction* in, Tiles* tiles) {
    const int rows = tiles->rows[in->tile], depth = tiles->rows[in->b];
    const bool a_signed = in->operation == TDPBSSD || in->operation == TDPBSUD;
    const bool b_signed = in->operation == TDPBSSD || in->operation == TDPBUSD;
    const __m512i* b = (const __m512i*)tiles->data[in->b];
    for (int row = 0; row < rows; row++) {
        __m512i* c = (__m512i*)tiles->data[in->tile][row];
        uint32_t a[ROW_BYTES / 4];
        memcpy(a, tiles->data[in->a][row], sizeof(a));
        *c = in->operation == TDPBF16PS ? multiply_bf16(*c, a, b, depth) : multiply_bytes(*c, a, b, depth, a_signed, b_signed);
    }
}

static Fault dot_product(const Instruction* in, Tiles* tiles) {
    const int c = in->tile, a = in->a, b = in->b;
    if (c == a || c == b || a == b)
        return invalid("#UD: two operands are the same tile");
    for (int i = 0; i < 3; i++) {
        const int tile = i == 0 ? c : i == 1 ? a : b;
        const Fault fault = check_tile(tiles, tile);
        if (fault.signal)
            return fault;
        if (tiles->row_bytes[tile] % 4)
            return invalid("#UD: bytes in a row are not a multiple of 4");
    }
    if (tiles->rows[c] != tiles->rows[a])
        return invalid("#UD: C and A differ in rows (M)");
    if (tiles->row_bytes[c] != tiles->row_bytes[b])
        return invalid("#UD: C and B differ in columns (N)");
    if (tiles->row_bytes[a] / 4 != tiles->rows[b])
        return invalid("#UD: columns of A and rows of B differ (K)");
    const unsigned mode = _mm_getcsr();
    // The unit's own floating-point mode: nearest even, denormals are zero on the way in and out, no exceptions.
    _mm_setcsr(_MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    multiply(in, tiles);
    _mm_setcsr(mode);
    tiles->start_row = 0;
    return none;
}

Fault execute(const Instruction* in, Tiles* tiles) {
    uint8_t configuration[CONFIGURATION_BYTES];
    Fault fault;
    switch (in->operation) {
        case LDTILECFG:
            memcpy(configuration, (const void*)in->address, sizeof(configuration));
            return load_configuration(configuration, tiles);
        case STTILECFG:
            store_configuration(tiles, configuration);
            memcpy((void*)in->address, configuration, sizeof(configuration));
            return none;
        case TILERELEASE: memset(tiles, 0, sizeof(*tiles)); return none;
        case TILEZERO:
            fault = check_tile(tiles, in->tile);
            if (fault.signal)
                return fault;
            memset(tiles->data[in->tile], 0, sizeof(tiles->data[in->tile]));
            tiles->start_row = 0;
            return none;
        case TILELOADD:
        case TILELOADDT1:
        case TILESTORED: return move_rows(in, tiles);
        default: return dot_product(in, tiles);
    }
}
