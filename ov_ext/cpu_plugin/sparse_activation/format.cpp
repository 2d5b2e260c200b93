// Reading a blob that nobody vouches for.
#include "format.hpp"

#include <algorithm>
#include <cmath>

#include "../support/floats.hpp"
#include "../support/parallel.hpp"
#include "places.hpp"

namespace ov_ext::sparse_activation {
namespace {

[[noreturn]] void fail(const std::string& what) { throw InvalidBlob("SAM1 blob: " + what); }

void require(bool ok, const char* what) {
    if (!ok)
        fail(what);
}

void require_zero(const uint8_t* begin, const uint8_t* end) {
    require(std::all_of(begin, end, [](uint8_t byte) { return byte == 0; }), "bytes between two sections are not zero");
}

uint64_t outputs_of_block(Kind kind) { return kind == Kind::bf16 ? 64 : kind == Kind::int8 ? 128 : 256; }

// Sections in their order: where each begins, and how many bytes of it count. Absent: 0, 0.
struct Section {
    uint64_t at, bytes;
};
struct Layout {
    Section threshold, replacement, offset, scale, bias, values;
};

// With n, k < 2^31 no product of sizes reaches 2^64: the largest one is n_pad / 64 * 128 * k < 2^63 + 2^40.
Layout layout_of(const View& w, uint32_t flags) {
    uint64_t end = sizeof(Header);
    const auto section = [&](bool present, uint64_t bytes) {
        const Section at = present ? Section{end, bytes} : Section{};
        end += present ? round_up(bytes, alignment) : 0;
        return at;
    };
    Layout at;
    at.threshold = section(true, 4 * (w.threshold_step ? w.k : 1));
    at.replacement = section(flags & replaced, 4 * (w.replacement_step ? w.k : 1));
    at.offset = section(flags & replaced, 4 * w.n);
    at.scale = section(w.kind != Kind::bf16, w.n_pad * (w.group ? w.segments : 1) * (w.scales_f32 ? 4 : 2));
    at.bias = section(flags & bias_flag, 4 * w.n);
    at.values = section(true, w.blocks * w.k * block_bytes);
    return at;
}

}  // namespace

View parse(const uint8_t* blob, size_t bytes) {
    if (bytes < sizeof(Header))
        fail("only " + std::to_string(bytes) + " bytes, shorter than the header of 128");
    const Header h = load<Header>(blob);
    require(h.magic == magic, "wrong magic number, this is not a SAM1 blob");
    if (h.version != format_version)
        fail("format version " + std::to_string(h.version) + " is not known to this release, which reads version 1: update nncf-ext");
    require(h.header_bytes == sizeof(Header), "header_bytes is not 128");
    require(h.kind >= 1 && h.kind <= 3, "unknown value kind");
    constexpr uint32_t known = bias_flag | f32_scales | thresholds | replacements | replaced;
    require(!(h.flags & ~known), "unknown flags");
    require((h.flags & replaced) || !(h.flags & replacements), "flags say that inputs have replacements, and that there are none");
    const auto zero = [](uint64_t v) { return v == 0; };
    require(std::all_of(h.zeros, h.zeros + 3, zero) && std::all_of(h.more_zeros, h.more_zeros + 2, zero), "a reserved field is not zero");
    View w{};
    w.kind = Kind(h.kind);
    if (w.kind == Kind::bf16)
        require(h.group == 0 && !(h.flags & f32_scales), "a bf16 blob has scales");
    else
        require(h.group == 0 || h.group == 64 || h.group == 128, "group is not 0, 64 or 128");
    require(h.n >= 1 && h.k >= 1 && !(h.n >> 31) && !(h.k >> 31), "N or K is not in 1..2^31-1");
    w.block_n = outputs_of_block(w.kind);
    require(h.n_pad == round_up(h.n, w.block_n), "Npad is wrong");
    require(std::isfinite(h.centre), "the centre is not finite");
    w.scales_f32 = h.flags & f32_scales;
    w.n = h.n, w.k = h.k, w.n_pad = h.n_pad, w.group = h.group;
    w.segment = w.kind == Kind::bf16 ? chunk_k : h.group ? h.group : default_segment;
    w.blocks = h.n_pad / w.block_n;
    w.chunks = (h.k + chunk_k - 1) / chunk_k;
    w.segments = (h.k + w.segment - 1) / w.segment;
    w.threshold_step = h.flags & thresholds ? 1 : 0;
    w.replacement_step = h.flags & replacements ? 1 : 0;
    w.centre = h.centre;
    // Offsets are compared with what the sizes demand: one legal layout cannot overlap itself.
    const Layout at = layout_of(w, h.flags);
    require(h.off_threshold == at.threshold.at && h.off_replacement == at.replacement.at && h.off_offset == at.offset.at &&
                h.off_scale == at.scale.at && h.off_bias == at.bias.at && h.off_val == at.values.at,
            "section offsets differ from the layout of this matrix");
    const uint64_t expected = at.values.at + at.values.bytes;
    if (h.blob_bytes != expected || expected != bytes)
        fail("the matrix needs " + std::to_string(expected) + " bytes, the header says " + std::to_string(h.blob_bytes) +
             ", the tensor has " + std::to_string(bytes));
    const auto address = [&](const Section& section) { return section.at ? blob + section.at : nullptr; };
    w.threshold = address(at.threshold), w.replacement = address(at.replacement), w.offset = address(at.offset);
    w.scales = address(at.scale), w.bias = address(at.bias), w.values = address(at.values);
    return w;
}

namespace {

void validate_scales(const View& w, uint64_t group) {
    for (uint64_t c = 0, i = group * w.n_pad; c < w.n_pad; c++, i++) {
        const uint16_t half = w.scales_f32 ? 0 : load<uint16_t>(w.scales + 2 * i);
        const bool finite = w.scales_f32 ? std::isfinite(load<float>(w.scales + 4 * i)) : (half & 0x7C00) != 0x7C00;
        const bool zero = w.scales_f32 ? load<float>(w.scales + 4 * i) == 0 : !(half & 0x7FFF);
        require(finite && (c < w.n || zero), "a scale is not finite, or padding has one");
    }
}

void validate_padding(const View& w, uint64_t k) {  // only the last block has any
    for (uint64_t c = w.n - (w.blocks - 1) * w.block_n; c < w.block_n; c++)
        require(weight_at(w.kind, w.values + ((k + 1) * w.blocks - 1) * block_bytes, c) == 0, "padding holds a weight");
}

// The bytes of a section and the zeros to the next one.
template <class Accepts>
void validate_floats(const uint8_t* at, uint64_t count, const Accepts& accepts, const char* what) {
    for (uint64_t i = 0; i < count; i++)
        require(accepts(load<float>(at + 4 * i)), what);
    require_zero(at + 4 * count, at + round_up(4 * count, alignment));
}

}  // namespace

void validate_content(const View& w) {
    validate_floats(w.threshold, w.threshold_step ? w.k : 1, [](float v) { return !std::isnan(v); }, "a threshold is no number");
    const auto any = [](float) { return true; };
    if (w.replacement) {
        validate_floats(
            w.replacement, w.replacement_step ? w.k : 1, [](float v) { return std::isfinite(v); }, "a replacement is not finite");
        validate_floats(w.offset, w.n, any, "");
    }
    if (w.bias)
        validate_floats(w.bias, w.n, any, "");
    if (w.scales)
        parallel_each(w.group ? w.segments : 1, [&](uint64_t group) { validate_scales(w, group); });
    if (w.n < w.n_pad)
        parallel_each(w.k, [&](uint64_t k) { validate_padding(w, k); });
}

void validate(const uint8_t* blob, size_t bytes) { validate_content(parse(blob, bytes)); }

void validate_checksum(const uint8_t* blob, size_t bytes) {
    require(load<Header>(blob).crc == crc32(blob + sizeof(Header), bytes - sizeof(Header)),
            "the checksum does not match: some bytes have changed. Copy the model again");
}

}  // namespace ov_ext::sparse_activation
