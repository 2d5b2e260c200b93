// What the OpenVINO operations share around their kernels.
#pragma once

#include <algorithm>
#include <cstdio>
#include <exception>
#include <limits>
#include <openvino/core/except.hpp>
#include <openvino/runtime/tensor.hpp>
#include <string>

#include "stream_threads.hpp"

namespace ov_ext {

// A region of interest may have gaps between its rows; kernels see pointers only.
inline ov::Tensor contiguous(const ov::Tensor& tensor) {
    if (tensor.is_continuous())
        return tensor;
    ov::Tensor copy(tensor.get_element_type(), tensor.get_shape());
    tensor.copy_to(copy);
    return copy;
}

// What spoils outputs of f32 or bf16 that have memory already.
inline void fill_with_nan(ov::TensorVector& outputs) {
    constexpr uint16_t bf16_nan = 0x7FC0;
    for (ov::Tensor& y : outputs)
        if (y && y.is_continuous() && y.get_element_type() == ov::element::f32)
            std::fill_n(static_cast<float*>(y.data()), y.get_size(), std::numeric_limits<float>::quiet_NaN());
        else if (y && y.is_continuous() && y.get_element_type() == ov::element::bf16)
            std::fill_n(static_cast<uint16_t*>(y.data()), y.get_size(), bf16_nan);
}

// The body of an evaluate(): run(); after an error spoil(), since what was in the outputs' memory before must not pass for a result. The
// error, in the words of named(error), reaches the user if any way there leads to him.
template <class Run, class Spoil, class Named>
void run_or_spoil(const StreamThreads& threads, const Run& run, const Spoil& spoil, const Named& named) {
    try {
        run();
    } catch (const std::exception& error) {
        spoil();
        if (threads.errors_are_reported())
            OPENVINO_THROW(named(error));
        std::fprintf(stderr, "ov_ext: %s. Its outputs are NaN: OpenVINO loses errors when it runs on a single thread.\n",
                     named(error).c_str());
    }
}

}  // namespace ov_ext
