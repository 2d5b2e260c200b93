#include "plain.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

namespace spw1 {
namespace {

struct Malformed {};

void need(bool ok) {
    if (!ok)
        throw Malformed{};
}

Geometry::Wide up(Geometry::Wide value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Little-endian fields of a byte string, checked at every access.
struct Reader {
    const uint8_t* data;
    size_t bytes;

    uint64_t at(Geometry::Wide offset, unsigned width) const {
        need(offset + width <= bytes);
        uint64_t value = 0;
        for (unsigned i = 0; i < width; i++)
            value |= uint64_t(data[uint64_t(offset) + i]) << (8 * i);
        return value;
    }
    void need_zeros(Geometry::Wide from, Geometry::Wide to) const {
        for (; from < to; from++)
            need(at(from, 1) == 0);
    }
};

void put(std::vector<uint8_t>& blob, Geometry::Wide offset, uint64_t value, unsigned width) {
    for (unsigned i = 0; i < width; i++)
        blob.at(uint64_t(offset) + i) = uint8_t(value >> (8 * i));
}

float half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24);
    return bits & 0x8000 ? -magnitude : magnitude;
}

uint32_t crc32(const std::vector<uint8_t>& data, size_t from) {
    uint32_t crc = ~0u;
    for (size_t i = from; i < data.size(); i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    }
    return ~crc;
}

// Calls visit(slice number in the whole stream, odd slice, first output, first input) for the slices of one (block, chunk).
template <class Visit>
void for_slices(const Geometry& g, uint64_t block, uint64_t chunk, const Visit& visit) {
    const auto last = std::min(g.tiles, (chunk + 1) * g.tiles_per_chunk);
    for (uint64_t tile = chunk * uint64_t(g.tiles_per_chunk); tile < last; tile++)
        for (uint64_t panel = 0; panel < 4; panel++)
            for (uint64_t slice = 0; slice < 16; slice++)
                visit(((block * uint64_t(g.tiles) + tile) * 4 + panel) * 16 + slice, slice % 2, block * 64 + panel * 16,
                      (tile * 16 + slice) * g.slice_k);
}

void decode_values(const Reader& in, const Geometry& g, Plain& w, std::vector<int32_t>& sums, uint64_t& stored_elements) {
    const unsigned elements = unsigned(16 * g.slice_k), mask_width = w.kind == bf16 ? 4 : 8;
    uint64_t start = in.at(g.dir, 8);
    need(start == 0);
    for (uint64_t block = 0; block < g.blocks; block++)
        for (uint64_t chunk = 0; chunk < g.chunks; chunk++) {
            const uint64_t end = in.at(g.dir + 8 * (block * g.chunks + chunk + 1), 8);
            need(start <= end && end <= in.bytes && (chunk || start % 64 == 0));
            std::array<uint64_t, 2> cursor{};  // elements read: of all slices, or of even and odd slices
            for_slices(g, block, chunk, [&](uint64_t index, uint64_t odd, uint64_t n0, uint64_t k0) {
                const uint64_t mask = w.dense ? ~0ull : in.at(g.mask + mask_width * index, mask_width);
                for (unsigned e = 0; e < elements; e++) {
                    if (!(mask >> e & 1))
                        continue;
                    uint64_t& at = cursor[w.kind == int4 ? odd : 0];
                    const uint64_t width = w.kind == bf16 ? 2 : 1, offset = start + width * at++;
                    need(offset + width <= end);
                    uint64_t raw = in.at(g.val + offset, unsigned(width));
                    if (w.kind == int4)
                        raw = odd ? raw >> 4 : raw & 15;
                    const int32_t value = w.kind == bf16 ? int32_t(raw) : w.kind == int8 ? int8_t(raw) : int32_t(raw ^ 8) - 8;
                    const bool zero = w.kind == bf16 ? !(value & 0x7FFF) : !value;
                    const uint64_t n = n0 + e / g.slice_k, k = k0 + e % g.slice_k;
                    const bool inside = n < w.n && k < w.k;
                    need(w.dense ? inside || zero : inside && !zero);
                    if (inside)
                        w.values[n * w.k + k] = value;
                    if (inside && w.kind != bf16)
                        sums[n * uint64_t(g.k_pad / g.segment) + k / g.segment] += value;
                    stored_elements++;
                }
            });
            const uint64_t used = w.kind == bf16 ? 2 * cursor[0] : std::max(cursor[0], cursor[1]);
            if (w.kind == int4)
                for (uint64_t parity = 0; parity < 2; parity++)
                    for (uint64_t t = cursor[parity]; t < used; t++)
                        need((in.at(g.val + start + t, 1) >> (4 * parity) & 15) == 0);
            need(end == (chunk + 1 == g.chunks ? up(start + used, 64) : start + used));
            in.need_zeros(g.val + start + used, g.val + end);
            start = end;
        }
    need(g.val + start + 64 == in.bytes);
    in.need_zeros(g.val + start, in.bytes);
}

Plain decode_or_throw(const Reader& in) {
    need(in.at(0, 4) == 0x31575053 && in.at(4, 2) == 1 && in.at(6, 2) == 128 && in.bytes >= 128);
    Plain w;
    w.kind = int(in.at(8, 1));
    need(w.kind >= bf16 && w.kind <= int4);
    need(in.at(9, 1) == (w.kind == bf16 ? 2 : 4) && in.at(10, 1) == 16 && in.at(11, 1) == 4 && in.at(52, 4) == 512);
    const uint64_t flags = in.at(12, 4);
    w.has_bias = flags & 1, w.dense = flags & 16, w.f32_scales = flags & 32;
    w.compensated = w.kind != bf16 && !(flags & 64);
    w.n = in.at(16, 8), w.k = in.at(24, 8), w.group = in.at(48, 4);
    need(w.n >= 1 && w.k >= 1 && w.n < 1ull << 31 && w.k < 1ull << 31);
    need(w.group == 0 || (w.kind != bf16 && (w.group == 64 || w.group == 128)));
    need(flags == w.flags() && (w.kind != bf16 || !w.f32_scales));
    const Geometry g(w.kind, flags, w.n, w.k, w.group);
    need(in.at(32, 8) == g.n_pad && in.at(40, 8) == g.k_pad);
    need(in.at(64, 8) == g.dir && in.at(72, 8) == g.mask && in.at(80, 8) == g.val && in.at(88, 8) == g.scale && in.at(96, 8) == g.bias &&
         in.at(120, 8) == g.comp);
    need(in.at(104, 8) == in.bytes && g.val + 64 <= in.bytes);

    need(!w.dense || (in.bytes - g.val) * 2 >= Geometry::Wide(w.n) * w.k);  // sparse: the masks are there, an eighth of a byte each
    w.values.resize(w.n * w.k);
    const uint64_t segments = w.kind == bf16 ? 0 : uint64_t(g.k_pad) / g.segment;
    std::vector<int32_t> sums(w.n * segments);
    uint64_t stored = 0;
    decode_values(in, g, w, sums, stored);
    need(in.at(56, 8) == (w.dense ? w.n * w.k : stored));

    for (uint64_t n = 0; n < g.n_pad; n++)
        for (uint64_t s = 0; w.compensated && s < segments; s++)
            need(int16_t(in.at(g.comp + 2 * ((n / 64 * segments + s) * 64 + n % 64), 2)) == (n < w.n ? sums[n * segments + s] : 0));
    const uint64_t width = w.f32_scales ? 4 : 2, padded_groups = w.kind == bf16 ? 0 : w.group ? uint64_t(g.k_pad) / w.group : 1;
    const uint64_t exponent = w.f32_scales ? 0x7F800000 : 0x7C00, magnitude = w.f32_scales ? 0x7FFFFFFF : 0x7FFF;
    w.scales.resize(w.n * w.groups());
    for (uint64_t n = 0; n < g.n_pad; n++)
        for (uint64_t s = 0; s < padded_groups; s++) {
            const uint64_t bits = in.at(g.scale + width * ((n / 64 * padded_groups + s) * 64 + n % 64), unsigned(width));
            const bool inside = n < w.n && s < w.groups();
            need(inside ? (bits & exponent) != exponent : !(bits & magnitude));
            if (inside)
                w.scales[n * w.groups() + s] = uint32_t(bits);
        }
    for (uint64_t n = 0; w.has_bias && n < w.n; n++)
        w.bias.push_back(uint32_t(in.at(g.bias + 4 * n, 4)));
    return w;
}

// Integer activations: q = round(x * 127 / max|x|) over each group of inputs. A group below 2^-120 is zero; one with NaN or infinity
// has the factor NaN.
void quantize(const float* x, uint64_t k, uint64_t group, std::vector<int64_t>& codes, std::vector<float>& factors) {
    for (uint64_t start = 0; start < k; start += group) {
        const uint64_t end = std::min(k, start + group);
        bool finite = true;
        float peak = 0;
        for (uint64_t i = start; i < end; i++) {
            finite = finite && std::isfinite(x[i]);
            peak = std::max(peak, std::fabs(x[i]));
        }
        const bool zero = peak < std::ldexp(1.0f, -120);
        for (uint64_t i = start; i < end; i++) {
            codes[i] = finite && !zero ? int64_t(std::nearbyint(x[i] * (127.0f / peak))) : 0;
            factors[i] = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : peak / 127.0f;
        }
    }
}

}  // namespace

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

