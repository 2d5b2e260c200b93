// The OpenVINO operation around the kernels.
#pragma once

#include <memory>
#include <openvino/op/op.hpp>
#include <string>

#include "../support/stream_threads.hpp"
#include "../support/validation_cache.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_activation {

// y[..., n] = x~[..., k] · Wᵀ + bias, where x~ is x with small inputs replaced; W, bias and the rule from a SAM1 blob: see format.md.
//   inputs: x, f32 or bf16, rank >= 1, dynamic shapes allowed; the blob, u8[bytes], normally a Constant.
//   output: element type of x, shape of x with the last axis n.
//   attributes: n, k, kind ("bf16", "int8", "int4"); activation_group (0 = f32 activations; the blob's segment = 8 bits per token and
//   segment, not with bf16 weights); source (free text that the kernel ignores: how to restore the stock subgraph).
class SparseActivationMatMul : public ov::op::Op {
  public:
    OPENVINO_OP("SparseActivationMatMul", "ov_ext");

    SparseActivationMatMul() = default;

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    // Called by plug-ins while they compile a model: checks the content of a constant blob, so that a damaged one is an error there.
    bool has_evaluate() const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool can_constant_fold(const ov::OutputVector&) const override { return false; }

  private:
    View weight(const uint8_t* blob, size_t bytes) const;
    void multiply(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    int64_t m_n = 0, m_k = 0, m_activation_group = 128;
    std::string m_kind, m_source;
    bool m_of_one_inference = false;  // a clone for the shapes of one inference: evaluate() refuses what does not fit
    mutable StreamThreads m_stream_threads;
    mutable ValidationCache m_validated;  // constant blobs
};

}  // namespace ov_ext::sparse_activation
