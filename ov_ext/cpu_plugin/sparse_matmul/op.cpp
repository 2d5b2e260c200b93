#include "op.hpp"

#include <mutex>
#include <openvino/op/constant.hpp>
#include <vector>

#include "dispatch.hpp"
#include "format.hpp"

namespace ov_ext::sparse_matmul {

// Which memory was found valid. Kept for a Constant input only, and together with that Constant: an address alone proves nothing, the
// next blob may be mapped to it. Clones start without verdicts. Plugins may show a copy of the Constant, or one a stream.
struct SparseMatMul::Verdicts {
    bool known(const ov::Node* constant, const void* blob, size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex);
        for (const Entry& entry : valid)
            if (entry.constant.get() == constant && entry.address == blob && entry.bytes == bytes)
                return true;
        return false;
    }
    void add(std::shared_ptr<const ov::Node> constant, const void* blob, size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex);
        valid.push_back({std::move(constant), blob, bytes});
    }

  private:
    struct Entry {
        std::shared_ptr<const ov::Node> constant;
        const void* address;
        size_t bytes;
    };
    std::mutex mutex;
    std::vector<Entry> valid;
};

std::shared_ptr<SparseMatMul::Verdicts> SparseMatMul::make_verdicts() { return std::make_shared<Verdicts>(); }

namespace {

void check_against_attributes(const BlobView& w, int64_t n, int64_t k, const std::string& kind, int64_t activation_group) {
    if (w.n != uint64_t(n) || w.k != uint64_t(k) || kind_name(w.kind) != kind)
        throw InvalidBlob("the blob holds a " + std::string(kind_name(w.kind)) + " weight of " + std::to_string(w.n) + " x " +
                          std::to_string(w.k) + ", the operation's attributes say " + kind + ", " + std::to_string(n) + " x " +
                          std::to_string(k));
    check_activation_group(w, activation_group);
}

}  // namespace

void SparseMatMul::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "SparseMatMul takes two inputs: x and blob.");
    const auto& type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32 || type == ov::element::bf16,
                          "SparseMatMul takes f32 or bf16 activations, got ", type, ".");
    NODE_VALIDATION_CHECK(this, get_input_element_type(1) == ov::element::u8 && get_input_partial_shape(1).rank().compatible(1),
                          "The blob must be a one-dimensional u8 tensor.");
    NODE_VALIDATION_CHECK(this, m_n >= 1 && m_k >= 1, "Attributes n and k must be positive.");
    NODE_VALIDATION_CHECK(this, m_epilogue.empty(), "Unknown epilogue '", m_epilogue, "': this release knows none.");
    const auto* constant = ov::as_type<const ov::op::v0::Constant>(get_input_node_ptr(1));
    if (constant) {
        try {
            const auto w = parse(static_cast<const uint8_t*>(constant->get_data_ptr()), constant->get_byte_size());
            check_against_attributes(w, m_n, m_k, m_kind, m_activation_group);
        } catch (const InvalidBlob& error) {
            NODE_VALIDATION_CHECK(this, false, error.what(), ".");
        }
    }
    ov::PartialShape shape = get_input_partial_shape(0);
    if (shape.rank().is_dynamic()) {
        set_output_type(0, type, shape);
        return;
    }
    NODE_VALIDATION_CHECK(this, shape.size() >= 1 && shape[shape.size() - 1].compatible(m_k), "The last axis of x must be ", m_k,
                          ", got x of shape ", shape, ".");
    shape[shape.size() - 1] = m_n;
    set_output_type(0, type, shape);
}

std::shared_ptr<ov::Node> SparseMatMul::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    auto clone = std::make_shared<SparseMatMul>();
    clone->m_n = m_n, clone->m_k = m_k, clone->m_activation_group = m_activation_group;
    clone->m_kind = m_kind, clone->m_epilogue = m_epilogue, clone->m_source = m_source;
    clone->set_arguments(inputs);
    clone->validate_and_infer_types();
    return clone;
}

bool SparseMatMul::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("n", m_n);
    visitor.on_attribute("k", m_k);
    visitor.on_attribute("kind", m_kind);
    visitor.on_attribute("activation_group", m_activation_group);
    visitor.on_attribute("epilogue", m_epilogue);
    visitor.on_attribute("source", m_source);
    return true;
}

bool SparseMatMul::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor &x = inputs[0], &blob = inputs[1];
    ov::Shape shape = x.get_shape();
    const bool is_bf16 = x.get_element_type() == ov::element::bf16;
    OPENVINO_ASSERT(is_bf16 || x.get_element_type() == ov::element::f32, get_friendly_name(), ": f32 or bf16 activations needed, got ",
                    x.get_element_type());
    OPENVINO_ASSERT(!shape.empty() && shape.back() == size_t(m_k), get_friendly_name(), ": the last axis of x must be ", m_k, ", got ",
                    shape);
    const auto* bytes = static_cast<const uint8_t*>(blob.data());
    const size_t rows = x.get_size() / shape.back();
    shape.back() = size_t(m_n);
    outputs[0].set_shape(shape);
    try {
        const BlobView w = parse(bytes, blob.get_byte_size());
        const bool is_constant = ov::is_type<ov::op::v0::Constant>(get_input_node_ptr(1));
        if (!is_constant || !m_verdicts->known(get_input_node_ptr(1), bytes, blob.get_byte_size())) {
            check_against_attributes(w, m_n, m_k, m_kind, m_activation_group);
            validate_content(w);
            if (is_constant)
                m_verdicts->add(get_input_node_shared_ptr(1), bytes, blob.get_byte_size());
        }
        matmul(w, select_kernel(w, m_activation_group, rows), x.data(), is_bf16, rows, m_activation_group, outputs[0].data());
    } catch (const InvalidBlob& error) {
        OPENVINO_THROW("SparseMatMul '", get_friendly_name(), "': ", error.what());
    }
    return true;
}

}  // namespace ov_ext::sparse_matmul