uint16_t round_to_bf16(float value) {
    if (std::isnan(value))
        return uint16_t(to_bits(value) >> 16 | 0x40);
    const uint32_t bits = to_bits(value), low = bits & 0xFFFF, odd = bits >> 16 & 1;
    return uint16_t((bits >> 16) + (low > 0x8000 || (low == 0x8000 && odd)));
}

float Plain::scale(uint64_t output, uint64_t input) const {
    const uint32_t bits = scales[output * groups() + (group ? input / group : 0)];
    return f32_scales ? from_bits(bits) : half(uint16_t(bits));
}

uint64_t Plain::flags() const {
    return has_bias | (kind == bf16 ? 0 : group ? 4 : 2) | dense << 4 | f32_scales << 5 | (kind == bf16 || compensated ? 0 : 64);
}

Geometry::Geometry(int kind, uint64_t flags, uint64_t n, uint64_t k, uint64_t group) {
    slice_k = kind == bf16 ? 2 : 4, segment = group ? group : 128;
    n_pad = up(n, 64), k_pad = up(k, kind == bf16 ? 32 : segment);
    blocks = n_pad / 64, tiles = k_pad / (16 * slice_k), tiles_per_chunk = 512 / (16 * slice_k), chunks = up(k_pad, 512) / 512;
    dir_bytes = 8 * (blocks * chunks + 1);
    mask_bytes = flags & 16 ? 0 : blocks * tiles * 64 * (kind == bf16 ? 4 : 8);
    scale_bytes = kind == bf16 ? 0 : n_pad * (group ? k_pad / group : 1) * (flags & 32 ? 4 : 2);
    comp_bytes = kind == bf16 || flags & 64 ? 0 : n_pad * (k_pad / segment) * 2;
    bias_bytes = flags & 1 ? Wide(n) * 4 : 0;
    Wide end = 128;
    const auto section = [&](Wide bytes) {
        const Wide start = bytes ? end : 0;
        end = up(end + bytes, 64);
        return start;
    };
    dir = section(dir_bytes), mask = section(mask_bytes), scale = section(scale_bytes), comp = section(comp_bytes);
    bias = section(bias_bytes), val = end;
}

