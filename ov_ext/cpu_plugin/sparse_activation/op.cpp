#include "op.hpp"

#include <openvino/op/constant.hpp>
#include <stdexcept>

#include "../support/isa_selection.hpp"
#include "../support/operation.hpp"
#include "dispatch.hpp"
#include "format.hpp"

namespace ov_ext::sparse_activation {

namespace {

void check_against_attributes(const View& w, int64_t n, int64_t k, const std::string& kind, int64_t activation_group) {
    if (w.n != uint64_t(n) || w.k != uint64_t(k) || kind_name(w.kind) != kind)
        throw InvalidBlob("the blob holds a " + std::string(kind_name(w.kind)) + " weight of " + std::to_string(w.n) + " x " +
                          std::to_string(w.k) + ", the operation's attributes say " + kind + ", " + std::to_string(n) + " x " +
                          std::to_string(k));
    check_activation_group(w, activation_group);
}

}  // namespace

void SparseActivationMatMul::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "SparseActivationMatMul takes x and a blob, got ", get_input_size(), " inputs.");
    const auto& type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32 || type == ov::element::bf16,
                          "SparseActivationMatMul takes f32 or bf16 activations, got ", type, ".");
    // Attributes come from a file. The sizes are checked before they become a shape, which somebody will allocate.
    NODE_VALIDATION_CHECK(this, m_n >= 1 && m_k >= 1 && !(m_n >> 31) && !(m_k >> 31), "Attributes n and k must lie in 1..2^31-1, got ", m_n,
                          " and ", m_k, ".");
    NODE_VALIDATION_CHECK(this, get_input_element_type(1) == ov::element::u8 && get_input_partial_shape(1).rank().compatible(1),
                          "The blob must be a one-dimensional u8 tensor.");
    // The header only, in constant time: shapes are inferred often. A blob that arrives as data is not known yet: evaluate() looks at it.
    const auto* constant = ov::as_type<const ov::op::v0::Constant>(get_input_node_ptr(1));
    if (constant && !m_of_one_inference) {
        // OpenVINO compares shape and bytes modulo 2^61 when it reads a file.
        NODE_VALIDATION_CHECK(this, constant->get_shape()[0] == constant->get_byte_size(), "The blob holds ", constant->get_byte_size(),
                              " bytes, its shape says ", constant->get_shape()[0], ".");
        try {
            const View w = parse(static_cast<const uint8_t*>(constant->get_data_ptr()), constant->get_byte_size());
            check_against_attributes(w, m_n, m_k, m_kind, m_activation_group);
        } catch (const InvalidBlob& error) {
            NODE_VALIDATION_CHECK(this, false, error.what(), ".");
        }
    }
    ov::PartialShape shape = get_input_partial_shape(0);
    const bool ranked = shape.rank().is_static();
    const bool fits = !ranked || (shape.size() >= 1 && (m_of_one_inference || shape[shape.size() - 1].compatible(m_k)));
    NODE_VALIDATION_CHECK(this, fits, "The last axis of x must be ", m_k, ", got x of shape ", shape, ".");
    if (ranked)
        shape[shape.size() - 1] = m_n;
    set_output_type(0, type, shape);
}

std::shared_ptr<ov::Node> SparseActivationMatMul::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    auto clone = std::make_shared<SparseActivationMatMul>();
    clone->m_n = m_n, clone->m_k = m_k, clone->m_activation_group = m_activation_group;
    clone->m_kind = m_kind, clone->m_source = m_source;
    clone->m_of_one_inference = m_of_one_inference || are_of_one_inference(*this, inputs);
    clone->set_arguments(inputs);
    clone->validate_and_infer_types();
    return clone;
}

bool SparseActivationMatMul::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("n", m_n);
    visitor.on_attribute("k", m_k);
    visitor.on_attribute("kind", m_kind);
    visitor.on_attribute("activation_group", m_activation_group);
    visitor.on_attribute("source", m_source);
    return true;
}

// The weight, parsed and known to be valid. Its header is read at every call; the content of a Constant, which cannot change, is checked
// once, and that of any other input always.
View SparseActivationMatMul::weight(const uint8_t* blob, size_t bytes) const {
    const View w = parse(blob, bytes);
    const bool is_constant = ov::is_type<ov::op::v0::Constant>(get_input_node_ptr(1));
    if (is_constant && m_validated.knows(get_input_node_ptr(1), blob, bytes))
        return w;
    check_against_attributes(w, m_n, m_k, m_kind, m_activation_group);
    validate_content(w);
    if (is_constant && verification())
        validate_checksum(blob, bytes);
    if (is_constant)
        m_validated.add(get_input_node_shared_ptr(1), blob, bytes);
    return w;
}

bool SparseActivationMatMul::has_evaluate() const {
    m_stream_threads.add_this();
    try {
        if (const auto* constant = ov::as_type<const ov::op::v0::Constant>(get_input_node_ptr(1)))
            weight(static_cast<const uint8_t*>(constant->get_data_ptr()), constant->get_byte_size());
        select_kernel();
    } catch (const std::runtime_error& error) {
        OPENVINO_THROW(named(*this, error));
    }
    return true;
}

// Several requests may run one operation at the same time. A call changes nothing in it but the cache of valid blobs, which has a lock.
bool SparseActivationMatMul::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    run_or_spoil(
        m_stream_threads, [&] { multiply(outputs, inputs); }, [&] { fill_with_nan(outputs); },
        [&](const std::exception& error) { return named(*this, error); });
    return true;
}

void SparseActivationMatMul::multiply(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    if (inputs.size() != 2 || outputs.size() != 1)
        throw std::invalid_argument("x, a blob and one output needed");
    const ov::Tensor x = contiguous(inputs[0]);
    ov::Shape shape = x.get_shape();
    const bool is_bf16 = are_bf16(x, m_k);
    if (!inputs[1].is_continuous())
        throw std::invalid_argument("the blob must be contiguous");
    const size_t rows = x.get_size() / shape.back();
    const View w = weight(static_cast<const uint8_t*>(inputs[1].data()), inputs[1].get_byte_size());
    shape.back() = size_t(m_n);
    outputs[0].set_shape(shape);  // not before the blob has proven that n is real
    if (!outputs[0].is_continuous())
        throw std::invalid_argument("the output must be contiguous");
    matmul(w, select_kernel(), x.data(), is_bf16, rows, m_activation_group, outputs[0].data());
}

}  // namespace ov_ext::sparse_activation
