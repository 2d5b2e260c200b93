// The fuzzer of skipped inputs: SAM1 once more, written from format.md alone. An input is eight bytes of how to call (see Call), then a blob.
// The library must refuse the blob exactly when the decoder here does; otherwise every kernel must give the product: exactly for quantized
// activations, within the rounding of float32 otherwise.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../../../ov_ext/cpu_plugin/support/isa_selection.hpp"
#include "guarded.hpp"
#include "harness.hpp"

extern "C" {  // capi.cpp
const char* ov_ext_last_error();
int ov_ext_activation_validate(const uint8_t* blob, uint64_t bytes);
int ov_ext_activation_describe(const uint8_t* blob, uint64_t bytes, uint64_t* n, uint64_t* k);
int ov_ext_activation_matmul(const void* x, int x_is_bf16, uint64_t rows, const uint8_t* blob, uint64_t bytes, int64_t activation_group,
                             const char* isa, int threads, int checked, void* y);
}

namespace {

using Bytes = std::vector<uint8_t>;
using Wide = unsigned __int128;

template <class T>
T read(const uint8_t* at) {
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
}

float from_bits(uint32_t bits) { return read<float>(reinterpret_cast<const uint8_t*>(&bits)); }
uint32_t to_bits(float value) { return read<uint32_t>(reinterpret_cast<const uint8_t*>(&value)); }

float round_to_bf16(float value) {
    const uint32_t bits = to_bits(value);
    if (std::isnan(value))
        return from_bits((bits | 0x400000) & 0xFFFF0000);
    return from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

float from_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                       : std::ldexp(float(1024 + mantissa), exponent - 25);
    return bits >> 15 ? -size : size;
}

enum Kind : int { bf16 = 1, int8 = 2, int4 = 3 };
enum Flags : uint32_t { has_bias = 1, f32_scales = 2, thresholds = 4, replacements = 8, replaced = 16 };
constexpr uint64_t header_bytes = 128, chunk = 512, spans = 4;

// A blob, taken apart.
struct Plain {
    int kind = int4;
    uint32_t flags = 0, group = 0;
    uint64_t n = 1, k = 1;
    float centre = 0;
    std::vector<uint32_t> threshold, replacement, offset, scales, bias;  // bits; scales [groups][n]
    std::vector<int32_t> values;                                         // [k][n]: codes, or the bits of bf16

    uint64_t block() const { return kind == bf16 ? 64 : kind == int8 ? 128 : 256; }  // outputs
    uint64_t blocks() const { return (n + block() - 1) / block(); }
    uint64_t segment() const { return kind == bf16 ? chunk : group ? group : 128; }
    uint64_t groups() const { return kind == bf16 ? 0 : group ? (k + group - 1) / group : 1; }
    uint64_t scale_bytes() const { return flags & f32_scales ? 4 : 2; }
    float scale(uint64_t input, uint64_t output) const {
        const uint32_t bits = scales[(group ? input / group : 0) * n + output];
        return flags & f32_scales ? from_bits(bits) : from_f16(uint16_t(bits));
    }
};

// Lengths of the sections in their order; -1: absent.
struct Layout {
    Wide at[6], bytes[6], end;
    bool present[6];