std::optional<Plain> decode(const uint8_t* blob, size_t bytes) {
    try {
        return decode_or_throw({blob, bytes});
    } catch (const Malformed&) {
        return {};
    }
}

std::vector<uint8_t> encode(const Plain& w, std::optional<uint64_t> stored) {
    const Geometry g(w.kind, w.flags(), w.n, w.k, w.group);
    const unsigned elements = unsigned(16 * g.slice_k), mask_width = w.kind == bf16 ? 4 : 8;
    std::vector<uint8_t> blob(uint64_t(g.val));
    uint64_t nnz = 0;
    for (uint64_t block = 0; block < g.blocks; block++)
        for (uint64_t chunk = 0; chunk < g.chunks; chunk++) {
            std::array<std::vector<uint8_t>, 2> run;  // int4: a byte a nibble, even and odd slices
            for_slices(g, block, chunk, [&](uint64_t index, uint64_t odd, uint64_t n0, uint64_t k0) {
                uint64_t mask = 0;
                for (unsigned e = 0; e < elements; e++) {
                    const uint64_t n = n0 + e / g.slice_k, k = k0 + e % g.slice_k;
                    const int32_t value = n < w.n && k < w.k ? w.values[n * w.k + k] : 0;
                    if (!w.dense && !(w.kind == bf16 ? value & 0x7FFF : value) && !(n < w.n && k < w.k && n * w.k + k == stored))
                        continue;
                    mask |= 1ull << e;
                    auto& to = run[w.kind == int4 ? odd : 0];
                    to.push_back(uint8_t(w.kind == int4 ? value & 15 : value));
                    if (w.kind == bf16)
                        to.push_back(uint8_t(value >> 8));
                    nnz++;
                }
                if (!w.dense)
                    put(blob, g.mask + mask_width * index, mask, mask_width);
            });
            if (w.kind == int4) {
                run[0].resize(std::max(run[0].size(), run[1].size()));
                for (size_t t = 0; t < run[1].size(); t++)
                    run[0][t] = uint8_t(run[0][t] | run[1][t] << 4);
            }
            blob.insert(blob.end(), run[0].begin(), run[0].end());
            if (chunk + 1 == g.chunks)
                blob.resize(uint64_t(up(blob.size(), 64)));
            put(blob, g.dir + 8 * (block * g.chunks + chunk + 1), blob.size() - uint64_t(g.val), 8);
        }
    blob.resize(blob.size() + 64);

    const uint64_t segments = w.kind == bf16 ? 0 : uint64_t(g.k_pad) / g.segment, width = w.f32_scales ? 4 : 2;
    const uint64_t padded_groups = w.group ? uint64_t(g.k_pad) / w.group : 1;
    for (uint64_t n = 0; n < w.n; n++) {
        for (uint64_t s = 0; s < segments; s++) {
            int32_t sum = 0;
            for (uint64_t k = s * g.segment; k < std::min(w.k, (s + 1) * g.segment); k++)
                sum += w.values[n * w.k + k];
            if (w.compensated)
                put(blob, g.comp + 2 * ((n / 64 * segments + s) * 64 + n % 64), uint16_t(sum), 2);
        }
        for (uint64_t s = 0; s < w.groups(); s++)
            put(blob, g.scale + width * ((n / 64 * padded_groups + s) * 64 + n % 64), w.scales[n * w.groups() + s], unsigned(width));
        if (w.has_bias)
            put(blob, g.bias + 4 * n, w.bias[n], 4);
    }
    const struct {
        unsigned offset, width;
        Geometry::Wide value;
        // clang-format off
    } header[] = {{0, 4, 0x31575053}, {4, 2, 1}, {6, 2, 128}, {8, 1, unsigned(w.kind)}, {9, 1, g.slice_k}, {10, 1, 16}, {11, 1, 4},
                  {12, 4, w.flags()}, {16, 8, w.n}, {24, 8, w.k}, {32, 8, g.n_pad}, {40, 8, g.k_pad}, {48, 4, w.group}, {52, 4, 512},
                  {56, 8, w.dense ? w.n * w.k : nnz}, {64, 8, g.dir}, {72, 8, g.mask}, {80, 8, g.val}, {88, 8, g.scale},
                  {96, 8, g.bias}, {104, 8, blob.size()}, {112, 8, crc32(blob, 128)}, {120, 8, g.comp}};
    // clang-format on
    for (const auto& field : header)
        put(blob, field.offset, uint64_t(field.value), field.width);
    return blob;
}

