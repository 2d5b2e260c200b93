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

// Activations as one kernel wants them. `data` rows are `stride` bytes apart.
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
    uint64_t element_bytes;    // of a prepared activation, integer or floating point, at most
    bool (*supported)(const CpuFeatures&);

    // Writes one row of x (k values, f32 or bf16 bits) in this kernel's form: `row` of k_pad elements and, for integer activations,
    // `scales` of k_pad / segment factors. activation_group: inputs per activation scale, 0 = floating point, -1 = the whole row.
    void (*prepare)(const BlobView& w, const void* x, bool x_is_bf16, int64_t activation_group, void* row, float* scales);

    // out[rows][64] = sum over chunks [first, last) of block `block`, rows [row, row + rows) of the activations, rows <= max_rows.
    void (*multiply)(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row,
                     uint64_t rows, float* out);
};

extern const Kernel reference_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel;
extern const Kernel avx2_vnni_kernel;  // avx2.cpp compiled with AVX-VNNI
extern const Kernel avx512_kernel;
#endif

}  // namespace ov_ext::sparse_matmul
