// Reading a blob that nobody vouches for: the header in constant time, the content once.
//
// Whatever is checked here, kernels do not check again. The order matters: no byte is read before its address is known to lie in the blob,
// and no number is multiplied before it is known to be small enough.
#include <cmath>
#include <vector>

#include "layout.hpp"

namespace ov_ext::sparse_matmul {
namespace {

void require_zero(const uint8_t* p, uint64_t bytes, const char* what) {
    for (uint64_t i = 0; i < bytes; i++)
        require(p[i] == 0, what);
}

// Bits of a slice's mask that lie inside the matrix. Bit c * slice_k + j is input j of output c, so at the last outputs the upper part of
// the mask is cut off, and at the last inputs the upper part of every group of slice_k bits.
uint64_t inside_mask(const BlobView& w, uint64_t block, uint64_t tile, uint64_t panel, uint64_t slice) {
    const uint64_t elements = panel_n * w.slice_k, all = elements == 64 ? ~0ull : (1ull << elements) - 1;
    const uint64_t column = block * block_n + panel * panel_n, input = (tile * panel_slices + slice) * w.slice_k;
    if (column + panel_n <= w.n && input + w.slice_k <= w.k)
        return all;
    const uint64_t columns = column < w.n ? std::min<uint64_t>(panel_n, w.n - column) : 0;
    const uint64_t inputs = input < w.k ? std::min(w.slice_k, w.k - input) : 0;
    uint64_t mask = 0;
    for (uint64_t c = 0; c < columns; c++)
        mask |= ((1ull << inputs) - 1) << (c * w.slice_k);
    return mask;
}

// Spreads the stored elements of one slice over its 64 places, without branches, which random masks would mislead. Reads at most one byte
// past the run: the slack allows it.
template <Kind kind>
void expand_slice(const uint8_t* run, uint64_t& cursor, bool odd, uint64_t mask, int8_t values[slice_bytes]) {
    for (uint64_t e = 0; e < slice_bytes; e++) {
        const int stored = int(mask >> e & 1), byte = run[cursor];
        const int value = kind == Kind::int8 ? int8_t(byte) : sign_extend(uint8_t(odd ? byte >> 4 : byte & 15));
        values[e] = int8_t(value * stored);
        cursor += uint64_t(stored);
    }
}

// Checks masks, values and integer sums of one run; its length is proven already. sums: [segment][block_n].
template <Kind kind>
void validate_run(const BlobView& w, uint64_t block, uint64_t first, uint64_t last, const uint8_t* run, int32_t* sums) {
    uint64_t cursor[2] = {0, 0};
    for (uint64_t tile = first; tile < last; tile++)
        for (uint64_t panel = 0; panel < block_panels; panel++)
            for (uint64_t slice = 0; slice < panel_slices; slice++) {
                const uint64_t mask = mask_of(w, block, tile, panel, slice), inside = inside_mask(w, block, tile, panel, slice);
                // Dense slices have all mask bits, also in the padding: there the values are looked at, below.
                require(w.dense || !(mask & ~inside), "padding holds an element");
                if constexpr (kind == Kind::bf16) {
                    const uint8_t* at = run + 2 * cursor[0];
                    cursor[0] += uint64_t(__builtin_popcountll(mask));
                    for (uint64_t outside = mask & ~inside; outside; outside &= outside - 1)  // dense, at the edges
                        require(!(load<uint16_t>(at + 2 * __builtin_ctzll(outside)) & 0x7FFF), "padding holds an element");
                } else {
                    int8_t values[slice_bytes];
                    expand_slice<kind>(run, cursor[kind == Kind::int4 ? slice & 1 : 0], slice & 1, mask, values);
                    int nonzero = 0;
                    for (uint64_t e = 0; e < slice_bytes; e++)
                        nonzero += values[e] != 0;
                    require(w.dense || nonzero == __builtin_popcountll(mask), "a stored element is zero");
                    for (uint64_t outside = mask & ~inside; outside; outside &= outside - 1)
                        require(values[__builtin_ctzll(outside)] == 0, "padding holds an element");
                    // For the compensation. Both integer kinds have 4 inputs in a slice, and a k tile never crosses a segment.
                    int32_t* sum = sums + tile * tile_inputs(kind) / w.segment * block_n + panel * panel_n;
                    for (int c = 0; c < panel_n; c++)
                        sum[c] += values[4 * c] + values[4 * c + 1] + values[4 * c + 2] + values[4 * c + 3];
                }
            }
    // Stored values lie one after the other, so this needs no masks. The sign does not count: -0.0 is a zero.
    if (kind == Kind::bf16 && !w.dense)
        for (uint64_t i = 0; i < cursor[0]; i++)
            require(load<uint16_t>(run + 2 * i) & 0x7FFF, "a stored element is zero");
}

// Wrong compensation could not make a kernel leave the blob, but results would depend on the CPU: only kernels with u8 activations use it.
void validate_compensation(const BlobView& w, uint64_t block, const std::vector<int32_t>& sums) {
    for (uint64_t i = 0; i < sums.size(); i++)
        require(load<int16_t>(w.compensation + 2 * (block * sums.size() + i)) == sums[i], "the compensation does not match the values");
}

// A scale that is not finite would turn even a segment without elements, whose sum is 0, into NaN.
void validate_scales(const BlobView& w, uint64_t block) {
    const uint64_t columns = std::min(block_n, w.n - block * block_n);
    const uint64_t groups = w.group ? w.k_pad / w.group : 1, real_groups = w.group ? (w.k + w.group - 1) / w.group : 1;
    for (uint64_t g = 0; g < groups; g++)
        for (uint64_t c = 0; c < block_n; c++) {
            const uint64_t i = (block * groups + g) * block_n + c;
            const bool padding = c >= columns || g >= real_groups;
            if (w.scales_f32) {
                const float s = load<float>(w.scales + 4 * i);
                require(std::isfinite(s) && (!padding || s == 0), "a scale is not finite, or padding has one");
            } else {
                const uint16_t s = load<uint16_t>(w.scales + 2 * i);
                require((s & 0x7C00) != 0x7C00 && (!padding || !(s & 0x7FFF)), "a scale is not finite, or padding has one");
            }
        }
}

// Checks one block; returns its number of stored elements. all_sums: of all blocks, or null. Blocks are checked in parallel, so each one proves the directory entries that it
// uses, its end included, before it follows them. Masks need no such proof: where they lie follows from the sizes.
uint64_t validate_block(const BlobView& w, uint64_t block, int16_t* all_sums) {
    uint64_t stored = 0;
    require(directory_entry(w, block * w.chunks) % alignment == 0, "a block of values does not start at a multiple of 64");
    std::vector<int32_t> sums(w.segment ? w.k_pad / w.segment * block_n : 0);
    for (uint64_t chunk = 0; chunk < w.chunks; chunk++) {
        const uint64_t first = chunk * w.tiles_per_chunk, last = std::min(w.tiles, first + w.tiles_per_chunk);
        const uint64_t start = directory_entry(w, block * w.chunks + chunk), end = directory_entry(w, block * w.chunks + chunk + 1);
        require(start <= end && end <= w.value_bytes, "the directory is not monotone or leaves the value section");
        const auto counts = count_bits(w, block, first, last);
        const uint64_t used = run_bytes(w.kind, counts);
        require(used <= end - start, "the masks of a chunk count more values than its run holds");
        // A run has exactly one legal length, so nothing can be hidden between two runs, and none can overlap another.
        const uint64_t expected = chunk + 1 == w.chunks ? round_up(start + used, alignment) : start + used;
        require(end == expected, "the run of a chunk has a wrong length");
        const uint8_t* run = w.values + start;
        require_zero(run + used, end - start - used, "the fill after a run is not zero");
        stored += counts[0] + counts[1];
        if (w.kind == Kind::bf16)
            validate_run<Kind::bf16>(w, block, first, last, run, sums.data());
        else if (w.kind == Kind::int8)
            validate_run<Kind::int8>(w, block, first, last, run, sums.data());
        else
            validate_run<Kind::int4>(w, block, first, last, run, sums.data());
        if (w.kind == Kind::int4) {  // the shorter stream's unused nibbles
            const int shorter = counts[0] < counts[1] ? 0 : 1;
            for (uint64_t t = counts[size_t(shorter)]; t < used; t++)
                require((shorter ? run[t] >> 4 : run[t] & 15) == 0, "an unused nibble is not zero");
        }
    }
    if (w.segment)
        validate_scales(w, block);
    if (w.compensation)
        validate_compensation(w, block, sums);
    if (all_sums)
        std::copy(sums.begin(), sums.end(), all_sums + block * sums.size());  // of 128 codes of a byte: 16 bits hold them
    return stored;
}

}  // namespace

BlobView parse(const uint8_t* blob, size_t bytes) {
    if (bytes < sizeof(Header))
        fail("only " + number(bytes) + " bytes, shorter than the header of 128");
    const Header h = load<Header>(blob);
    require(h.magic == magic, "wrong magic number, this is not an SPW1 blob");
    if (h.version != format_version)
        fail("format version " + number(h.version) + " is not known to this release, which reads version 1: update nncf-ext");
    require(h.header_bytes == sizeof(Header), "header_bytes is not 128");
    require(h.kind >= 1 && h.kind <= 3, "unknown value kind");
    const Kind kind = Kind(h.kind);
    require(h.slice_k == slice_inputs(kind) && h.panel_n == panel_n && h.block_panels == block_panels && h.chunk_k == chunk_k,
            "slice, panel, block or chunk constants differ from version 1");
    constexpr uint32_t known = bias_flag | column_scales | group_scales | dense_flag | f32_scales | no_compensation;
    require(!(h.flags & ~known), "unknown flags");
    const uint32_t scale_flags = h.flags & (column_scales | group_scales);
    if (kind == Kind::bf16)
        require(h.group == 0 && scale_flags == 0 && !(h.flags & (f32_scales | no_compensation)), "a bf16 blob has scales");
    else
        require((h.group == 0 || h.group == 64 || h.group == 128) && scale_flags == (h.group ? group_scales : column_scales),
                "group and scale flags disagree");
    // Before any formula: with n, k < 2^31 neither the rounding up below nor the products of layout_of overflow.
    require(h.n >= 1 && h.k >= 1 && !(h.n >> 31) && !(h.k >> 31), "N or K is not in 1..2^31-1");
    require(h.n_pad == round_up(h.n, block_n) && h.k_pad == padded_inputs(kind, h.k, h.group), "Npad or Kpad is wrong");
    // Offsets are compared with what the sizes demand, not checked for plausibility: one legal layout cannot overlap itself.
    const Layout at = layout_of(h);
    require(h.off_dir == at.dir && h.off_mask == at.mask && h.off_val == at.val && h.off_scale == at.scale && h.off_bias == at.bias &&
                h.off_comp == at.comp,
            "section offsets differ from the layout of this matrix");
    if (h.blob_bytes != bytes)
        fail("the header says " + number(h.blob_bytes) + " bytes, the tensor has " + number(bytes));
    // From here on the directory and all sections before the values are known to lie inside, and 64 bytes behind the values.
    require(bytes >= at.val && bytes - at.val >= alignment, "the blob ends before its values");
    BlobView w = view_of(blob, h, at);
    // The CRC is not compared: it guards transport (see validate_checksum), and would read the whole blob. Trust comes from validate_content.
    w.value_bytes = bytes - at.val - alignment;
    require(directory_entry(w, 0) == 0 && directory_entry(w, w.blocks * w.chunks) == w.value_bytes,
            "the directory does not span the value section");
    return w;
}

uint64_t number_of_sums(const BlobView& w) { return w.segment ? w.n_pad * (w.k_pad / w.segment) : 0; }

void validate_content(const BlobView& w, int16_t* sums) {
    std::atomic<uint64_t> stored{0};
    parallel_each(w.blocks, [&](uint64_t block) { stored += validate_block(w, block, sums); });
    require(w.nnz == (w.dense ? w.n * w.k : stored.load()), "nnz does not match the stored elements");
    require_zero(w.values + w.value_bytes, alignment, "the slack after the values is not zero");
}

void validate(const uint8_t* blob, size_t bytes) { validate_content(parse(blob, bytes)); }

void validate_checksum(const uint8_t* blob, size_t bytes) {
    require(load<Header>(blob).crc == crc32(blob + sizeof(Header), bytes - sizeof(Header)),
            "the checksum does not match: some bytes have changed. Copy the model again");
}

}  // namespace ov_ext::sparse_matmul
