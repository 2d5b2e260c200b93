// The C interface behind native.py: packing, checking and running a blob without OpenVINO. Functions return 0, or 1 with the reason in
// ov_ext_last_error(). No exception crosses the boundary.
#include <tbb/task_arena.h>

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "../support/bandwidth.hpp"
#include "../support/cpu_features.hpp"
#include "dispatch.hpp"
#include "format.hpp"

using namespace ov_ext::sparse_matmul;

namespace {

thread_local std::string last_error;

template <class Body>
int guarded(const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        last_error = error.what();
        return 1;
    }
}

}  // namespace

#define OV_EXT_API extern "C" __attribute__((visibility("default")))

extern "C" {
struct OvExtWeight {  // mirrors native.py
    int64_t kind, n, k, group, dense, scales_f32;
    const void *values, *scales;
    const float* bias;
};
struct OvExtBlob {  // what unpack needs to allocate
    int64_t kind, n, k, group, dense, scales_f32, groups, has_bias;
};
}

namespace {
PlainWeight plain(const OvExtWeight& w) {
    if (w.kind < 1 || w.kind > 3)
        throw InvalidBlob("unknown value kind");
    return {Kind(w.kind), uint64_t(w.n), uint64_t(w.k), uint64_t(w.group), w.dense != 0, w.scales_f32 != 0, w.values, w.scales, w.bias};
}
}  // namespace

OV_EXT_API const char* ov_ext_last_error() { return last_error.c_str(); }

OV_EXT_API int ov_ext_packed_bytes(const OvExtWeight* weight, uint64_t* bytes) {
    return guarded([&] { *bytes = packed_bytes(plain(*weight)); });
}

OV_EXT_API int ov_ext_pack(const OvExtWeight* weight, uint8_t* blob, uint64_t bytes) {
    return guarded([&] { pack(plain(*weight), blob, bytes); });
}

OV_EXT_API int ov_ext_validate(const uint8_t* blob, uint64_t bytes) {
    return guarded([&] { validate(blob, bytes); });
}

OV_EXT_API int ov_ext_describe(const uint8_t* blob, uint64_t bytes, OvExtBlob* out) {
    return guarded([&] {
        const BlobView w = parse(blob, bytes);
        const uint64_t groups = w.segment ? w.group ? (w.k + w.group - 1) / w.group : 1 : 0;
        *out = {int64_t(w.kind), int64_t(w.n), int64_t(w.k), int64_t(w.group), w.dense, w.scales_f32, int64_t(groups), w.bias != nullptr};
    });
}

// The blob must have passed ov_ext_validate.
OV_EXT_API int ov_ext_unpack(const uint8_t* blob, uint64_t bytes, void* values, void* scales, float* bias) {
    return guarded([&] { unpack(parse(blob, bytes), values, scales, bias); });
}

// isa: kernel name, or null for the selected one. threads: 0 = the arena of the caller.
OV_EXT_API int ov_ext_matmul(const void* x, int x_is_bf16, uint64_t rows, const uint8_t* blob, uint64_t bytes, int64_t activation_group,
                             const char* isa, int threads, int checked, void* y) {
    return guarded([&] {
        const BlobView w = parse(blob, bytes);
        check_activation_group(w, activation_group);
        const Kernel& kernel = select_kernel(w, activation_group, rows, isa ? &kernel_by_name(isa) : nullptr);
        auto run = [&] {
            if (!checked)
                validate_content(w);
            matmul({{w, y}}, kernel, x, x_is_bf16 != 0, rows, activation_group);
        };
        if (threads > 0)
            tbb::task_arena(threads).execute(run);
        else
            run();
    });
}

// Reads a buffer of `bytes` with `threads` threads (0 = the arena of the caller) `repeats` times; gives the best and the median GB/s.
OV_EXT_API int ov_ext_read_bandwidth(uint64_t bytes, int threads, int repeats, double* best, double* median) {
    return guarded([&] {
        if (bytes < 4096 || repeats < 1)
            throw std::invalid_argument("a read bandwidth needs at least 4096 bytes and one repeat");
        const ov_ext::ReadBandwidth result = ov_ext::read_bandwidth(bytes, threads, repeats);
        *best = result.best, *median = result.median;
    });
}

// Writes one JSON object: features of the CPU, AMX permission, kernels best first, and which of them runs: for each kind of weight
// the numbers of rows from which another one takes over, with quantized (bf16: rounded) activations.
OV_EXT_API int ov_ext_cpu_info(char* json, uint64_t capacity) {
    return guarded([&] {
        const auto& f = ov_ext::cpu_features();
        const auto flag = [](bool v) { return v ? "true" : "false"; };
        std::string text = "{\"features\": {";
        const std::pair<const char*, bool> features[] = {
            {"avx2", f.avx2},           {"avx_vnni", f.avx_vnni}, {"avx512", f.avx512},     {"avx512_vbmi2", f.avx512_vbmi2},
            {"avx512_vnni", f.avx512_vnni}, {"avx512_bf16", f.avx512_bf16}, {"gfni", f.gfni}, {"amx_tile", f.amx_tile},
            {"amx_bf16", f.amx_bf16}, {"amx_int8", f.amx_int8}};
        for (const auto& [name, value] : features)
            text += std::string(text.back() == '{' ? "" : ", ") + "\"" + name + "\": " + flag(value);
        text += std::string("}, \"amx_permission\": ") + flag(ov_ext::amx_permission()) + ", \"kernels\": [";
        for (const Kernel* kernel : available_kernels())
            text += std::string(text.back() == '[' ? "" : ", ") + "\"" + kernel->name + "\"";
        text += "], \"choice\": {";
        for (const Kind kind : {Kind::bf16, Kind::int8, Kind::int4}) {
            text += std::string(text.back() == '{' ? "" : ", ") + "\"" + kind_name(kind) + "\": [";
            BlobView w{};
            w.kind = kind, w.k_pad = 512, w.segment = kind == Kind::bf16 ? 0 : 128;
            const Kernel* before = nullptr;
            for (uint64_t rows = 1; rows <= 1024; rows++)
                if (const Kernel* kernel = &select_kernel(w, 128, rows); kernel != before) {
                    text += std::string(before ? ", [" : "[") + std::to_string(rows) + ", \"" + kernel->name + "\"]";
                    before = kernel;
                }
            text += "]";
        }
        text += "}}";
        if (text.size() + 1 > capacity)
            throw InvalidBlob("buffer too small");
        std::memcpy(json, text.c_str(), text.size() + 1);
    });
}