    explicit Layout(const Plain& w) : end(header_bytes) {
        const Wide n = w.n, k = w.k, n_pad = Wide(w.blocks()) * w.block();
        const bool there[] = {true, bool(w.flags & replaced), bool(w.flags & replaced), w.kind != bf16, bool(w.flags & has_bias), true};
        const Wide sizes[] = {
            4 * (w.flags & thresholds ? k : 1), 4 * (w.flags & replacements ? k : 1), 4 * n, n_pad * w.groups() * w.scale_bytes(), 4 * n,
            Wide(w.blocks()) * k * 128};
        for (int i = 0; i < 6; i++) {
            present[i] = there[i], bytes[i] = there[i] ? sizes[i] : 0, at[i] = there[i] ? end : 0;
            end += (bytes[i] + 127) / 128 * 128;
        }
    }
};

// Where output c of a block lies in its 128 bytes: a byte, and how many bits up.
struct Place {
    uint64_t byte;
    int shift;
    Place(int kind, uint64_t c) : shift(kind == int4 && (c >> 5 & 1) ? 4 : 0) {
        const uint64_t place = 16 * (c >> 2 & 1) + 8 * (c >> 4 & 1) + 2 * (c & 3) + (c >> 3 & 1);
        byte = kind == bf16 ? 2 * (16 * (c >> 4) + 2 * (c & 7) + (c >> 3 & 1)) : 32 * (c >> (kind == int4 ? 6 : 5)) + place;
    }
};

Bytes encode(const Plain& w) {
    const Layout layout(w);
    Bytes blob(size_t(layout.end), 0);
    const auto put = [&](size_t at, auto value) { std::memcpy(&blob[at], &value, sizeof(value)); };
    std::memcpy(blob.data(), "SAM1", 4);
    put(4, uint16_t(1)), put(6, uint16_t(header_bytes)), put(8, uint8_t(w.kind)), put(12, w.flags);
    put(16, w.n), put(24, w.k), put(32, w.blocks() * w.block()), put(40, w.group), put(44, w.centre);
    for (int i = 0; i < 6; i++)
        put(size_t(48 + 8 * i), uint64_t(layout.at[i]));
    put(96, uint64_t(layout.end));
    const std::vector<uint32_t>* const floats[] = {&w.threshold, &w.replacement, &w.offset, nullptr, &w.bias};
    for (int i : {0, 1, 2, 4})
        if (layout.bytes[i])
            std::memcpy(&blob[size_t(layout.at[i])], floats[i]->data(), size_t(layout.bytes[i]));
    for (uint64_t i = 0; i < w.scales.size(); i++)
        std::memcpy(&blob[size_t(layout.at[3]) + (i / w.n * w.blocks() * w.block() + i % w.n) * w.scale_bytes()], &w.scales[i],
                    w.scale_bytes());
    if (w.kind == int4)
        std::fill(blob.begin() + long(layout.at[5]), blob.end(), uint8_t(0x88));
    for (uint64_t k = 0; k < w.k; k++)
        for (uint64_t n = 0; n < w.n; n++) {
            const Place place(w.kind, n % w.block());
            uint8_t* const at = &blob[size_t(layout.at[5]) + (k * w.blocks() + n / w.block()) * 128 + place.byte];
            const int32_t value = w.values[k * w.n + n];
            if (w.kind == bf16)
                at[0] = uint8_t(value), at[1] = uint8_t(value >> 8);
            else
                *at = w.kind == int8 ? uint8_t(value) : uint8_t((*at & (0xF0 >> place.shift)) | (value + 8) << place.shift);
        }
    return blob;
}

// What format.md calls a valid blob; nothing for every other byte string.
std::optional<Plain> decode(const uint8_t* blob, size_t bytes) {
    if (bytes < header_bytes || std::memcmp(blob, "SAM1", 4) || read<uint16_t>(blob + 4) != 1 || read<uint16_t>(blob + 6) != header_bytes)
        return {};
    Plain w;
    w.kind = blob[8], w.flags = read<uint32_t>(blob + 12), w.n = read<uint64_t>(blob + 16), w.k = read<uint64_t>(blob + 24);
    w.group = read<uint32_t>(blob + 40), w.centre = read<float>(blob + 44);
    const auto zeros = [&](size_t begin, size_t end) { return std::all_of(blob + begin, blob + end, [](uint8_t b) { return !b; }); };
    const bool sizes = w.n >= 1 && w.n < 1ull << 31 && w.k >= 1 && w.k < 1ull << 31;
    if (w.kind < bf16 || w.kind > int4 || w.flags > 31 || !sizes || !std::isfinite(w.centre) || !zeros(9, 12) || !zeros(112, 128))
        return {};
    if ((w.flags & replacements && !(w.flags & replaced)) || (w.kind == bf16 && (w.group || w.flags & f32_scales)) ||
        (w.group != 0 && w.group != 64 && w.group != 128))
        return {};
    const Layout layout(w);
    if (read<uint64_t>(blob + 32) != w.blocks() * w.block() || read<uint64_t>(blob + 96) != bytes || layout.end != bytes)
        return {};
    for (int i = 0; i < 6; i++)
        if (read<uint64_t>(blob + 48 + 8 * i) != layout.at[i])
            return {};
    std::vector<uint32_t>* const floats[] = {&w.threshold, &w.replacement, &w.offset, nullptr, &w.bias};
    for (int i : {0, 1, 2, 4}) {
        floats[i]->resize(size_t(layout.bytes[i]) / 4);
        if (layout.bytes[i])
            std::memcpy(floats[i]->data(), blob + size_t(layout.at[i]), size_t(layout.bytes[i]));
    }
    for (uint64_t i = 0; i < w.groups() * w.n; i++) {
        w.scales.push_back(0);
        std::memcpy(&w.scales[i], blob + size_t(layout.at[3]) + (i / w.n * w.blocks() * w.block() + i % w.n) * w.scale_bytes(),
                    w.scale_bytes());
    }
    for (uint64_t k = 0; k < w.k; k++)
        for (uint64_t n = 0; n < w.n; n++) {
            const Place place(w.kind, n % w.block());
            const uint8_t* const at = blob + size_t(layout.at[5]) + (k * w.blocks() + n / w.block()) * 128 + place.byte;
            w.values.push_back(w.kind == bf16   ? int32_t(read<uint16_t>(at))
                               : w.kind == int8 ? int32_t(int8_t(*at))
                                                : int32_t(*at >> place.shift & 15) - 8);
        }
    for (uint32_t bits : w.threshold)
        if (std::isnan(from_bits(bits)))
            return {};
    for (uint32_t bits : w.replacement)
        if (!std::isfinite(from_bits(bits)))
            return {};
    for (uint32_t bits : w.scales)
        if (!std::isfinite(w.flags & f32_scales ? from_bits(bits) : from_f16(uint16_t(bits))))
            return {};
    // Whatever is not said by the fields above, padding and gaps, has one value.
    Bytes again = encode(w);
    std::memcpy(&again[104], blob + 104, 8);  // the checksum, which is for transport
    const uint64_t padded = w.blocks() * w.block();
    for (uint64_t i = 0; i < w.groups() * padded; i++) {  // -0 is 0
        const size_t sign = size_t(layout.at[3]) + (i + 1) * w.scale_bytes() - 1;
        if (i % padded >= w.n)
            again[sign] = blob[sign] & 0x80;
    }
    if (std::memcmp(again.data(), blob, bytes))
        return {};
    return w;
}

// How to call, from the first bytes of an input.
struct Call {
    size_t shift;
    uint64_t rows;
    int64_t group;
    bool is_bf16;
    int threads;
    uint8_t contents;
    uint32_t seed;

