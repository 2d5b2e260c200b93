// What a kernel sees and what it offers: raw pointers, no framework. One object file per instruction set implements one Kernel. Plain data
// only: this header is compiled with the flags of every instruction set.
#pragma once

#include <cstdint>

#include "../support/instruction_set.hpp"

namespace ov_ext::sparse_attention {

constexpr uint64_t block_tokens = 64, half_tokens = 32, panel = 16;
constexpr uint64_t max_head_dim = 256;
constexpr uint64_t slice_bytes = 64;  // that a kernel may read from any code on

// The packed tokens of one head: see format.md.
struct BlockShape {
    uint64_t head_dim;        // a multiple of 16, at most max_head_dim
    uint64_t k_kept, v_kept;  // of each token, 1..head_dim
    bool int4;
};

// Dense tokens of one head, f32 [tokens, head_dim].
struct DenseTokens {
    const float *k, *v;
    uint64_t tokens, first_column;  // the column of the mask that belongs to the first token
};

// Query rows and tokens that they attend to: one unit of work. Any of the token lists may be empty.
struct Part {
    const float* const* q;     // [rows] pointers to head_dim values
    const float* const* mask;  // [rows] pointers to the row's mask, one value for each column; null where there is none
    const uint64_t* visible;   // [rows] columns from this one on are not attended to
    uint64_t rows, head_dim;
    float scale;
    const DenseTokens* dense;
    uint64_t dense_count;
    const uint8_t* const* blocks;  // packed blocks of successive tokens
    uint64_t block_count, first_column;
    BlockShape shape;
};

struct Kernel {
    InstructionSet isa;

    // Writes for each row: the largest score, the sum of exp(score - largest), then head_dim sums of exp(score - largest) * value. out:
    // [rows, 2 + head_dim]. -inf, 0 and zeros where a row attends to nothing. rows <= max_rows.
    void (*attend)(const Part& part, float* out);
};
constexpr uint64_t max_rows = 16;

extern const Kernel reference_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel, avx512_core_kernel, avx512_kernel;
extern const Kernel avx512_core_vnni_kernel;  // avx512_core.cpp compiled with VNNI
#endif

}  // namespace ov_ext::sparse_attention
