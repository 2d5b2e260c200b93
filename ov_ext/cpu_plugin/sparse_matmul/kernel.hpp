// What a kernel sees and what it offers: raw pointers, no framework. One object file per instruction set implements one Kernel.
//
// This header is compiled with the flags of every instruction set, so it holds plain data only: an inline function with a body could be
// emitted by the AVX-512 object and then be picked by the linker for everybody.
#pragma once

#include <cstdint>

namespace ov_ext {
struct CpuFeatures;
}

namespace ov_ext::sparse_matmul {

enum class Kind : uint8_t { bf16 = 1, int8 = 2, int4 = 3 };

// A validated blob: sizes and section addresses (any alignment). See format.md.
struct BlobView {
    Kind kind;
    bool dense, scales_f32;
    uint64_t n, k, n_pad, k_pad, group;
    uint64_t segment;          // inputs per integer sum; 0 for bf16
    uint64_t row_k;            // inputs per row
    uint64_t blocks, tiles, chunks, tiles_per_chunk;
    uint64_t value_bytes;      // directory's last entry
    uint64_t nnz;              // as the header says
    const uint8_t *directory, *masks, *values, *scales, *compensation, *bias;
};

// Activations as one kernel wants them. A row takes `stride` bytes; the memory holds a multiple of 16 rows.
struct Activations {
    void* data;
    float* scales;             // [rows, k_pad / segment], one factor per row and segment; integer activations only
    uint64_t stride;           // bytes
    bool integer;              // quantized to 8 bits, else floating point
    int64_t group;             // inputs per activation scale: 0 = floating point, -1 = the whole row
};

struct Kernel {
    const char* name;
    uint64_t max_rows;         // rows of x that one call of multiply takes
    bool (*supported)(const CpuFeatures&);

    // Bytes of a prepared row of activations; 0 when the kernel has no code for this weight with such activations.
    uint64_t (*row_bytes)(const BlobView& w, int64_t activation_group);

    // Writes one row of x (k values, f32 or bf16 bits) as row `row` of the activations, in this kernel's form: k_pad elements and, for
    // integer activations, k_pad / segment factors.
    void (*prepare)(const BlobView& w, const void* x, bool x_is_bf16, const Activations& a, uint64_t row);

    // out[rows][64] = sum over chunks [first, last) of block `block`, rows [row, row + rows) of the activations, rows <= max_rows.
    // row is a multiple of max_rows, or of 16 where max_rows is.
    void (*multiply)(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row,
                     uint64_t rows, float* out);
};

extern const Kernel reference_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel;
extern const Kernel avx2_vnni_kernel;  // avx2.cpp compiled with AVX-VNNI
extern const Kernel avx512_kernel;
extern const Kernel avx512_bf16_kernel;  // bf16 weights only, multiplied as bf16
extern const Kernel amx_kernel;
#endif

}  // namespace ov_ext::sparse_matmul
