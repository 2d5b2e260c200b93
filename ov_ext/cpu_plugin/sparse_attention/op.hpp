// The OpenVINO operation around the kernels.
#pragma once

#include <memory>
#include <openvino/op/op.hpp>
#include <string>

#include "../support/stream_threads.hpp"
#include "attention.hpp"
#include "handles.hpp"

namespace ov_ext::sparse_attention {

// Attention over pruned keys and values that the operation keeps from call to call: see format.md.
//   inputs: q, f32 [sequences, query heads, tokens, head_dim]; k, v, f32 [sequences, heads, tokens, head_dim], of new tokens, query heads a
//   multiple of heads; beam_idx, i32 [sequences]; state, i32 [16]; alone, f32 like q: attention of the new tokens to each other, which is
//   the result where there are no others, and not read otherwise; mask, optional: f32 (added to scores) or boolean
//   [sequences or 1, 1, tokens or 1, all tokens].
//   outputs: attention, f32 like q; the next state, i32 [16].
//   attributes: k_level, v_level (fraction 0..0.9 that is pruned), values ("int8", "int4"), sink, recent, pack_from (tokens), scale,
//   causal (without a mask: a token attends to those before it), heads, head_dim, source (how to restore the stock subgraph; the
//   kernel ignores it).
class SparseKVAttention : public ov::op::Op {
  public:
    OPENVINO_OP("SparseKVAttention", "ov_ext");

    SparseKVAttention() = default;

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override;
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
    bool can_constant_fold(const ov::OutputVector&) const override { return false; }

  private:
    Settings settings() const;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    double m_k_level = 0.5, m_v_level = 0.5;
    std::string m_values = "int8", m_source;
    int64_t m_sink = 0, m_recent = 0, m_pack_from = 0, m_heads = 0, m_head_dim = 0;
    float m_scale = 1.0f;
    bool m_causal = false;
    mutable StreamThreads m_stream_threads;
    mutable Caches m_caches;
};

}  // namespace ov_ext::sparse_attention
