// Rows of activations as the kernels of an operation want them. Plain data only: kernel headers include this file.
#pragma once

#include <cstdint>

namespace ov_ext {

// One row (token) of x and how it is cut for quantization. Numbers of inputs.
struct RowShape {
    uint64_t k;        // values of x
    uint64_t k_pad;    // with the zeros that follow them; a multiple of segment
    uint64_t segment;  // inputs for which a factor is written; 0 = none is
    uint64_t group;    // inputs that share a factor: a multiple of segment, or k_pad; read for integer activations only
};

// Prepared activations. The memory holds a multiple of 16 rows.
struct Activations {
    void* data;
    float* scales;    // [rows, k_pad / segment], one factor for each row and segment; integer activations only
    uint64_t stride;  // bytes of a prepared row
    RowShape row;
    bool integer;  // quantized to 8 bits, else floating point
    bool rounded;  // floating point, rounded to bf16
};

}  // namespace ov_ext
