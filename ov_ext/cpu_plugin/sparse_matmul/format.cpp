#include "format.hpp"

#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "../support/parallel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

template <class T>
T load(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

[[noreturn]] void fail(const std::string& what) { throw InvalidBlob("SPW1 blob: " + what); }

void require(bool ok, const char* what) {
    if (!ok)
        fail(what);
}

std::string number(uint64_t v) { return std::to_string(v); }

// Section offsets follow from the sizes alone, so a blob has exactly one legal layout. Products cannot overflow: n, k < 2^31 and
// checked() guards the two that exceed 64 bits in theory.
uint64_t checked(unsigned __int128 v) {
    if (v >> 62)
        fail("the matrix is too large");
    return uint64_t(v);
}

struct Layout {
    uint64_t dir, mask = 0, scale = 0, comp = 0, bias = 0, val;
};

Layout layout_of(Kind kind, bool dense, bool f32, bool has_bias, uint64_t n, uint64_t n_pad, uint64_t k_pad, uint64_t group) {
    const uint64_t blocks = n_pad / block_n, tiles = k_pad / (16 * row_inputs(kind));
    const uint64_t chunks = (k_pad + chunk_k - 1) / chunk_k;
    Layout at;
    unsigned __int128 end = sizeof(Header);
    auto section = [&](unsigned __int128 bytes) {
        const uint64_t start = checked(end);
        end = (end + bytes + alignment - 1) / alignment * alignment;
        return start;
    };
    at.dir = section(8 * ((unsigned __int128)blocks * chunks + 1));
    if (!dense)
        at.mask = section((unsigned __int128)blocks * tiles * 64 * mask_bytes_per_row(kind));
    if (kind != Kind::bf16) {
        const uint64_t groups = group ? k_pad / group : 1;
        at.scale = section((unsigned __int128)n_pad * groups * (f32 ? 4 : 2));
        at.comp = section((unsigned __int128)n_pad * (k_pad / segment_inputs(group)) * 2);
    }
    if (has_bias)
        at.bias = section((unsigned __int128)n * 4);
    at.val = checked(end);
    return at;
}

uint32_t crc32(const uint8_t* data, size_t bytes) {  // the polynomial and bit order of zlib, eight bytes a step
    static const auto tables = [] {
        std::array<std::array<uint32_t, 256>, 8> t{};
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++)
                c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            t[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; i++)
            for (int s = 1; s < 8; s++)
                t[s][i] = t[0][t[s - 1][i] & 255] ^ (t[s - 1][i] >> 8);
        return t;
    }();
    uint32_t crc = 0xFFFFFFFFu;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        const uint64_t v = load<uint64_t>(data) ^ crc;
        crc = 0;
        for (int s = 0; s < 8; s++)
            crc ^= tables[7 - s][v >> (8 * s) & 255];
    }
    for (; bytes; bytes--, data++)
        crc = tables[0][(crc ^ *data) & 255] ^ (crc >> 8);
    return ~crc;
}

int sign_extend(uint8_t nibble) { return (nibble ^ 8) - 8; }

// Which (output, input) element e of a row is, inside its block.
struct Position {
    uint64_t column, input;
};
Position position(const BlobView& w, uint64_t tile, uint64_t panel, uint64_t row, uint64_t e) {
    return {panel * 16 + e / w.row_k, (tile * 16 + row) * w.row_k + e % w.row_k};
}

uint64_t mask_of(const BlobView& w, uint64_t block, uint64_t tile, uint64_t panel, uint64_t row) {
    if (w.dense)
        return w.kind == Kind::bf16 ? 0xFFFFFFFFull : ~0ull;
    const uint64_t index = ((block * w.tiles + tile) * 4 + panel) * 16 + row;
    return w.kind == Kind::bf16 ? load<uint32_t>(w.masks + 4 * index) : load<uint64_t>(w.masks + 8 * index);
}