Product multiply(const Plain& w, const std::vector<float>& x, uint64_t rows, int64_t activation_group) {
    constexpr double unit = 0x1p-23, overflow = 1e38, normal = 0x1p-126;
    Product out{std::vector<double>(rows * w.n), std::vector<double>(rows * w.n)};
    const bool integer = w.kind != bf16 && activation_group != 0;
    std::vector<int64_t> codes(w.k);
    std::vector<float> factors(w.k), used(w.k);
    for (uint64_t m = 0; m < rows; m++) {
        const float* row = x.data() + m * w.k;
        if (integer)
            quantize(row, w.k, activation_group < 0 ? w.k : uint64_t(activation_group), codes, factors);
        for (uint64_t k = 0; k < w.k; k++)
            used[k] = w.kind == bf16 && activation_group ? from_bits(uint32_t(round_to_bf16(row[k])) << 16) : row[k];
        for (uint64_t n = 0; n < w.n; n++) {
            const float bias = w.has_bias ? from_bits(w.bias[n]) : 0.0f;
            const int32_t* values = w.values.data() + n * w.k;
            if (integer) {
                const uint64_t segment = w.group ? w.group : 128;
                float y = 0;
                for (uint64_t chunk = 0; chunk < w.k; chunk += 512) {
                    float sum = 0;
                    for (uint64_t s = chunk; s < std::min(w.k, chunk + 512); s += segment) {
                        int64_t dot = 0;
                        for (uint64_t k = s; k < std::min(w.k, s + segment); k++)
                            dot += codes[k] * values[k];
                        sum = std::fma(float(dot), factors[s] * w.scale(n, s), sum);
                    }
                    y += sum;
                }
                out.y[m * w.n + n] = w.has_bias ? y + bias : y;
                continue;
            }
            double y = bias, size = 0, raw = 0, flushed = 0;  // size, raw: magnitudes of finite terms, with and without scale
            bool open = false;                                // vdpbf16ps takes a denormal for zero, so times infinity it is NaN
            for (uint64_t k = 0; k < w.k; k++) {
                const double value = w.kind == bf16 ? from_bits(uint32_t(values[k]) << 16) : values[k];
                const double scale = w.kind == bf16 ? 1 : w.scale(n, k), term = used[k] * value * scale;
                const bool denormal = w.kind == bf16 && (std::fabs(used[k]) < normal || std::fabs(value) < normal);
                y += term;
                if (std::isfinite(term))
                    size += std::fabs(term), raw += std::fabs(used[k] * value);
                open = open || (denormal && std::isinf(term));
                flushed += (denormal && std::isfinite(term) ? std::fabs(term) : 0) + normal * (std::fabs(scale) + 1);
            }
            size += std::isfinite(bias) ? std::fabs(bias) : 0;
            out.y[m * w.n + n] = y;
            out.bound[m * w.n + n] = open || raw > overflow || size > overflow ? std::numeric_limits<double>::infinity()
                                                                               : double(w.k + 16) * unit * size + flushed;
        }
    }
    return out;
}

}  // namespace spw1
