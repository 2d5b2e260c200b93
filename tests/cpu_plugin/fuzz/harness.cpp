// One input of the fuzzer: eight bytes of how to call (see Call), then a blob. The library must refuse the blob exactly when the
// independent decoder does; otherwise it must decode and write the same matrix, and every kernel must give its product.
#include "harness.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "guarded.hpp"
#include "plain.hpp"

extern "C" {  // capi.cpp
struct OvExtWeight {
    int64_t kind, n, k, group, dense, scales_f32;
    const void *values, *scales;
    const float* bias;
};
struct OvExtBlob {
    int64_t kind, n, k, group, dense, scales_f32, groups, has_bias;
};
const char* ov_ext_last_error();
int ov_ext_packed_bytes(const OvExtWeight* weight, uint64_t* bytes);
int ov_ext_pack(const OvExtWeight* weight, uint8_t* blob, uint64_t bytes);
int ov_ext_validate(const uint8_t* blob, uint64_t bytes);
int ov_ext_describe(const uint8_t* blob, uint64_t bytes, OvExtBlob* out);
int ov_ext_unpack(const uint8_t* blob, uint64_t bytes, void* values, void* scales, float* bias);
int ov_ext_matmul(const void* x, int x_is_bf16, uint64_t rows, const uint8_t* blob, uint64_t bytes, int64_t activation_group,
                  const char* isa, int threads, int checked, void* y);
int ov_ext_cpu_info(char* json, uint64_t capacity);
}

namespace {

using spw1::Plain;

// A refusal must be one of the library's own, not a failed allocation or an internal error that happened to be caught.
void expect_refusal() {
    const std::string error = ov_ext_last_error();
    expect(!error.compare(0, 11, "SPW1 blob: "), "a refusal for another reason: " + error);
}

// How to call, from the first bytes of an input.
struct Call {
    size_t shift;  // of the blob's end against the page border; valid blobs are multiples of 64 bytes, so also of its start
    uint64_t rows;
    int64_t activation_group;
    bool is_bf16;
    int threads;
    unsigned contents;  // of x
    uint32_t seed;

    explicit Call(const uint8_t* bytes) {
        constexpr uint64_t some_rows[] = {1, 2, 3, 4, 0, 5, 8, 9, 16, 17, 33, 70};
        constexpr int64_t groups[] = {128, 0, -1, 64};
        shift = bytes[0] & 63;
        rows = some_rows[bytes[1] % 12];
        activation_group = groups[bytes[2] % 4];
        is_bf16 = bytes[3] & 1;
        threads = 1 + (bytes[3] >> 1) % 3;
        contents = bytes[4] % 6;
        std::memcpy(&seed, bytes + 4, 4);
    }
};

std::vector<float> activations(const Call& call, uint64_t count) {
    std::vector<float> x(count);
    uint32_t state = call.seed * 2 + 1;
    for (float& value : x) {
        state = state * 1664525 + 1013904223;
        const uint32_t bits = state ^ state >> 15;
        const float even = float(int32_t(bits)) * 0x1p-31f;
        switch (call.contents) {
            case 0:
            case 1: value = even; break;
            case 2: value = bits % 3 ? 0.0f : even; break;
            case 3: value = even * (bits % 2 ? 1e-38f : 1e-41f); break;
            case 4: value = even * 3e38f; break;
            default:  // one in 64 is any bit pattern: NaN, infinity, denormal
                value = bits % 64 ? even : spw1::from_bits(bits % 128 ? bits * 0x9E3779B1u : 0x7F800000u);
        }
        if (call.is_bf16)
            value = spw1::from_bits(uint32_t(spw1::round_to_bf16(value)) << 16);
    }
    return x;
}

const std::vector<std::string>& kernels() {
    static const std::vector<std::string> names = [] {
        char json[4096];
        expect(!ov_ext_cpu_info(json, sizeof(json)), ov_ext_last_error());
        const std::string text = json, key = "\"kernels\": [";
        std::vector<std::string> result;
        for (size_t at = text.find(key) + key.size(); text[at] != ']'; at = text.find_first_of("\",]", at)) {
            const size_t open = text.find('"', at), close = text.find('"', open + 1);
            result.push_back(text.substr(open + 1, close - open - 1));
            at = close + 1;
        }
        return result;
    }();
    return names;
}

// The plain arrays that the C interface takes.
struct Arrays {
    std::vector<uint8_t> values, scales;