// Counts the bits of a chunk's masks by stream: [0] all rows (bf16, int8) or even rows (int4), [1] odd rows.
std::array<uint64_t, 2> count_bits(const BlobView& w, uint64_t block, uint64_t first_tile, uint64_t last_tile) {
    std::array<uint64_t, 2> counts{};
    for (uint64_t tile = first_tile; tile < last_tile; tile++)
        for (uint64_t panel = 0; panel < 4; panel++)
            for (uint64_t row = 0; row < 16; row++)
                counts[w.kind == Kind::int4 ? row & 1 : 0] += __builtin_popcountll(mask_of(w, block, tile, panel, row));
    return counts;
}

uint64_t run_bytes(Kind kind, const std::array<uint64_t, 2>& counts) {
    if (kind == Kind::int4)
        return counts[0] > counts[1] ? counts[0] : counts[1];
    return counts[0] * (kind == Kind::bf16 ? 2 : 1);
}

uint64_t directory_entry(const BlobView& w, uint64_t index) { return load<uint64_t>(w.directory + 8 * index); }

void require_zero(const uint8_t* p, uint64_t bytes, const char* what) {
    for (uint64_t i = 0; i < bytes; i++)
        require(p[i] == 0, what);
}

// Bits of a row's mask that lie inside the matrix.
uint64_t inside_mask(const BlobView& w, uint64_t block, uint64_t tile, uint64_t panel, uint64_t row) {
    const uint64_t elements = 16 * w.row_k, all = elements == 64 ? ~0ull : (1ull << elements) - 1;
    const uint64_t column = block * block_n + panel * 16, input = (tile * 16 + row) * w.row_k;
    if (column + 16 <= w.n && input + w.row_k <= w.k)
        return all;
    const uint64_t columns = column < w.n ? std::min<uint64_t>(16, w.n - column) : 0;
    const uint64_t inputs = input < w.k ? std::min(w.row_k, w.k - input) : 0;
    uint64_t mask = 0;
    for (uint64_t c = 0; c < columns; c++)
        mask |= ((1ull << inputs) - 1) << (c * w.row_k);
    return mask;
}

// Spreads the stored elements of one row over its 64 places, without branches. Reads at most one byte past the run: the slack allows it.
template <Kind kind>
void expand_row(const uint8_t* run, uint64_t& cursor, bool odd, uint64_t mask, int8_t values[64]) {
    for (int e = 0; e < 64; e++) {
        const int stored = int(mask >> e & 1), byte = run[cursor];
        const int value = kind == Kind::int8 ? int8_t(byte) : sign_extend(uint8_t(odd ? byte >> 4 : byte & 15));
        values[e] = int8_t(value * stored);
        cursor += uint64_t(stored);
    }
}

// Checks masks, values and integer sums of one run; its length is proven already. sums: [segment][64].
template <Kind kind>
void validate_run(const BlobView& w, uint64_t block, uint64_t first, uint64_t last, const uint8_t* run, int32_t* sums) {
    uint64_t cursor[2] = {0, 0};
    for (uint64_t tile = first; tile < last; tile++)
        for (uint64_t panel = 0; panel < 4; panel++)
            for (uint64_t row = 0; row < 16; row++) {
                const uint64_t mask = mask_of(w, block, tile, panel, row), inside = inside_mask(w, block, tile, panel, row);
                require(w.dense || !(mask & ~inside), "padding holds an element");
                if constexpr (kind == Kind::bf16) {
                    const uint8_t* at = run + 2 * cursor[0];
                    cursor[0] += uint64_t(__builtin_popcountll(mask));
                    for (uint64_t outside = mask & ~inside; outside; outside &= outside - 1)  // dense, at the edges
                        require(!(load<uint16_t>(at + 2 * __builtin_ctzll(outside)) & 0x7FFF), "padding holds an element");
                } else {
                    int8_t values[64];
                    expand_row<kind>(run, cursor[kind == Kind::int4 ? row & 1 : 0], row & 1, mask, values);
                    int nonzero = 0;
                    for (int e = 0; e < 64; e++)
                        nonzero += values[e] != 0;
                    require(w.dense || nonzero == __builtin_popcountll(mask), "a stored element is zero");
                    for (uint64_t outside = mask & ~inside; outside; outside &= outside - 1)
                        require(values[__builtin_ctzll(outside)] == 0, "padding holds an element");
                    int32_t* sum = sums + tile * 64 / w.segment * block_n + panel * 16;
                    for (int c = 0; c < 16; c++)
                        sum[c] += values[4 * c] + values[4 * c + 1] + values[4 * c + 2] + values[4 * c + 3];
                }
            }
    if (kind == Kind::bf16 && !w.dense)
        for (uint64_t i = 0; i < cursor[0]; i++)
            require(load<uint16_t>(run + 2 * i) & 0x7FFF, "a stored element is zero");
}

