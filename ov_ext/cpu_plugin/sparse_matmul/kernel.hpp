// What a kernel sees and what it offers: raw pointers, no framework. One object file per instruction set implements one Kernel.
//
// A row is a row of activations (a token), in all files. What a weight is cut into are blocks, k tiles, panels and slices: see format.md.
//
// This header is compiled with the flags of every instruction set, so it holds plain data only: an inline function with a body could be
// emitted by the AVX-512 object and then be picked by the linker for everybody.
#pragma once

#include <cstdint>

#include "../support/activations.hpp"
#include "../support/instruction_set.hpp"
#include "../support/value_kind.hpp"

namespace ov_ext::sparse_matmul {

// Sizes of the layout: see "Order of elements" in format.md.
constexpr uint64_t block_n = 64;                               // outputs of a block
constexpr uint64_t chunk_k = 512;                              // inputs of a chunk
constexpr int block_panels = 4, panel_n = 16;                  // panels of a block (in each k tile), outputs of a panel
constexpr int panel_slices = 16;                               // slices of a panel
constexpr uint64_t slice_bytes = 64;                           // of a dense bf16 or int8 slice, and of every decoded one: a register
constexpr uint64_t panel_bytes = panel_slices * slice_bytes;   // 1024, the size of an AMX tile
constexpr uint64_t k_tile_bytes = block_panels * panel_bytes;  // 4096

// A validated blob: sizes and section addresses (any alignment). See format.md.
struct BlobView {
    Kind kind;
    bool dense, scales_f32;
    uint64_t n, k, n_pad, k_pad, group;
    uint64_t segment;  // inputs per integer sum; 0 for bf16
    uint64_t slice_k;  // inputs per slice
    uint64_t blocks, tiles, chunks, tiles_per_chunk;
    uint64_t value_bytes;  // directory's last entry
    uint64_t nnz;          // as the header says
    const uint8_t *directory, *masks, *values, *scales, *bias;
    const uint8_t* compensation;  // in the blob or beside it; null when this kernel does without
};

struct Kernel {
    InstructionSet isa;
    uint64_t max_rows;        // rows of x that one call of multiply takes
    bool reads_compensation;  // of integer weights with integer activations, to which it adds 128

    // Bytes of a prepared row of x; 0 when the kernel has no code for this weight with such activations.
    uint64_t (*row_bytes)(const BlobView& w, int64_t activation_group);

    // Writes one row of x (a.row.k values, f32 or bf16 bits) as row `row` of the activations, in the form that this kernel wants for such
    // weights: k_pad elements and, for integer activations, k_pad / segment factors.
    void (*prepare)(const Activations& a, Kind weights, const void* x, bool x_is_bf16, uint64_t row);

    // out[rows][block_n] = sum over chunks [first, last) of block `block`, rows [row, row + rows) of the activations, rows <= max_rows.
    // row is a multiple of max_rows, or of 16 where max_rows is.
    void (*multiply)(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                     float* out);
};

extern const Kernel reference_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel;
extern const Kernel avx2_vnni_kernel;  // avx2.cpp compiled with AVX-VNNI
extern const Kernel avx512_core_kernel;
extern const Kernel avx512_core_vnni_kernel;  // avx512_core.cpp compiled with VNNI
extern const Kernel avx512_kernel;
extern const Kernel avx512_bf16_kernel;  // bf16 weights only, multiplied as bf16
extern const Kernel amx_kernel;
#endif

}  // namespace ov_ext::sparse_matmul