    explicit Arrays(const Plain& w) {
        const size_t value_bytes = w.kind == spw1::bf16 ? 2 : 1, scale_bytes = w.f32_scales ? 4 : 2;
        for (int32_t value : w.values)
            for (size_t byte = 0; byte < value_bytes; byte++)
                values.push_back(uint8_t(value >> (8 * byte)));
        for (uint32_t bits : w.scales)
            for (size_t byte = 0; byte < scale_bytes; byte++)
                scales.push_back(uint8_t(bits >> (8 * byte)));
    }
};

void check_reading_and_writing(const Plain& w, const uint8_t* blob, size_t bytes) {
    OvExtBlob about;
    expect(!ov_ext_describe(blob, bytes, &about), "describe refuses a valid blob");
    expect(about.kind == w.kind && about.n == int64_t(w.n) && about.k == int64_t(w.k) && about.group == int64_t(w.group) &&
               about.dense == w.dense && about.scales_f32 == w.f32_scales && about.groups == int64_t(w.groups()) &&
               about.has_bias == w.has_bias,
           "describe is wrong");
    const Arrays arrays(w);
    std::vector<uint8_t> values(arrays.values.size()), scales(arrays.scales.size());
    std::vector<uint32_t> bias(w.bias.size());
    expect(!ov_ext_unpack(blob, bytes, values.data(), scales.data(), reinterpret_cast<float*>(bias.data())), "unpack refuses a valid blob");
    expect(values == arrays.values && scales == arrays.scales && bias == w.bias, "unpack is wrong");

    const OvExtWeight weight{w.kind,
                             int64_t(w.n),
                             int64_t(w.k),
                             int64_t(w.group),
                             w.dense,
                             w.f32_scales,
                             arrays.values.data(),
                             w.kind == spw1::bf16 ? nullptr : arrays.scales.data(),
                             w.has_bias ? reinterpret_cast<const float*>(w.bias.data()) : nullptr};
    uint64_t size = 0;
    Plain without = w;
    without.compensated = false;  // only earlier releases wrote it
    const auto expected = spw1::encode(without);
    expect(!ov_ext_packed_bytes(&weight, &size) && size == expected.size(), "packed_bytes is wrong");
    const Guarded packed(size, 0);
    expect(!ov_ext_pack(&weight, packed.data, size) && !std::memcmp(packed.data, expected.data(), size), "pack is wrong");
}

bool same(float y, double expected, double bound) {
    return std::isnan(expected) ? std::isnan(y) : bound == INFINITY || y == expected || std::fabs(y - expected) <= bound;
}

void check_products(const Plain& w, const uint8_t* blob, size_t bytes, const Call& call) {
    const uint64_t segment = w.kind == spw1::bf16 ? 1 : w.group ? w.group : 128;
    const bool fits = call.activation_group <= 0 || uint64_t(call.activation_group) % segment == 0;
    const bool integer = w.kind != spw1::bf16 && call.activation_group;
    constexpr uint64_t work = 1 << 18;  // multiplications, so that an input takes milliseconds
    const uint64_t rows = std::min(call.rows, std::max<uint64_t>(1, work / (w.n * w.k)));
    const auto x = activations(call, rows * w.k);
    const uint64_t width = call.is_bf16 ? 2 : 4;
    const Guarded in(x.size() * width, 0), out(rows * w.n * width, 0);
    for (size_t i = 0; i < x.size(); i++)
        if (call.is_bf16)
            reinterpret_cast<uint16_t*>(in.data)[i] = uint16_t(spw1::to_bits(x[i]) >> 16);
        else
            reinterpret_cast<float*>(in.data)[i] = x[i];
    const auto expected = fits ? spw1::multiply(w, x, rows, call.activation_group) : spw1::Product{};
    for (const std::string& kernel : kernels()) {
        const uint64_t count = kernel == "reference" ? std::min<uint64_t>(rows, 2) : rows;  // slow, and alike for every row
        const int error =
            ov_ext_matmul(in.data, call.is_bf16, count, blob, bytes, call.activation_group, kernel.c_str(), call.threads, 0, out.data);
        expect(error == !fits, kernel + (error ? std::string(": ") + ov_ext_last_error() : ": took an activation group that does not fit"));
        for (uint64_t i = 0; fits && i < count * w.n; i++) {
            const float y = call.is_bf16 ? spw1::from_bits(uint32_t(reinterpret_cast<const uint16_t*>(out.data)[i]) << 16)
                                         : reinterpret_cast<const float*>(out.data)[i];
            double value = expected.y[i], bound = expected.bound[i];
            if (integer && call.is_bf16)
                value = spw1::from_bits(uint32_t(spw1::round_to_bf16(float(value))) << 16);
            else if (call.is_bf16)
                bound += std::isfinite(value) ? std::ldexp(std::fabs(value) + bound, -8) : 0;
            if (!same(y, value, bound))
                found(kernel + ": output " + std::to_string(i) + " is " + std::to_string(y) + ", not " + std::to_string(value) +
                      " within " + std::to_string(bound));
        }
    }
}

}  // namespace

bool check(const uint8_t* input, size_t size) {
    if (size < call_bytes)
        return false;
    const Call call(input);
    const size_t bytes = size - call_bytes;
    const Guarded blob(bytes, call.shift);
    std::memcpy(blob.data, input + call_bytes, bytes);
    const auto weight = spw1::decode(blob.data, bytes);
    const bool refused = ov_ext_validate(blob.data, bytes);
    if (refused)
        expect_refusal();
    expect(refused == !weight, refused ? std::string("a valid blob is refused: ") + ov_ext_last_error() : "a malformed blob is accepted");
    if (weight) {
        check_reading_and_writing(*weight, blob.data, bytes);
        check_products(*weight, blob.data, bytes, call);
    } else {  // nothing of x and y may be touched
        expect(ov_ext_matmul(nullptr, 0, 1, blob.data, bytes, 0, nullptr, call.threads, 0, nullptr), "a malformed blob is multiplied");
        expect_refusal();
    }
    return weight.has_value();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {  // for the fuzzing engines
    check(data, size);
    return 0;
}

// Memory that a small file only claims to need is a finding.
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=256"; }
