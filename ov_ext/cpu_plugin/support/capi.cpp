// The C interface behind native.py: the last error, and what this machine can do.
#include "capi.hpp"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "bandwidth.hpp"
#include "cpu_features.hpp"
#include "isa_selection.hpp"

namespace ov_ext {
namespace {

thread_local std::string last_error;

}  // namespace

void set_last_error(const char* what) { last_error = what; }

void write_text(const std::string& text, char* to, uint64_t capacity) {
    if (text.size() + 1 > capacity)
        throw std::length_error("a buffer of " + std::to_string(text.size() + 1) + " bytes is needed, got " + std::to_string(capacity));
    std::memcpy(to, text.c_str(), text.size() + 1);
}

}  // namespace ov_ext

using namespace ov_ext;

OV_EXT_API const char* ov_ext_last_error() { return last_error.c_str(); }

// Reads a buffer of `bytes` with `threads` threads (0 = the arena of the caller) `repeats` times; gives the best and the median GB/s.
OV_EXT_API int ov_ext_read_bandwidth(uint64_t bytes, int threads, int repeats, double* best, double* median) {
    return guarded([&] {
        if (bytes < smallest_buffer || repeats < 1)
            throw std::invalid_argument("a read bandwidth needs at least " + std::to_string(smallest_buffer) + " bytes and one repeat");
        const ReadBandwidth result = read_bandwidth(bytes, threads, repeats);
        *best = result.best, *median = result.median;
    });
}

// Writes one JSON object: features of the CPU, AMX permission, and which instruction sets can run, best first ("kernels").
OV_EXT_API int ov_ext_cpu_info(char* json, uint64_t capacity) {
    return guarded([&] {
        const CpuFeatures& f = cpu_features();
        const auto flag = [](bool v) { return v ? "true" : "false"; };
        const std::pair<const char*, bool> features[] = {
            {"avx2", f.avx2},
            {"avx_vnni", f.avx_vnni},
            {"avx512", f.avx512},
            {"avx512_vbmi2", f.avx512_vbmi2},
            {"avx512_vnni", f.avx512_vnni},
            {"avx512_bf16", f.avx512_bf16},
            {"gfni", f.gfni},
            {"amx_tile", f.amx_tile},
            {"amx_bf16", f.amx_bf16},
            {"amx_int8", f.amx_int8},
        };
        std::string text = "{\"features\": {";
        for (const auto& [name, value] : features)
            text += std::string(text.back() == '{' ? "" : ", ") + "\"" + name + "\": " + flag(value);
        text += std::string("}, \"amx_permission\": ") + flag(amx_permission()) + ", \"kernels\": [";
        for (const InstructionSet isa : available_instruction_sets())
            text += std::string(text.back() == '[' ? "" : ", ") + "\"" + name_of(isa) + "\"";
        write_text(text + "]}", json, capacity);
    });
}
