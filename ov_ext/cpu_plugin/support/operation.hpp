// What the OpenVINO operations share around their kernels.
#pragma once

#include <algorithm>
#include <cstdio>
#include <exception>
#include <limits>
#include <openvino/core/except.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/runtime/tensor.hpp>
#include <stdexcept>
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

// An error in words that say which operation of a model it is about.
inline std::string named(const ov::Node& operation, const std::exception& error) {
    return std::string(operation.get_type_name()) + " '" + operation.get_friendly_name() + "': " + error.what();
}

// Plug-ins clone an operation with dynamic shapes at every inference, for the shapes of its inputs, and show it their data as Constants. An
// error there could be lost (see StreamThreads). Whether these inputs are of that kind: x, the first, has got its width, or another one has
// become a Constant.
inline bool are_of_one_inference(const ov::Node& operation, const ov::OutputVector& inputs) {
    const auto width = [](const ov::Output<ov::Node>& x) {
        const ov::PartialShape& shape = x.get_partial_shape();
        return shape.rank().is_static() && shape.size() ? shape[shape.size() - 1] : ov::Dimension::dynamic();
    };
    const auto constant = [](const ov::Node* node) { return ov::is_type<ov::op::v0::Constant>(node); };
    bool found = width(operation.input_value(0)).is_dynamic() && width(inputs[0]).is_static();
    for (size_t i = 1; i < inputs.size(); i++)
        found |= !constant(operation.get_input_node_ptr(i)) && constant(inputs[i].get_node());
    return found;
}

// Whether activations are bf16; they are f32 otherwise, and k wide.
inline bool are_bf16(const ov::Tensor& x, int64_t k) {
    const bool bf16 = x.get_element_type() == ov::element::bf16;
    if (!bf16 && x.get_element_type() != ov::element::f32)
        throw std::invalid_argument("f32 or bf16 activations needed, got " + x.get_element_type().get_type_name());
    const ov::Shape& shape = x.get_shape();
    if (shape.empty() || shape.back() != size_t(k))
        throw std::invalid_argument("the last axis of x must be " + std::to_string(k) + ", got x of shape " + shape.to_string());
    return bf16;
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
