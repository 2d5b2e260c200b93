// Seeds, and mutations that know the format. Random bytes almost never survive validation, so half of the changes are made to the decoded
// matrix and written out again by the independent encoder: those reach the kernels.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "harness.hpp"
#include "plain.hpp"

namespace {

using spw1::Plain;
using Bytes = std::vector<uint8_t>;

// Inputs bigger than this are slow and find nothing that smaller ones do not.
constexpr uint64_t max_weights = 60000;

int32_t some_value(int kind, Random& random) {
    if (kind == spw1::int4)
        return int32_t(random.below(16)) - 8;
    if (kind == spw1::int8)
        return random.one_in(4) ? (random.one_in(2) ? -128 : 127) : int32_t(random.below(256)) - 128;
    constexpr int32_t special[] = {0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x807F, 0x7F7F, 0x8000, 0x0080};
    return random.one_in(200) ? special[random.below(9)] : int32_t(0x3C00 + random.below(0x400) + (random.below(2) << 15));
}

uint32_t some_scale(bool f32, Random& random) {
    if (!f32)  // any finite one
        return random.one_in(8) ? uint32_t(random.below(2) << 15 | random.below(0x7C00)) : uint32_t(0x2000 + random.below(0x800));
    const uint32_t bits = uint32_t(random.below(2) << 31);
    return random.one_in(8) ? bits | uint32_t(random.below(0x7F800000)) : bits | uint32_t(0x3C000000 + random.below(0x2000000));
}

uint32_t some_bias(Random& random) { return random.one_in(8) ? uint32_t(random.next()) : uint32_t(0x3F000000 + random.below(0x1000000)); }

// Zero with a probability of `sparsity` in 256.
void fill(Plain& w, uint64_t sparsity, Random& random) {
    w.values.assign(w.n * w.k, 0);
    for (int32_t& value : w.values)
        if (random.below(256) >= sparsity)
            value = some_value(w.kind, random);
    // -0.0 is stored in a dense blob only.
    if (w.kind == spw1::bf16 && !w.dense)
        std::replace(w.values.begin(), w.values.end(), 0x8000, 0);
    w.scales.resize(w.n * w.groups());
    for (uint32_t& scale : w.scales)
        scale = some_scale(w.f32_scales, random);
    w.bias.resize(w.has_bias ? w.n : 0);
    for (uint32_t& bias : w.bias)
        bias = some_bias(random);
}

Plain some_weight(Random& random) {
    constexpr uint64_t inputs[] = {1, 3, 31, 33, 64, 65, 127, 129, 200, 511, 512, 513, 700, 1100};
    constexpr uint64_t outputs[] = {1, 15, 17, 63, 64, 65, 130};
    Plain w;
    w.kind = int(1 + random.below(3));
    w.group = w.kind == spw1::bf16 ? 0 : std::array<uint64_t, 3>{0, 64, 128}[random.below(3)];
    w.dense = random.one_in(3), w.has_bias = random.one_in(2), w.f32_scales = w.kind != spw1::bf16 && random.one_in(2);
    w.compensated = w.kind != spw1::bf16 && random.one_in(3);
    w.n = outputs[random.below(7)], w.k = inputs[random.below(14)];
    while (w.n * w.k > max_weights)
        w.n = (w.n + 1) / 2;
    constexpr uint64_t sparsities[] = {0, 64, 128, 230, 256};
    fill(w, sparsities[random.below(5)], random);
    return w;
}

// Another size; what both have in common stays.
void resize(Plain& w, uint64_t n, uint64_t k, Random& random) {
    if (n - 1 >= max_weights || k - 1 >= max_weights || n * k > max_weights)  // below 1 as well: they are unsigned
        return;
    Plain other = w;
    other.n = n, other.k = k;
    fill(other, 128, random);
    for (uint64_t output = 0; output < std::min(n, w.n); output++)
        std::copy_n(w.values.begin() + int64_t(output * w.k), std::min(k, w.k), other.values.begin() + int64_t(output * k));
    w = std::move(other);
}

void edit(Plain& w, Random& random) {
    const uint64_t output = random.below(w.n), column = random.below(w.k), at = output * w.k + column;
    switch (random.below(10)) {
        case 0:
        case 1:
        case 2:  // a mask bit, and the value with it
            w.values[at] = w.values[at] ? 0 : some_value(w.kind, random);
            break;
        case 3: w.values[at] = some_value(w.kind, random); break;
        case 4: {  // a run of inputs, full or empty
            const bool empty = random.one_in(2);
            for (uint64_t i = column, end = std::min(w.k, column + 1 + random.below(130)); i < end; i++)
                w.values[output * w.k + i] = empty ? 0 : some_value(w.kind, random);
            break;
        }
        case 5:  // a whole output or a whole input
            if (random.one_in(2))
                std::fill_n(w.values.begin() + int64_t(output * w.k), w.k, 0);
            else
                for (uint64_t i = 0; i < w.n; i++)
                    w.values[i * w.k + column] = some_value(w.kind, random);
            break;
        case 6:
            if (!w.scales.empty())
                w.scales[random.below(w.scales.size())] = random.one_in(4) ? 0 : some_scale(w.f32_scales, random);
            break;
        case 7:
            w.has_bias = !w.has_bias;
            w.bias.resize(w.has_bias ? w.n : 0);
            for (uint32_t& bias : w.bias)
                bias = some_bias(random);
            break;
        case 8: w.dense = !w.dense; break;
        default: resize(w, w.n + random.below(5) - 2, w.k + random.below(5) - 2, random);
    }
    if (w.kind == spw1::bf16 && !w.dense)
        std::replace(w.values.begin(), w.values.end(), 0x8000, 0);
}

// ------------------------------------------------------------------------------------------------- malformed on purpose

struct Field {
    unsigned offset, width;
};
constexpr Field fields[] = {{0, 4},  {4, 2},  {6, 2},  {8, 1},  {9, 1},  {10, 1}, {11, 1}, {12, 4}, {16, 8},  {24, 8},  {32, 8}, {40, 8},
                            {48, 4}, {52, 4}, {56, 8}, {64, 8}, {72, 8}, {80, 8}, {88, 8}, {96, 8}, {104, 8}, {112, 8}, {120, 8}};
constexpr unsigned dir_field = 64, mask_field = 72, val_field = 80, scale_field = 88, bias_field = 96, size_field = 104, comp_field = 120;

uint64_t get(const Bytes& blob, uint64_t offset, unsigned width = 8) {
    uint64_t value = 0;
    if (offset <= blob.size() && width <= blob.size() - offset)
        std::memcpy(&value, blob.data() + offset, width);
    return value;
}

void set(Bytes& blob, uint64_t offset, uint64_t value, unsigned width = 8) {
    if (offset <= blob.size() && width <= blob.size() - offset)
        std::memcpy(blob.data() + offset, &value, width);
}

uint64_t some_size(Random& random) {
    constexpr uint64_t sizes[] = {0, 1, 64, 1 << 16, 1ull << 31, 1ull << 32, 1ull << 33, 1ull << 48, 1ull << 61, 1ull << 63, 0};
    return sizes[random.below(11)] + random.below(3) - 1;
}

// N and K of any size, and everything in the header that follows from them, reduced modulo 2^64: products that overflow.
void lie_about_size(Bytes& blob, Random& random) {
    const uint64_t n = random.one_in(2) ? some_size(random) : get(blob, 16), k = random.one_in(3) ? get(blob, 24) : some_size(random);
    const uint64_t flags = get(blob, 12, 4), group = get(blob, 48, 4);
    const spw1::Geometry g(int(get(blob, 8, 1)), flags, n, k, group);
    // clang-format off
    const std::pair<unsigned, spw1::Geometry::Wide> entries[] = {
        {16, n}, {24, k}, {32, g.n_pad}, {40, g.k_pad}, {dir_field, g.dir}, {mask_field, g.mask}, {val_field, g.val},
        {scale_field, g.scale}, {bias_field, g.bias}, {comp_field, g.comp}};
    // clang-format on
    for (const auto& [offset, value] : entries)
        set(blob, offset, uint64_t(value));
    set(blob, 56, n * k);
    if (g.val < 1 << 14 && random.one_in(2)) {  // and all the sections, empty: valid if the sizes are
        blob.resize(uint64_t(g.val) + 64);
        std::fill(blob.begin() + 128, blob.end(), 0);
        set(blob, 56, flags & 16 ? n * k : 0);
        set(blob, size_field, blob.size());
    }
}

// An offset inside a section, or 0.
uint64_t inside(const Bytes& blob, Random& random) {
    constexpr unsigned sections[] = {dir_field, mask_field, val_field, scale_field, bias_field, comp_field};
    const uint64_t start = get(blob, sections[random.below(6)]);
    uint64_t end = blob.size();
    for (unsigned section : sections)
        if (get(blob, section) > start)
            end = std::min(end, get(blob, section));
    return start < end ? start + random.below(end - start) : 0;
}

// Malformed in one rule only: everything else is consistent.
Bytes almost_valid(Plain w, Random& random) {
    const uint64_t choice = random.below(5);
    if (choice == 0) {  // a zero that is stored
        const uint64_t at = random.below(w.values.size());
        w.values[at] = w.kind == spw1::bf16 && random.one_in(2) ? 0x8000 : 0;
        return spw1::encode(w, at);
    }
    Bytes blob = spw1::encode(w);
    if (choice == 1) {  // padding that is not empty: the matrix claims to be a little smaller than it is
        uint64_t& side = random.one_in(2) ? w.n : w.k;
        side -= std::min(side - 1, random.below(3));
        set(blob, 16, w.n);
        set(blob, 24, w.k);
        if (w.dense)
            set(blob, 56, w.n * w.k);
        return blob;
    }
    if (choice == 2) {  // scales per output and per group, or neither
        set(blob, 12, get(blob, 12, 4) ^ 2u << random.below(2), 4);
        return blob;
    }
    const uint64_t entries = (get(blob, 32) / 64) * ((get(blob, 40) + 511) / 512), entry = 1 + random.below(entries);
    const uint64_t end = get(blob, val_field) + get(blob, get(blob, dir_field) + 8 * entry);
    if (choice == 3) {  // a gap behind a run
        blob.insert(blob.begin() + int64_t(end), 64, 0);
        for (uint64_t i = entry; i <= entries; i++)
            set(blob, get(blob, dir_field) + 8 * i, get(blob, get(blob, dir_field) + 8 * i) + 64);
        set(blob, size_field, blob.size());
    } else {  // an unused byte or nibble near the end of a run
        for (uint64_t at = end - 1, i = random.below(64); at >= get(blob, val_field) && i; at--, i--)
            if (!(blob[at] & 15) || !(blob[at] >> 4)) {
                blob[at] |= blob[at] & 15 ? 0x30 : 0x03;
                break;
            }
    }
    return blob;
}

void damage(Bytes& blob, Random& random) {
    switch (random.below(9)) {
        case 0: {
            const Field field = fields[random.below(sizeof(fields) / sizeof(*fields))];
            const uint64_t now = get(blob, field.offset, field.width);
            // clang-format off
            const uint64_t changed[] = {now ^ 1ull << random.below(random.one_in(2) ? 6 : 8 * field.width), now + 64, now - 64, now + 1, now - 1,
                                        some_size(random)};
            // clang-format on
            set(blob, field.offset, changed[random.below(6)], field.width);
            break;
        }
        case 1: lie_about_size(blob, random); break;
        case 2: {
            // a directory entry, or a run of them: to another offset, past its neighbours
            constexpr uint64_t most = 1 << 10;  // the header may say anything
            const uint64_t chunks = std::min((get(blob, 40) + 511) / 512, most), blocks = std::min(get(blob, 32) / 64, most);
            const uint64_t entries = blocks * chunks + 1;
            const uint64_t at = get(blob, dir_field) + 8 * random.below(entries);
            const uint64_t now = get(blob, at), changed[] = {now + 1, now - 1, now + 64, now - 64, 0, some_size(random)};
            const uint64_t value = changed[random.below(6)];
            set(blob, at, value);
            for (uint64_t i = 1, more = random.one_in(2) ? random.below(chunks + 2) : 0; i < more; i++)  // the lengths stay right
                set(blob, at + 8 * i, get(blob, at + 8 * i) + value - now);
            break;
        }
        case 3:
        case 4:  // one bit, mostly of a mask or a value
            if (const uint64_t at = inside(blob, random); at < blob.size())
                blob[at] ^= uint8_t(1 << random.below(8));
            break;
        case 5:
            if (const uint64_t at = inside(blob, random); at < blob.size())
                blob[at] = uint8_t(random.next());
            break;
        case 6: {  // the end, near the edge of a section
            constexpr unsigned edges[] = {dir_field, mask_field, val_field, scale_field, bias_field, comp_field, size_field};
            constexpr int64_t steps[] = {0, 1, -1, 8, 63, 64, -64};
            const uint64_t end = get(blob, edges[random.below(7)]) + uint64_t(steps[random.below(7)]);
            blob.resize(std::min<uint64_t>(end, blob.size() + 128));
            if (random.one_in(2))
                set(blob, size_field, blob.size());
            break;
        }
        case 7:  // two mask bits or bytes change places: the counts stay right, the sums do not
            if (const uint64_t a = inside(blob, random), b = inside(blob, random); std::max(a, b) < blob.size())
                std::swap(blob[a], blob[b]);
            break;
        default:
            if (!blob.empty())
                blob[random.below(blob.size())] = uint8_t(random.next());
    }
}

}  // namespace

