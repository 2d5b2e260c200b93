// The OpenVINO operation around the kernels.
#pragma once

#include <memory>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "../support/stream_threads.hpp"
#include "../support/validation_cache.hpp"
#include "dense_copies.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {

// Where the blob of a weight lies; no data where it is no Constant.
struct Blob {
    const uint8_t* data;
    size_t bytes;
};

// y_i[..., n_i] = x[..., k] · W_iᵀ + bias_i, for one weight or several that read the same x; each W_i and bias_i from an SPW1 blob.
//   inputs: x, f32 or bf16, rank >= 1, dynamic shapes allowed; the blobs, u8[bytes], normally Constants.
//   outputs, one for each blob: element type of x, shape of x with the last axis n_i. They follow from attributes and x's shape alone.
//   attributes: n (of the only weight, or the sum), outputs (n_i of each weight; empty for one weight), k, kind ("bf16", "int8", "int4");
//   activation_group (0 = full-precision activations, -1 = 8 bits per token, 64 / 128 = 8 bits per token and group of inputs; a bf16
//   weight rounds activations to bf16 unless it is 0); epilogue ("" only); source (free text that the kernel ignores: how to restore the
//   stock subgraph).
class SparseMatMul : public ov::op::Op {
  public:
    OPENVINO_OP("SparseMatMul", "ov_ext");

    SparseMatMul() = default;

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    // Called by plug-ins while they compile a model: checks the content of all constant blobs, so that a damaged one is an error there.
    bool has_evaluate() const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool can_constant_fold(const ov::OutputVector&) const override { return false; }

  private:
    std::vector<int64_t> widths() const;  // n of each weight
    using Compensation = std::vector<int16_t>;
    BlobView weight(size_t input, const Blob& from, int64_t n, bool all_dense, Compensation& of_data) const;
    void multiply(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    int64_t m_n = 0, m_k = 0, m_activation_group = 128;
    std::vector<int64_t> m_outputs;
    std::string m_kind, m_epilogue, m_source;
    bool m_of_one_inference = false;  // a clone for the shapes of one inference: evaluate() refuses what does not fit
    mutable StreamThreads m_stream_threads;
    mutable ValidationCache m_validated;  // constant blobs
    mutable DenseCopies m_dense;          // of them
    mutable MadeFromBlobs<Compensation> m_compensation;
};

}  // namespace ov_ext::sparse_matmul
