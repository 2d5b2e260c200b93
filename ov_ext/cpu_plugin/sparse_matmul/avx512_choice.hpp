// Which function multiplies so many rows: the same for every AVX-512 kernel. A kernel defines multiply_few and multiply_many. Included by files
// compiled with these instructions only; everything is in an anonymous namespace.
#pragma once

#include "avx512_rows.hpp"

namespace ov_ext::sparse_matmul {
namespace {

using Function = void (*)(const BlobView&, const Activations&, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, float*);
constexpr uint64_t max_rows = 256;  // that share one expansion

// Rows of x that meet a slice of dense weights the moment it is decoded; with f32 activations fewer do. More rows go in passes over each
// chunk, which stays in a cache: up to so many rows, decoding it anew takes less than storing it. Passes are equal: 9 rows go as 5 and 4.
constexpr uint64_t most_dense_rows = 8, most_rows_in_passes = 32;

template <Kind kind, bool dense, Input input, int M>
void multiply_few(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t,
                  float* out);
template <Kind kind, bool dense, Input input>
void multiply_many(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                   float* out);
template <Kind kind, Input input>
void multiply_passes(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                     float* out);

// A function for each small number of rows, because the sums of all rows are registers: their number must be a constant. With a bitmap 4 is
// as many as add_sparse_panel of the kernel with VBMI2 takes, whose assembly statement has no operand left for a fifth row.
template <Kind kind, bool dense, Input input>
Function by_rows(uint64_t rows) {
    switch (rows) {
        case 1: return multiply_few<kind, dense, input, 1>;
        case 2: return multiply_few<kind, dense, input, 2>;
        case 3: return multiply_few<kind, dense, input, 3>;
        case 4: return multiply_few<kind, dense, input, 4>;
    }
    if constexpr (dense && input != Input::f32)
        switch (rows) {
            case 5: return multiply_few<kind, dense, input, 5>;
            case 6: return multiply_few<kind, dense, input, 6>;
            case 7: return multiply_few<kind, dense, input, 7>;
            case 8: return multiply_few<kind, dense, input, 8>;
            default:
                if (rows <= most_rows_in_passes)
                    return multiply_passes<kind, input>;
        }
    return multiply_many<kind, dense, input>;
}

template <Kind kind, Input input>
void multiply_passes(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                     float* out) {
    const uint64_t passes = (rows + most_dense_rows - 1) / most_dense_rows, each = (rows + passes - 1) / passes;
    for (uint64_t chunk = first; chunk < last; chunk++)
        for (uint64_t done = 0; done < rows; done += each) {
            const uint64_t some = each < rows - done ? each : rows - done;
            by_rows<kind, true, input>(some)(w, a, block, chunk, chunk + 1, row + done, some, out + done * block_n);
        }
}

template <Kind kind, Input input>
Function choose(bool dense, uint64_t rows) {
    return dense ? by_rows<kind, true, input>(rows) : by_rows<kind, false, input>(rows);
}

}  // namespace
}  // namespace ov_ext::sparse_matmul