void validate_scales(const BlobView& w, uint64_t block, const int32_t* sums) {
    const uint64_t columns = std::min(block_n, w.n - block * block_n), segments = w.k_pad / w.segment;
    for (uint64_t i = 0; i < segments * block_n; i++)
        require(load<int16_t>(w.compensation + 2 * (block * segments * block_n + i)) == sums[i],
                "the compensation does not match the values");
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

// Checks one block; returns its number of stored elements.
uint64_t validate_block(const BlobView& w, uint64_t block) {
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
        validate_scales(w, block, sums.data());
    return stored;
}

// Runs body(block) for all blocks in parallel; the first InvalidBlob wins and is thrown on the caller's thread.
template <class Body>
void for_blocks(uint64_t blocks, const Body& body) {
    std::mutex mutex;
    std::string error;
    std::atomic<bool> failed{false};
    parallel_ranges(blocks, [&](uint64_t first, uint64_t last) {
        try {
            for (uint64_t b = first; b < last && !failed; b++)
                body(b);
        } catch (const InvalidBlob& e) {
            std::lock_guard<std::mutex> lock(mutex);
            error = e.what();
            failed = true;
        }
    });
    if (failed)
        throw InvalidBlob(error);
}

BlobView view_of(const uint8_t* blob, const Header& h, const Layout& at) {
    BlobView w{};
    w.kind = Kind(h.kind);
    w.dense = h.flags & dense_flag;
    w.scales_f32 = h.flags & f32_scales;
    w.n = h.n, w.k = h.k, w.n_pad = h.n_pad, w.k_pad = h.k_pad, w.group = h.group;
    w.segment = w.kind == Kind::bf16 ? 0 : segment_inputs(h.group);
    w.row_k = h.row_k;
    w.blocks = h.n_pad / block_n;
    w.tiles_per_chunk = chunk_k / (16 * w.row_k);
    w.tiles = h.k_pad / (16 * w.row_k);
    w.chunks = (h.k_pad + chunk_k - 1) / chunk_k;
    w.nnz = h.nnz;
    w.directory = blob + at.dir;
    w.masks = at.mask ? blob + at.mask : nullptr;
    w.values = blob + at.val;
    w.scales = at.scale ? blob + at.scale : nullptr;
    w.compensation = at.comp ? blob + at.comp : nullptr;
    w.bias = at.bias ? blob + at.bias : nullptr;
    return w;
}

Header header_of(const PlainWeight& p) {
    if (p.n < 1 || p.k < 1 || p.n >> 31 || p.k >> 31)
        fail("N and K must lie in 1..2^31-1, got N = " + number(p.n) + ", K = " + number(p.k));
    if (p.kind == Kind::bf16 ? p.group != 0 : p.group != 0 && p.group != 64 && p.group != 128)
        fail("scale groups are 64, 128 or 0, got " + number(p.group));
    require((p.scales != nullptr) == (p.kind != Kind::bf16), "integer kinds need scales, bf16 has none");
    Header h{};
    h.magic = magic, h.version = format_version, h.header_bytes = sizeof(Header);
    h.kind = uint8_t(p.kind), h.row_k = uint8_t(row_inputs(p.kind)), h.panel_n = 16, h.block_panels = 4;
    h.flags = (p.bias ? bias_flag : 0) | (p.dense ? dense_flag : 0);
    if (p.kind != Kind::bf16)
        h.flags |= (p.group ? group_scales : column_scales) | (p.scales_f32 ? f32_scales : 0);
    h.n = p.n, h.k = p.k, h.n_pad = round_up(p.n, block_n), h.k_pad = padded_inputs(p.kind, p.k, p.group);
    h.group = uint32_t(p.group), h.chunk_k = chunk_k;
    return h;
}

// The integer (or the bit pattern) at one position of a plain weight; padding is 0.
int plain_value(const PlainWeight& p, uint64_t n, uint64_t k) {
    if (n >= p.n || k >= p.k)
        return 0;
    if (p.kind != Kind::bf16)
        return static_cast<const int8_t*>(p.values)[n * p.k + k];
    const uint16_t bits = static_cast<const uint16_t*>(p.values)[n * p.k + k];
    return p.dense || (bits & 0x7FFF) ? bits : 0;
}

// Writes the masks and values of one (block, chunk) and returns the bytes of the run. Null outputs only count.
uint64_t pack_run(const PlainWeight& p, const BlobView& w, uint64_t block, uint64_t chunk, uint8_t* masks, uint8_t* run) {
    const uint64_t first = chunk * w.tiles_per_chunk, last = std::min(w.tiles, first + w.tiles_per_chunk);
    std::array<uint64_t, 2> cursor{};
    for (uint64_t tile = first; tile < last; tile++)
        for (uint64_t panel = 0; panel < 4; panel++)
            for (uint64_t row = 0; row < 16; row++) {
                uint64_t mask = 0;
                for (uint64_t c = 0, e = 0; c < 16; c++)
                    for (uint64_t j = 0; j < w.row_k; j++, e++) {
                        const int value = plain_value(p, block * block_n + panel * 16 + c, (tile * 16 + row) * w.row_k + j);
                        if (value == 0 && !w.dense)
                            continue;
                        mask |= 1ull << e;
                        uint64_t& at = cursor[w.kind == Kind::int4 ? row & 1 : 0];
                        if (run) {
                            if (w.kind == Kind::bf16)
                                run[2 * at] = uint8_t(value), run[2 * at + 1] = uint8_t(value >> 8);
                            else if (w.kind == Kind::int8)
                                run[at] = uint8_t(value);
                            else
                                run[at] |= uint8_t((value & 15) << (row & 1 ? 4 : 0));
                        }
                        at++;
                    }
                if (masks) {
                    const uint64_t index = ((block * w.tiles + tile) * 4 + panel) * 16 + row;
                    if (w.kind == Kind::bf16) {
                        const uint32_t narrow = uint32_t(mask);
                        std::memcpy(masks + 4 * index, &narrow, 4);
                    } else {
                        std::memcpy(masks + 8 * index, &mask, 8);
                    }
                }
            }
    return run_bytes(w.kind, cursor);
}

// Length of every run and the directory that follows from them.
std::vector<uint64_t> directory_of(const PlainWeight& p, const BlobView& w) {
    std::vector<uint64_t> directory(w.blocks * w.chunks + 1);
    parallel_ranges(w.blocks, [&](uint64_t begin, uint64_t end) {
        for (uint64_t i = begin * w.chunks; i < end * w.chunks; i++)
            directory[i + 1] = pack_run(p, w, i / w.chunks, i % w.chunks, nullptr, nullptr);
    });
    for (uint64_t i = 0; i < w.blocks * w.chunks; i++) {
        directory[i + 1] += directory[i];
        if ((i + 1) % w.chunks == 0)
            directory[i + 1] = round_up(directory[i + 1], alignment);
    }
    return directory;
}

}  // namespace