    Call(const uint8_t* bytes, uint64_t segment) {
        constexpr uint64_t some_rows[] = {1, 2, 3, 0, 4, 5, 9, 34};
        shift = bytes[0] & 63, rows = some_rows[bytes[1] % 8], is_bf16 = bytes[3] & 1, threads = 1 + (bytes[3] >> 1) % 5;
        group = bytes[2] % 3 == 0 ? 0 : bytes[2] == 1 ? 64 : int64_t(segment);
        contents = bytes[4], seed = read<uint32_t>(bytes + 4);
    }
};

std::vector<float> activations(const Call& call, const Plain& w, uint64_t count) {
    Random random{call.seed};
    std::vector<float> x(count);
    for (uint64_t i = 0; i < count; i++) {
        const float even = float(int64_t(random.next() >> 40) - (1 << 23)) / float(1 << 22);  // -2 ... 2
        const float threshold = from_bits(w.threshold[w.threshold.size() > 1 ? i % w.k : 0]);
        switch (call.contents % 6) {
            case 0: x[i] = even; break;
            case 1: x[i] = random.one_in(3) ? w.centre + (random.one_in(2) ? threshold : -threshold) : even; break;  // on the border
            case 2: x[i] = random.one_in(9) ? 3 + even : w.centre; break;
            case 3: x[i] = even * (random.one_in(2) ? 1e-38f : 1e-41f); break;
            case 4: x[i] = even * 1e38f; break;
            default: x[i] = random.one_in(64) ? from_bits(uint32_t(random.next())) : even;
        }
        if (call.is_bf16)
            x[i] = round_to_bf16(x[i]);
    }
    return x;
}

struct Product {
    std::vector<double> y, bound;  // [n]
};

Product multiply(const Plain& w, const float* x, bool integer) {
    std::vector<bool> stays(w.k);
    std::vector<float> v(w.k), factor(w.k);
    for (uint64_t k = 0; k < w.k; k++) {
        stays[k] = !(std::fabs(x[k] - w.centre) <= from_bits(w.threshold[w.threshold.size() > 1 ? k : 0]));
        v[k] = w.replacement.empty() ? x[k] : x[k] - from_bits(w.replacement[w.replacement.size() > 1 ? k : 0]);
    }
    for (uint64_t begin = 0; integer && begin < w.k; begin += w.segment()) {  // support/quantization.hpp
        const uint64_t end = std::min(begin + w.segment(), w.k);
        float peak = 0;
        bool finite = true;
        for (uint64_t k = begin; k < end; k++)
            if (stays[k])
                peak = std::max(peak, std::fabs(v[k])), finite &= std::isfinite(v[k]);
        const bool zero = peak < 0x1p-120f;
        for (uint64_t k = begin; k < end; k++) {
            factor[k] = !finite ? NAN : zero ? 0 : peak / 127;
            v[k] = !finite || zero ? 0 : std::nearbyint(v[k] * (127 / peak));
        }
    }
    Product result;
    for (uint64_t n = 0; n < w.n; n++) {
        float parts[spans] = {};
        double exact = 0, size = 0;
        const uint64_t chunks = (w.k + chunk - 1) / chunk, each = (chunks + spans - 1) / spans;
        for (uint64_t c = 0; c < chunks; c++) {
            float chunk_sum = 0;
            for (uint64_t begin = c * chunk; begin < std::min((c + 1) * chunk, w.k); begin += w.segment()) {
                int64_t sum = 0;
                bool any = false;
                for (uint64_t k = begin; k < std::min(begin + w.segment(), w.k); k++) {
                    if (!stays[k])
                        continue;
                    any = true;
                    const int32_t value = w.values[k * w.n + n];
                    if (integer)
                        sum += value * int64_t(v[k]);
                    const double term = double(v[k]) * (w.kind == bf16 ? from_bits(uint32_t(value) << 16) : value * double(w.scale(k, n)));
                    exact += term, size += std::fabs(term);
                }
                if (any && integer)
                    chunk_sum = std::fma(float(sum), factor[begin] * w.scale(begin, n), chunk_sum);
            }
            parts[c / each] += chunk_sum;
        }
        float y = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        for (const auto* added : {&w.bias, &w.offset})
            if (!added->empty())
                y += from_bits((*added)[n]), exact += from_bits((*added)[n]), size += std::fabs(from_bits((*added)[n]));
        // Scales of f32 sums may overflow or vanish on the way, and so may products.
        const double bound = (double(w.k) + 16) * std::ldexp(size, -22) + 1e-30;
        result.y.push_back(integer ? y : exact);
        result.bound.push_back(integer ? 0 : size < 1e30 ? bound : INFINITY);
    }
    return result;
}

// Products of f32 activations and codes are summed before they are scaled: tiny scales hide an overflow there.
bool may_overflow(const Plain& w, const std::vector<float>& x) {
    return std::any_of(x.begin(), x.end(), [&](float value) { return !(std::fabs(value) < (w.kind == bf16 ? 1e30f : 1e20f)); });
}

void check_products(const Plain& w, const uint8_t* blob, size_t bytes, const Call& call) {
    const bool fits = call.group == 0 || (w.kind != bf16 && uint64_t(call.group) == w.segment());
    const bool integer = fits && call.group;
    constexpr uint64_t work = 1 << 18;  // multiplications, so that an input takes milliseconds
    const uint64_t rows = std::min(call.rows, std::max<uint64_t>(1, work / (w.n * w.k))), width = call.is_bf16 ? 2 : 4;
    const auto x = activations(call, w, rows * w.k);
    const Guarded in(x.size() * width, 0), out(rows * w.n * width, 0);
    for (size_t i = 0; i < x.size(); i++) {
        const uint32_t bits = to_bits(x[i]) >> (call.is_bf16 ? 16 : 0);
        std::memcpy(in.data + i * width, &bits, width);
    }
    std::vector<Product> expected;
    for (uint64_t row = 0; fits && row < rows; row++)
        expected.push_back(multiply(w, &x[row * w.k], integer));
    const bool wild = !integer && may_overflow(w, x);
    for (const ov_ext::InstructionSet isa : ov_ext::available_instruction_sets()) {
        const std::string kernel = ov_ext::name_of(isa);
        const int error =
            ov_ext_activation_matmul(in.data, call.is_bf16, rows, blob, bytes, call.group, kernel.c_str(), call.threads, 0, out.data);
        expect(error == !fits, kernel + (error ? std::string(": ") + ov_ext_last_error() : ": took an activation group that does not fit"));
        for (uint64_t i = 0; fits && !wild && i < rows * w.n; i++) {
            uint32_t bits = 0;
            std::memcpy(&bits, out.data + i * width, width);
            const float y = from_bits(call.is_bf16 ? bits << 16 : bits);
            double value = expected[i / w.n].y[i % w.n], bound = expected[i / w.n].bound[i % w.n];
            if (call.is_bf16 && integer)
                value = round_to_bf16(float(value));
            else if (call.is_bf16)
                bound += std::ldexp(std::fabs(value) + bound, -8);
            if (bound != INFINITY && !(std::isnan(value) ? std::isnan(y) : y == value || std::fabs(y - value) <= bound))
                found(kernel + ": output " + std::to_string(i) + " is " + std::to_string(y) + ", not " + std::to_string(value));
        }
    }
}

int32_t some_value(int kind, Random& random) {
    if (kind == bf16)
        return random.one_in(300) ? int32_t(random.below(1 << 16)) : int32_t(0x3C00 + random.below(0x400) + (random.below(2) << 15));
    const int32_t most = kind == int4 ? 8 : 128;
    return random.one_in(4) ? (random.one_in(2) ? -most : most - 1) : int32_t(random.below(uint64_t(2 * most))) - most;
}

uint32_t some_float(Random& random) {  // finite, seldom extreme
    const uint32_t sign = uint32_t(random.below(2) << 31);
    return sign | uint32_t(random.one_in(40) ? random.below(0x7F800000) : 0x3D000000 + random.below(0x2800000));
}

uint32_t some_scale(const Plain& w, Random& random) {
    if (w.flags & f32_scales)
        return uint32_t(random.below(2) << 31 | (0x3A000000 + random.below(0x4000000)));
    return uint32_t(random.below(2) << 15 | (random.one_in(20) ? random.below(0x7C00) : 0x2000 + random.below(0x1800)));
}

Plain some_blob(Random& random) {
    constexpr uint64_t inputs[] = {1, 3, 31, 64, 65, 127, 129, 200, 511, 513, 700, 1100, 2100};
    constexpr uint64_t outputs[] = {1, 15, 17, 63, 64, 65, 127, 129, 255, 257, 300};
    constexpr uint32_t groups[] = {0, 64, 128};
    Plain w;
    w.kind = int(1 + random.below(3));
    w.group = w.kind == bf16 ? 0 : groups[random.below(3)];
    w.flags = uint32_t(random.below(32)) & ~(w.kind == bf16 ? uint32_t(f32_scales) : 0u);
    if (!(w.flags & replaced))
        w.flags &= ~uint32_t(replacements);
    w.k = inputs[random.below(13)];
    do
        w.n = outputs[random.below(11)];
    while (w.n * w.k > 60000);
    w.centre = random.one_in(2) ? 0 : from_bits(some_float(random));
    const auto fill = [&](std::vector<uint32_t>& to, uint64_t count, bool positive) {
        for (uint64_t i = 0; i < count; i++)
            to.push_back(some_float(random) & (positive ? 0x7FFFFFFF : ~0u));
    };
    fill(w.threshold, w.flags & thresholds ? w.k : 1, !random.one_in(8));
    if (w.flags & replaced) {
        fill(w.replacement, w.flags & replacements ? w.k : 1, false);
        fill(w.offset, w.n, false);
    }
    fill(w.bias, w.flags & has_bias ? w.n : 0, false);
    for (uint64_t i = 0; i < w.groups() * w.n; i++)
        w.scales.push_back(some_scale(w, random));
    for (uint64_t i = 0; i < w.n * w.k; i++)
        w.values.push_back(random.one_in(5) ? 0 : some_value(w.kind, random));
    return w;
}

}  // namespace

