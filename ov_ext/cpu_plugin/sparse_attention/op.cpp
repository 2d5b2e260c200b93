#include "op.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../support/isa_selection.hpp"
#include "../support/operation.hpp"
#include "packing.hpp"

namespace ov_ext::sparse_attention {
namespace {

enum Input { q_input, k_input, v_input, beams_input, state_input, alone_input, mask_input };
constexpr int64_t most_dense = 1 << 20;  // tokens of a window: far above any use, far below an overflow

void require(bool holds, const std::string& message) {
    if (!holds)
        throw std::invalid_argument(message);
}

void require_shape(const char* name, const ov::Tensor& tensor, const ov::element::Type& type, const ov::Shape& shape) {
    require(tensor.get_element_type() == type && tensor.get_shape() == shape,
            std::string(name) + " must be " + type.get_type_name() + " " + shape.to_string() + ", got " +
                tensor.get_element_type().get_type_name() + " " + tensor.get_shape().to_string());
}

// The mask as additive f32; `converted` holds it where it was boolean.
Mask read_mask(const ov::Tensor& mask, uint64_t batch, uint64_t queries, uint64_t columns, std::vector<float>& converted) {
    const ov::Shape& shape = mask.get_shape();
    require(shape.size() == 4 && (shape[0] == 1 || shape[0] == batch) && shape[1] == 1 && (shape[2] == 1 || shape[2] == queries) &&
                shape[3] == columns,
            "the mask must have shape [1 or " + std::to_string(batch) + ", 1, 1 or " + std::to_string(queries) + ", " +
                std::to_string(columns) + "], got " + shape.to_string());
    if (mask.get_element_type() == ov::element::f32)
        return {static_cast<const float*>(mask.data()), shape[0], shape[2], columns};
    require(mask.get_element_type().size() == 1, "the mask must be f32 or boolean, got " + mask.get_element_type().get_type_name());
    const auto* attended = static_cast<const uint8_t*>(mask.data());
    converted.resize(mask.get_size());
    for (size_t i = 0; i < converted.size(); i++)
        converted[i] = attended[i] ? 0.0f : -std::numeric_limits<float>::infinity();
    return {converted.data(), shape[0], shape[2], columns};
}

}  // namespace

Settings SparseKVAttention::settings() const {
    const auto dim = uint64_t(m_head_dim);
    return {{dim, kept_of(dim, m_k_level), kept_of(dim, m_v_level), m_values == "int4"},
            uint64_t(m_heads),
            uint64_t(m_sink),
            uint64_t(m_recent),
            uint64_t(m_pack_from)};
}

void SparseKVAttention::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == mask_input || get_input_size() == mask_input + 1,
                          "SparseKVAttention takes q, k, v, beam_idx, state, alone and perhaps a mask, got ", get_input_size(), " inputs.");
    for (const double level : {m_k_level, m_v_level})
        NODE_VALIDATION_CHECK(this, level >= 0 && level <= 0.9, "Levels lie in 0..0.9, got ", level, ".");
    NODE_VALIDATION_CHECK(this, m_values == "int8" || m_values == "int4", "values are int8 or int4, got '", m_values, "'.");
    NODE_VALIDATION_CHECK(this, m_head_dim >= 16 && m_head_dim <= int64_t(max_head_dim) && m_head_dim % 16 == 0,
                          "head_dim must be a multiple of 16 up to ", max_head_dim, ", got ", m_head_dim, ".");
    NODE_VALIDATION_CHECK(this, m_heads >= 1 && m_heads <= most_dense, "heads must be positive, got ", m_heads, ".");
    for (const int64_t window : {m_sink, m_recent, m_pack_from})
        NODE_VALIDATION_CHECK(this, window >= 0 && window <= most_dense, "sink, recent and pack_from lie in 0..", most_dense, ", got ",
                              window, ".");
    for (const Input i : {q_input, k_input, v_input, alone_input}) {
        const auto& type = get_input_element_type(i);
        NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32, "SparseKVAttention takes f32 q, k, v, got ", type, ".");
        const bool of_queries = i == q_input || i == alone_input;
        const ov::PartialShape wanted{-1, of_queries ? ov::Dimension() : ov::Dimension(m_heads), -1, m_head_dim};
        NODE_VALIDATION_CHECK(this, get_input_partial_shape(i).compatible(wanted), "Input ", int(i), " must have shape ", wanted, ", got ",
                              get_input_partial_shape(i), ".");
    }
    for (const Input i : {beams_input, state_input}) {
        const auto& type = get_input_element_type(i);
        const ov::PartialShape wanted = i == state_input ? ov::PartialShape{int64_t(handle_words)} : ov::PartialShape{-1};
        NODE_VALIDATION_CHECK(this, (type.is_dynamic() || type == ov::element::i32) && get_input_partial_shape(i).compatible(wanted),
                              "Input ", int(i), " must be i32 ", wanted, ", got ", type, " ", get_input_partial_shape(i), ".");
    }
    if (get_input_size() > mask_input) {
        const auto& type = get_input_element_type(mask_input);
        NODE_VALIDATION_CHECK(this,
                              type.is_dynamic() || type == ov::element::f32 || type == ov::element::boolean || type == ov::element::u8,
                              "The mask must be f32 or boolean, got ", type, ".");
        NODE_VALIDATION_CHECK(this, get_input_partial_shape(mask_input).rank().compatible(4), "The mask must have four axes, got ",
                              get_input_partial_shape(mask_input), ".");
    }
    set_output_size(2);
    set_output_type(0, ov::element::f32, get_input_partial_shape(q_input));
    set_output_type(1, ov::element::i32, ov::Shape{handle_words});
}