const char* kind_name(Kind kind) { return kind == Kind::bf16 ? "bf16" : kind == Kind::int8 ? "int8" : "int4"; }

Kind kind_from_name(const std::string& name) {
    for (Kind kind : {Kind::bf16, Kind::int8, Kind::int4})
        if (name == kind_name(kind))
            return kind;
    throw InvalidBlob("unknown value kind '" + name + "': bf16, int8 or int4 is needed");
}

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
    require(h.row_k == row_inputs(kind) && h.panel_n == 16 && h.block_panels == 4 && h.chunk_k == chunk_k,
            "row, panel, block or chunk constants differ from version 1");
    constexpr uint32_t known = bias_flag | column_scales | group_scales | dense_flag | f32_scales;
    require(!(h.flags & ~known), "unknown flags");
    const uint32_t scale_flags = h.flags & (column_scales | group_scales);
    if (kind == Kind::bf16)
        require(h.group == 0 && scale_flags == 0 && !(h.flags & f32_scales), "a bf16 blob has scales");
    else
        require((h.group == 0 || h.group == 64 || h.group == 128) && scale_flags == (h.group ? group_scales : column_scales),
                "group and scale flags disagree");
    require(h.n >= 1 && h.k >= 1 && !(h.n >> 31) && !(h.k >> 31), "N or K is not in 1..2^31-1");
    require(h.n_pad == round_up(h.n, block_n) && h.k_pad == padded_inputs(kind, h.k, h.group), "Npad or Kpad is wrong");
    const Layout at =
        layout_of(kind, h.flags & dense_flag, h.flags & f32_scales, h.flags & bias_flag, h.n, h.n_pad, h.k_pad, h.group);
    require(h.off_dir == at.dir && h.off_mask == at.mask && h.off_val == at.val && h.off_scale == at.scale &&
                h.off_bias == at.bias && h.off_comp == at.comp,
            "section offsets differ from the layout of this matrix");
    if (h.blob_bytes != bytes)
        fail("the header says " + number(h.blob_bytes) + " bytes, the tensor has " + number(bytes));
    require(bytes >= at.val && bytes - at.val >= alignment, "the blob ends before its values");
    BlobView w = view_of(blob, h, at);
    w.value_bytes = bytes - at.val - alignment;
    require(directory_entry(w, 0) == 0 && directory_entry(w, w.blocks * w.chunks) == w.value_bytes,
            "the directory does not span the value section");
    return w;
}