std::vector<Bytes> seeds() {
    std::vector<Bytes> result;
    Random random{1};
    const std::pair<int, uint64_t> kinds[] = {{spw1::bf16, 0}, {spw1::int8, 0},  {spw1::int8, 64}, {spw1::int8, 128},
                                              {spw1::int4, 0}, {spw1::int4, 64}, {spw1::int4, 128}};
    const std::pair<uint64_t, uint64_t> shapes[] = {{64, 128}, {17, 33}, {65, 530}};
    for (const auto& [kind, group] : kinds)
        for (const bool dense : {false, true})
            for (const auto& [n, k] : shapes) {
                Plain w;
                w.kind = kind, w.group = group, w.dense = dense, w.n = n, w.k = k;
                w.has_bias = n != 64, w.f32_scales = kind != spw1::bf16 && n == 17;
                fill(w, 128, random);
                Bytes input(call_bytes);
                const Bytes blob = spw1::encode(w);
                input.insert(input.end(), blob.begin(), blob.end());
                result.push_back(std::move(input));
            }
    return result;
}

void mutate(Bytes& input, Random& random) {
    if (input.size() < call_bytes || random.one_in(50)) {
        const Bytes blob = spw1::encode(some_weight(random));
        input.assign(call_bytes, 0);
        input.insert(input.end(), blob.begin(), blob.end());
    }
    const uint64_t call = random.next();
    if (random.one_in(3))
        std::memcpy(input.data(), &call, call_bytes);
    Bytes blob(input.begin() + call_bytes, input.end());
    const auto weight = spw1::decode(blob.data(), blob.size());
    if (weight && random.one_in(2)) {
        Plain changed = *weight;
        for (uint64_t edits = 1 + random.below(8); edits; edits--)
            edit(changed, random);
        blob = spw1::encode(changed);
    } else if (weight && random.one_in(4)) {
        blob = almost_valid(*weight, random);
    } else {
        for (uint64_t changes = 1 + random.below(3); changes; changes--)
            damage(blob, random);
    }
    input.resize(call_bytes);
    input.insert(input.end(), blob.begin(), blob.end());
}