std::shared_ptr<ov::Node> SparseKVAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    auto clone = std::make_shared<SparseKVAttention>();
    clone->m_k_level = m_k_level, clone->m_v_level = m_v_level;
    clone->m_values = m_values, clone->m_source = m_source;
    clone->m_sink = m_sink, clone->m_recent = m_recent, clone->m_pack_from = m_pack_from;
    clone->m_heads = m_heads, clone->m_head_dim = m_head_dim;
    clone->m_scale = m_scale, clone->m_causal = m_causal;
    clone->set_arguments(inputs);
    clone->validate_and_infer_types();
    return clone;
}

bool SparseKVAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("k_level", m_k_level);
    visitor.on_attribute("v_level", m_v_level);
    visitor.on_attribute("values", m_values);
    visitor.on_attribute("sink", m_sink);
    visitor.on_attribute("recent", m_recent);
    visitor.on_attribute("pack_from", m_pack_from);
    visitor.on_attribute("heads", m_heads);
    visitor.on_attribute("head_dim", m_head_dim);
    visitor.on_attribute("scale", m_scale);
    visitor.on_attribute("causal", m_causal);
    visitor.on_attribute("source", m_source);
    return true;
}

bool SparseKVAttention::has_evaluate() const {
    m_stream_threads.add_this();
    try {
        select_kernel();
    } catch (const std::runtime_error& error) {
        OPENVINO_THROW(named(*this, error));
    }
    return true;
}

// Several requests may run one operation at the same time: each has a cache of its own.
bool SparseKVAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const auto spoil = [&] {  // a state of zeros would pass for an empty one
        if (outputs.size() == 2 && outputs[0] && outputs[0].is_continuous())
            std::fill_n(static_cast<float*>(outputs[0].data()), outputs[0].get_size(), std::numeric_limits<float>::quiet_NaN());
        if (outputs.size() == 2 && outputs[1] && outputs[1].is_continuous())
            std::fill_n(static_cast<int32_t*>(outputs[1].data()), outputs[1].get_size(), -1);
    };
    run_or_spoil(m_stream_threads, [&] { run(outputs, inputs); }, spoil, [&](const std::exception& error) { return named(*this, error); });
    return true;
}

void SparseKVAttention::run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    require(inputs.size() >= mask_input && outputs.size() == 2, "six or seven inputs and two outputs needed");
    const ov::Tensor q = contiguous(inputs[q_input]), k = contiguous(inputs[k_input]), v = contiguous(inputs[v_input]);
    const ov::Tensor beams = contiguous(inputs[beams_input]), alone = contiguous(inputs[alone_input]);
    const ov::Tensor& state = inputs[state_input];
    const ov::Shape shape = q.get_shape();
    require(shape.size() == 4 && shape[1] >= uint64_t(m_heads) && shape[1] % uint64_t(m_heads) == 0,
            "q must have four axes, the second one a multiple of " + std::to_string(m_heads) + ", got " + shape.to_string());
    const uint64_t batch = shape[0], count = shape[2];
    require_shape("q", q, ov::element::f32, {batch, shape[1], count, size_t(m_head_dim)});
    require_shape("k", k, ov::element::f32, {batch, size_t(m_heads), count, size_t(m_head_dim)});
    require_shape("v", v, ov::element::f32, {batch, size_t(m_heads), count, size_t(m_head_dim)});
    require_shape("beam_idx", beams, ov::element::i32, {batch});
    require_shape("the state", state, ov::element::i32, {handle_words});
    outputs[0].set_shape(shape);
    outputs[1].set_shape({handle_words});
    int32_t handle[handle_words];
    std::memcpy(handle, state.data(), sizeof(handle));

    Caches::Step step(m_caches, handle, state.data(), settings());
    Cache& cache = step.cache();
    cache.reorder(static_cast<const int32_t*>(beams.data()), batch);
    std::vector<float> converted;
    Mask mask;
    if (inputs.size() > mask_input) {
        const ov::Tensor given = contiguous(inputs[mask_input]);
        mask = read_mask(given, batch, count, cache.tokens() + count, converted);
        if (converted.empty() && mask.data != inputs[mask_input].data()) {  // the copy ends with this block
            converted.assign(mask.data, mask.data + given.get_size());
            mask.data = converted.data();
        }
    }
    auto* y = static_cast<float*>(outputs[0].data());
    const auto* keys = static_cast<const float*>(k.data());
    const auto* values = static_cast<const float*>(v.data());
    if (cache.tokens()) {
        attend(cache, select_kernel(), {static_cast<const float*>(q.data()), keys, values, shape[1], count, m_scale, m_causal}, mask, y);
    } else {
        require_shape("alone", alone, ov::element::f32, shape);
        std::memcpy(y, alone.data(), alone.get_byte_size());
    }
    cache.append(keys, values, count);
    step.commit(static_cast<int32_t*>(outputs[1].data()));
}

}  // namespace ov_ext::sparse_attention