void validate_content(const BlobView& w) {
    std::atomic<uint64_t> stored{0};
    for_blocks(w.blocks, [&](uint64_t block) { stored += validate_block(w, block); });
    require(w.nnz == (w.dense ? w.n * w.k : stored.load()), "nnz does not match the stored elements");
    require_zero(w.values + w.value_bytes, alignment, "the slack after the values is not zero");
}

void validate(const uint8_t* blob, size_t bytes) { validate_content(parse(blob, bytes)); }

uint64_t packed_bytes(const PlainWeight& p) {
    const Header h = header_of(p);
    const Layout at = layout_of(p.kind, p.dense, h.flags & f32_scales, p.bias, h.n, h.n_pad, h.k_pad, h.group);
    const BlobView w = view_of(nullptr, h, at);
    return at.val + directory_of(p, w).back() + alignment;
}

void pack(const PlainWeight& p, uint8_t* blob, uint64_t bytes) {
    Header h = header_of(p);
    const Layout at = layout_of(p.kind, p.dense, h.flags & f32_scales, p.bias, h.n, h.n_pad, h.k_pad, h.group);
    const BlobView w = view_of(blob, h, at);
    const auto directory = directory_of(p, w);
    if (bytes != at.val + directory.back() + alignment)
        fail("pack needs a buffer of " + number(at.val + directory.back() + alignment) + " bytes, got " + number(bytes));
    std::memset(blob, 0, bytes);
    std::memcpy(blob + at.dir, directory.data(), 8 * directory.size());
    if (p.bias)
        std::memcpy(blob + at.bias, p.bias, 4 * p.n);
    std::atomic<uint64_t> nnz{0};
    for_blocks(w.blocks, [&](uint64_t block) {
        for (uint64_t chunk = 0; chunk < w.chunks; chunk++) {
            const uint64_t first = chunk * w.tiles_per_chunk;
            pack_run(p, w, block, chunk, p.dense ? nullptr : blob + at.mask, blob + at.val + directory[block * w.chunks + chunk]);
            const auto counts = count_bits(w, block, first, std::min(w.tiles, first + w.tiles_per_chunk));
            nnz += counts[0] + counts[1];
        }
        if (!w.segment)
            return;
        const uint64_t segments = w.k_pad / w.segment, groups = w.group ? w.k_pad / w.group : 1;
        const uint64_t real_groups = w.group ? (w.k + w.group - 1) / w.group : 1, width = w.scales_f32 ? 4 : 2;
        for (uint64_t c = 0; c < block_n && block * block_n + c < p.n; c++) {
            const uint64_t n = block * block_n + c;
            for (uint64_t s = 0; s < segments; s++) {
                int16_t sum = 0;
                for (uint64_t k = s * w.segment; k < std::min(p.k, (s + 1) * w.segment); k++)
                    sum = int16_t(sum + plain_value(p, n, k));
                std::memcpy(blob + at.comp + 2 * ((block * segments + s) * block_n + c), &sum, 2);
            }
            for (uint64_t g = 0; g < real_groups; g++)
                std::memcpy(blob + at.scale + width * ((block * groups + g) * block_n + c),
                            static_cast<const uint8_t*>(p.scales) + width * (n * real_groups + g), width);
        }
    });
    h.nnz = p.dense ? p.n * p.k : nnz.load();
    h.off_dir = at.dir, h.off_mask = at.mask, h.off_val = at.val, h.off_scale = at.scale, h.off_bias = at.bias, h.off_comp = at.comp;
    h.blob_bytes = bytes;
    h.crc = crc32(blob + sizeof(Header), bytes - sizeof(Header));
    std::memcpy(blob, &h, sizeof(Header));
}

