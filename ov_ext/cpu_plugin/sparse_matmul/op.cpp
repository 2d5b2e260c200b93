#include "op.hpp"

#include <algorithm>
#include <openvino/op/constant.hpp>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../support/isa_selection.hpp"
#include "../support/operation.hpp"
#include "dispatch.hpp"
#include "format.hpp"

namespace ov_ext::sparse_matmul {

namespace {

void check_against_attributes(const BlobView& w, int64_t n, int64_t k, const std::string& kind, int64_t activation_group) {
    if (w.n != uint64_t(n) || w.k != uint64_t(k) || kind_name(w.kind) != kind)
        throw InvalidBlob("the blob holds a " + std::string(kind_name(w.kind)) + " weight of " + std::to_string(w.n) + " x " +
                          std::to_string(w.k) + ", the operation's attributes say " + kind + ", " + std::to_string(n) + " x " +
                          std::to_string(k));
    check_activation_group(w, activation_group);
}

void require_same_activations(const BlobView& a, const BlobView& b) {
    if (!same_activations(a, b))
        throw InvalidBlob("its weights have different groups");
}

}  // namespace

std::vector<int64_t> SparseMatMul::widths() const { return m_outputs.empty() ? std::vector<int64_t>{m_n} : m_outputs; }

void SparseMatMul::validate_and_infer_types() {
    const auto n = widths();
    NODE_VALIDATION_CHECK(this, get_input_size() == 1 + n.size(), "SparseMatMul takes x and one blob for each output, ", 1 + n.size(),
                          " inputs, got ", get_input_size(), ".");
    const auto& type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32 || type == ov::element::bf16,
                          "SparseMatMul takes f32 or bf16 activations, got ", type, ".");
    // Attributes come from a file. The sizes are checked before they become a shape, which somebody will allocate.
    int64_t sum = 0;
    for (const int64_t each : n) {
        NODE_VALIDATION_CHECK(this, each >= 1 && m_k >= 1 && !(each >> 31) && !(m_k >> 31),
                              "Attributes n and k must lie in 1..2^31-1, got ", each, " and ", m_k, ".");
        NODE_VALIDATION_CHECK(this, !((sum += each) >> 62), "The sizes in outputs are too large.");
    }
    NODE_VALIDATION_CHECK(this, sum == m_n, "Attribute n must be the sum of outputs, ", sum, ", got ", m_n, ".");
    NODE_VALIDATION_CHECK(this, m_epilogue.empty(), "Unknown epilogue '", m_epilogue, "': this release knows none.");
    for (size_t i = 0; i < n.size(); i++) {
        NODE_VALIDATION_CHECK(this, get_input_element_type(1 + i) == ov::element::u8 && get_input_partial_shape(1 + i).rank().compatible(1),
                              "The blob must be a one-dimensional u8 tensor.");
        // The header only, in constant time: shapes are inferred often, and reading the content would fetch a mapped blob from disk. A blob
        // that arrives as data is not known yet: evaluate() looks at it.
        const auto* constant = ov::as_type<const ov::op::v0::Constant>(get_input_node_ptr(1 + i));
        if (constant && !m_of_one_inference) {
            // OpenVINO compares shape and bytes modulo 2^61 when it reads a file.
            NODE_VALIDATION_CHECK(this, constant->get_shape()[0] == constant->get_byte_size(), "The blob holds ", constant->get_byte_size(),
                                  " bytes, its shape says ", constant->get_shape()[0], ".");
            try {
                const auto w = parse(static_cast<const uint8_t*>(constant->get_data_ptr()), constant->get_byte_size());
                check_against_attributes(w, n[i], m_k, m_kind, m_activation_group);
            } catch (const InvalidBlob& error) {
                NODE_VALIDATION_CHECK(this, false, error.what(), ".");
            }
        }
    }
    // From attributes and x's shape alone: plugins run an operation whose shapes depend on data, like a blob's header, on a slower path.
    ov::PartialShape shape = get_input_partial_shape(0);
    const bool ranked = shape.rank().is_static();
    const bool fits = !ranked || (shape.size() >= 1 && (m_of_one_inference || shape[shape.size() - 1].compatible(m_k)));
    NODE_VALIDATION_CHECK(this, fits, "The last axis of x must be ", m_k, ", got x of shape ", shape, ".");
    set_output_size(n.size());
    for (size_t i = 0; i < n.size(); i++) {
        if (ranked)
            shape[shape.size() - 1] = n[i];
        set_output_type(i, type, shape);
    }
}

std::shared_ptr<ov::Node> SparseMatMul::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    check_new_args_count(this, inputs);
    auto clone = std::make_shared<SparseMatMul>();
    clone->m_n = m_n, clone->m_k = m_k, clone->m_activation_group = m_activation_group;
    clone->m_outputs = m_outputs;
    clone->m_kind = m_kind, clone->m_epilogue = m_epilogue, clone->m_source = m_source;
    clone->m_of_one_inference = m_of_one_inference || are_of_one_inference(*this, inputs);
    clone->set_arguments(inputs);
    clone->validate_and_infer_types();
    return clone;
}

bool SparseMatMul::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("n", m_n);
    visitor.on_attribute("outputs", m_outputs);
    visitor.on_attribute("k", m_k);
    visitor.on_attribute("kind", m_kind);
    visitor.on_attribute("activation_group", m_activation_group);
    visitor.on_attribute("epilogue", m_epilogue);
    visitor.on_attribute("source", m_source);
    return true;
}

