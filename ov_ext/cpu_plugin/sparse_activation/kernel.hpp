// What a kernel sees and what it offers: raw pointers, no framework. One object file per instruction set implements one Kernel.
//
// This header is compiled with the flags of every instruction set, so it holds plain data only: see sparse_matmul/kernel.hpp.
#pragma once

#include <cstdint>

#include "../support/instruction_set.hpp"
#include "../support/value_kind.hpp"

namespace ov_ext::sparse_activation {

// Sizes of the layout: see format.md.
constexpr uint64_t block_bytes = 128;      // of one input's weights for the outputs of a block
constexpr uint64_t chunk_k = 512;          // inputs of a chunk
constexpr uint64_t default_segment = 128;  // inputs

constexpr uint64_t most_outputs = 8192;  // of the blocks that a kernel takes at a time
constexpr uint64_t most_sums = 1 << 15;  // of rows of x with those of multiply_all

// A validated blob: sizes and section addresses (any alignment).
struct View {
    Kind kind;
    bool scales_f32;
    uint64_t n, k, n_pad, group;
    uint64_t segment;  // inputs per sum that is scaled; a chunk for bf16
    uint64_t block_n;  // outputs of a block
    uint64_t blocks, chunks, segments;
    uint64_t threshold_step, replacement_step;  // floats from one input's to the next one's: 0 or 1
    float centre;
    const uint8_t *threshold, *replacement, *offset, *scales, *bias, *values;  // null: absent
};

// The inputs of one row of x that stay, in lists with room for all inputs and entries_ahead more. Those of segment s are the entries [starts[s],
// starts[s + 1]), in ascending order. With integers every segment begins and ends at a multiple of `together`: the last input of a segment
// is repeated with code 0.
//
// Behind the last entry are entries_ahead more, for prefetching.
struct Kept {
    uint32_t* starts;    // [segments + 1]
    uint32_t* channels;  // numbers of inputs
    float* values;       // floating point: x - replacement
    int8_t* codes;       // integers
    float* factors;      // integers: [segments]
    int32_t* sums;       // integers: of the codes of a segment, [segments]
    bool integer;
};

constexpr uint64_t together = 4;        // entries
constexpr uint64_t entries_ahead = 33;  // the row behind the next batch is looked up

struct Kernel {
    InstructionSet isa;

    // Finds the inputs of a row of x (f32 or bf16 bits) that stay, and returns how many they are. all: every input is listed, in every
    // segment, those that do not stay as zeros; channels, which are 0, 1, 2 ... then, are not written.
    uint64_t (*keep)(const View& w, const void* x, bool x_is_bf16, bool all, const Kept& kept);

    // out[(last - first) * block_n] += the sum of one chunk for the blocks [first, last), at most most_outputs outputs.
    void (*multiply)(const View& w, const Kept& kept, uint64_t first, uint64_t last, uint64_t chunk, float* out);

    // The same for rows of x whose lists hold all inputs as integers: each weight is taken apart once for all of them. Row i is added to
    // out[i * stride]. Null: there is no code for it, and no list of several rows need hold all inputs.
    void (*multiply_all)(const View& w, const Kept* rows, uint64_t count, uint64_t first, uint64_t last, uint64_t chunk, float* out,
                         uint64_t stride);
};

extern const Kernel reference_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel, avx512_core_kernel, avx512_core_vnni_kernel;
#endif

}  // namespace ov_ext::sparse_activation