void unpack(const BlobView& w, void* values, void* scales, float* bias) {
    for_blocks(w.blocks, [&](uint64_t block) {
        const uint64_t columns = std::min(block_n, w.n - block * block_n), width = w.kind == Kind::bf16 ? 2 : 1;
        auto* out = static_cast<uint8_t*>(values);
        if (out)
            std::memset(out + block * block_n * w.k * width, 0, columns * w.k * width);
        for (uint64_t chunk = 0; out && chunk < w.chunks; chunk++) {
            const uint8_t* run = w.values + directory_entry(w, block * w.chunks + chunk);
            uint64_t cursor[2] = {0, 0};
            const uint64_t first = chunk * w.tiles_per_chunk, last = std::min(w.tiles, first + w.tiles_per_chunk);
            for (uint64_t tile = first; tile < last; tile++)
                for (uint64_t panel = 0; panel < 4; panel++)
                    for (uint64_t row = 0; row < 16; row++)
                        for (uint64_t mask = mask_of(w, block, tile, panel, row); mask; mask &= mask - 1) {
                            const auto [column, input] = position(w, tile, panel, row, __builtin_ctzll(mask));
                            uint64_t& at = cursor[w.kind == Kind::int4 ? row & 1 : 0];
                            const uint64_t t = at++;
                            if (column >= columns || input >= w.k)
                                continue;
                            uint8_t* to = out + ((block * block_n + column) * w.k + input) * width;
                            if (w.kind == Kind::bf16)
                                std::memcpy(to, run + 2 * t, 2);
                            else if (w.kind == Kind::int8)
                                *to = run[t];
                            else
                                *to = uint8_t(sign_extend(row & 1 ? run[t] >> 4 : run[t] & 15));
                        }
        }
        const uint64_t groups = w.group ? w.k_pad / w.group : 1, real_groups = w.group ? (w.k + w.group - 1) / w.group : 1;
        const uint64_t scale_width = w.scales_f32 ? 4 : 2;
        for (uint64_t c = 0; scales && w.scales && c < columns; c++)
            for (uint64_t g = 0; g < real_groups; g++)
                std::memcpy(static_cast<uint8_t*>(scales) + scale_width * ((block * block_n + c) * real_groups + g),
                            w.scales + scale_width * ((block * groups + g) * block_n + c), scale_width);
    });
    if (bias && w.bias)
        std::memcpy(bias, w.bias, 4 * w.n);
}

}  // namespace ov_ext::sparse_matmul