namespace {
// One kernel multiplies all weights of an operation. The one for dense weights is for those that are all dense.
BlobView in_company(BlobView w, bool all_dense) {
    w.dense = w.dense && all_dense;
    return w;
}

// Headers of blobs are read at every call, so a single one, which keeps to itself, is not read for this.
bool are_all_dense(const std::vector<Blob>& blobs) {
    return blobs.size() == 1 ||
           std::all_of(blobs.begin(), blobs.end(), [](const Blob& each) { return each.data && parse(each.data, each.bytes).dense; });
}
}  // namespace

// The blob of one weight, parsed and known to be valid. Its header is read at every call; the content of a Constant, which cannot change,
// is checked once, and that of any other input always. A sparse Constant may have a dense copy, whose view this is then. Compensation that
// the kernel of this operation needs and the blob lacks is kept with a Constant, and otherwise in `of_data`, which must live as long as the
// view.
BlobView SparseMatMul::weight(size_t i, const Blob& from, int64_t n, bool all_dense, Compensation& of_data) const {
    const uint8_t* blob = from.data;
    const size_t bytes = from.bytes;
    BlobView w = parse(blob, bytes);
    const bool is_constant = ov::is_type<ov::op::v0::Constant>(get_input_node_ptr(i));
    const bool compensate = !w.compensation && reads_compensation(in_company(w, all_dense), m_activation_group);
    Compensation sums;
    const auto check = [&] {
        sums.resize(compensate ? number_of_sums(w) : 0);
        validate_content(w, compensate ? sums.data() : nullptr);
    };
    if (!is_constant || !m_validated.knows(get_input_node_ptr(i), blob, bytes)) {
        check_against_attributes(w, n, m_k, m_kind, m_activation_group);
        check();
        if (is_constant && verification())
            validate_checksum(blob, bytes);
        if (is_constant)
            m_validated.add(get_input_node_shared_ptr(i), blob, bytes);
    }
    const uint8_t* compensation = w.compensation;
    if (compensate && !is_constant) {
        of_data = std::move(sums);
        compensation = reinterpret_cast<const uint8_t*>(of_data.data());
    } else if (compensate) {
        const auto make = [&] {
            if (sums.empty())
                check();
            return std::make_unique<const Compensation>(std::move(sums));
        };
        // Of memory that was written anew the header may be the same, the sums are not.
        const auto fits = [&](const Compensation& known) { return sums.empty() || known == sums; };
        const auto kept = m_compensation.of(get_input_node_shared_ptr(i), blob, bytes, make, fits);
        compensation = reinterpret_cast<const uint8_t*>(kept->data());
    }
    if (is_constant)
        w = m_dense.instead_of(w, m_activation_group, get_input_node_shared_ptr(i), blob, bytes);
    w.compensation = compensation;  // that of a dense copy is the same
    return w;
}

bool SparseMatMul::has_evaluate() const {
    m_stream_threads.add_this();
    try {
        const auto n = widths();
        std::vector<Blob> blobs(n.size());
        for (size_t i = 0; i < n.size(); i++)
            if (const auto* constant = ov::as_type<const ov::op::v0::Constant>(get_input_node_ptr(1 + i)))
                blobs[i] = {static_cast<const uint8_t*>(constant->get_data_ptr()), constant->get_byte_size()};
        const bool all_dense = are_all_dense(blobs);
        std::optional<BlobView> first;
        Compensation unused;  // constants keep theirs
        for (size_t i = 0; i < n.size(); i++)
            if (blobs[i].data) {
                const auto w = weight(1 + i, blobs[i], n[i], all_dense, unused);
                if (!first)
                    first = w;
                require_same_activations(*first, w);
            }
        requested_instruction_set();
    } catch (const std::runtime_error& error) {
        OPENVINO_THROW(named(*this, error));
    }
    return true;
}

// Several requests may run one operation at the same time. A call changes nothing in it but the cache of valid blobs, which has a lock;
// whatever else it needs lies on its stack or in Scratch.
bool SparseMatMul::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    run_or_spoil(
        m_stream_threads, [&] { multiply(outputs, inputs); }, [&] { fill_with_nan(outputs); },
        [&](const std::exception& error) { return named(*this, error); });
    return true;
}

void SparseMatMul::multiply(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Tensor x = contiguous(inputs[0]);
    ov::Shape shape = x.get_shape();
    const bool is_bf16 = are_bf16(x, m_k);
    const size_t rows = x.get_size() / shape.back();
    const auto n = widths();
    if (inputs.size() != 1 + n.size() || outputs.size() != n.size())
        throw std::invalid_argument("one output for each blob needed");
    // All blobs are proven before the first output gets its size: a call that refuses one allocates nothing.
    std::vector<Product> products;
    std::vector<Compensation> compensation(n.size());
    std::vector<Blob> blobs;
    for (size_t i = 0; i < n.size(); i++) {
        const ov::Tensor& blob = inputs[1 + i];
        if (!blob.is_continuous())
            throw std::invalid_argument("the blob must be contiguous");
        blobs.push_back({static_cast<const uint8_t*>(blob.data()), blob.get_byte_size()});
    }
    const bool all_dense = are_all_dense(blobs);
    for (size_t i = 0; i < n.size(); i++) {
        products.push_back({weight(1 + i, blobs[i], n[i], all_dense, compensation[i]), nullptr});
        require_same_activations(products[0].w, products[i].w);
    }
    for (size_t i = 0; i < n.size(); i++) {
        shape.back() = size_t(n[i]);
        outputs[i].set_shape(shape);  // not before the blob has proven that n is real
        if (!outputs[i].is_continuous())
            throw std::invalid_argument("the output must be contiguous");
        products[i].y = outputs[i].data();
    }
    const Kernel& kernel = select_kernel(in_company(products[0].w, all_dense), m_activation_group, rows);
    matmul(products, kernel, x.data(), is_bf16, rows, m_activation_group);
}

}  // namespace ov_ext::sparse_matmul