bool check(const uint8_t* input, size_t size) {
    if (size < call_bytes)
        return false;
    const size_t bytes = size - call_bytes;
    const Guarded blob(bytes, input[0] & 63);
    std::memcpy(blob.data, input + call_bytes, bytes);
    const auto weight = decode(blob.data, bytes);
    const auto refusal = [] { return !std::string(ov_ext_last_error()).compare(0, 11, "SAM1 blob: "); };
    const bool refused = ov_ext_activation_validate(blob.data, bytes);
    expect(!refused || refusal(), std::string("a refusal for another reason: ") + ov_ext_last_error());
    expect(refused == !weight, refused ? std::string("a valid blob is refused: ") + ov_ext_last_error() : "a malformed blob is accepted");
    if (!weight) {  // nothing of x and y may be touched
        expect(ov_ext_activation_matmul(nullptr, 0, 1, blob.data, bytes, 0, nullptr, 1, 0, nullptr), "a malformed blob is multiplied");
        return false;
    }
    uint64_t n = 0, k = 0;
    expect(!ov_ext_activation_describe(blob.data, bytes, &n, &k) && n == weight->n && k == weight->k, "describe is wrong");
    check_products(*weight, blob.data, bytes, Call(input, weight->segment()));
    return true;
}

std::vector<std::vector<uint8_t>> seeds() {
    std::vector<Bytes> result;
    for (uint8_t i = 0; i < 40; i++) {
        Random random{i};
        Bytes input = {i, i, uint8_t(1 + i % 5), uint8_t(i / 3), uint8_t(i % 6), i, 0, 0};
        const Bytes blob = encode(some_blob(random));
        input.insert(input.end(), blob.begin(), blob.end());
        result.push_back(std::move(input));
    }
    return result;
}

void mutate(std::vector<uint8_t>& input, Random& random) {
    input.resize(std::max(input.size(), call_bytes));
    for (uint64_t changes = 1 + random.below(2); changes; changes--)
        input[random.below(call_bytes)] = uint8_t(random.next());
    auto w = decode(input.data() + call_bytes, input.size() - call_bytes);
    if (w && random.one_in(2)) {  // another valid blob
        const auto any = [&](auto& of) -> auto& { return of[random.below(of.size())]; };
        switch (random.below(6)) {
            case 0: w = some_blob(random); break;
            case 1: any(w->threshold) = random.one_in(4) ? 0x7F800000 : some_float(random) & 0x7FFFFFFF; break;
            case 2: w->centre = from_bits(some_float(random)); break;
            case 3:
                if (!w->scales.empty())
                    any(w->scales) = some_scale(*w, random);
                break;
            case 4:
                if (!w->bias.empty())
                    any(w->bias) = uint32_t(random.next());
                break;
            default: any(w->values) = some_value(w->kind, random);
        }
        const Bytes blob = encode(*w);
        input.resize(call_bytes);
        input.insert(input.end(), blob.begin(), blob.end());
        return;
    }
    const uint64_t size = input.size() - call_bytes;
    switch (random.below(4)) {
        case 0: input.resize(call_bytes + (random.one_in(2) ? random.below(size + 1) : size + 1 + random.below(300))); break;
        case 1:
            if (size >= header_bytes) {  // a number of the header, slightly or wildly wrong
                const size_t at = call_bytes + 8 + 8 * random.below(15);
                constexpr uint64_t edges[] = {0, 1, 127, 128, 1ull << 31, (1ull << 31) - 1, ~0ull, 1ull << 63};
                const uint64_t number =
                    random.one_in(2) ? edges[random.below(8)] : read<uint64_t>(&input[at]) + 128 * random.below(3) - 128;
                std::memcpy(&input[at], &number, 8);
            }
            break;
        default:
            if (size)
                input[call_bytes + random.below(random.one_in(2) ? std::min<uint64_t>(size, 512) : size)] ^= uint8_t(1 << random.below(8));
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {  // for the fuzzing engines
    check(data, size);
    return 0;
}

// Memory that a small file only claims to need is a finding.
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=256"; }
