// The C interface behind native.py: packing, checking and running a blob without OpenVINO. For errors see support/capi.hpp.
#include "../support/capi.hpp"

#include "../support/isa_selection.hpp"
#include "../support/parallel.hpp"
#include "dense_copies.hpp"
#include "dispatch.hpp"
#include "format.hpp"

using namespace ov_ext;
using namespace ov_ext::sparse_matmul;

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

OV_EXT_API int ov_ext_packed_bytes(const OvExtWeight* weight, uint64_t* bytes) {
    return guarded([&] { *bytes = packed_bytes(plain(*weight)); });
}

OV_EXT_API int ov_ext_pack(const OvExtWeight* weight, uint8_t* blob, uint64_t bytes) {
    return guarded([&] { pack(plain(*weight), blob, bytes); });
}

OV_EXT_API int ov_ext_validate(const uint8_t* blob, uint64_t bytes) {
    return guarded([&] { validate(blob, bytes); });
}

// Whether models compiled from now on have the checksums of their constant blobs compared.
OV_EXT_API int ov_ext_verify(int wanted) {
    return guarded([&] { verification() = wanted != 0; });
}

// Writes the compensation of an integer weight: i16[Npad / 64, Kpad / segment, 64], `number` of them. For the tests.
OV_EXT_API int ov_ext_compensation(const uint8_t* blob, uint64_t bytes, int16_t* sums, uint64_t number) {
    return guarded([&] {
        const BlobView w = parse(blob, bytes);
        if (number != number_of_sums(w))
            throw InvalidBlob(std::to_string(number_of_sums(w)) + " sums expected");
        validate_content(w, sums);
    });
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

// Length of the dense form of a blob that has passed ov_ext_validate, and the form itself.
OV_EXT_API int ov_ext_dense_bytes(const uint8_t* blob, uint64_t bytes, uint64_t* dense) {
    return guarded([&] { *dense = dense_bytes(parse(blob, bytes)); });
}

OV_EXT_API int ov_ext_expand(const uint8_t* blob, uint64_t bytes, uint8_t* dense) {
    return guarded([&] { expand(parse(blob, bytes), dense); });
}

// Bytes that dense copies of sparse weights take now.
OV_EXT_API uint64_t ov_ext_bytes_of_dense_copies() { return bytes_of_dense_copies(); }

// Sets how many bytes they may take from now on; gives the limit that was.
OV_EXT_API uint64_t ov_ext_limit_dense_copies(uint64_t bytes) { return limit_dense_copies(bytes); }

// isa: name of an instruction set, or null for the kernel that OpenVINO would use. threads: 0 = the arena of the caller.
OV_EXT_API int ov_ext_matmul(const void* x, int x_is_bf16, uint64_t rows, const uint8_t* blob, uint64_t bytes, int64_t activation_group,
                             const char* isa, int threads, int checked, void* y) {
    return guarded([&] {
        BlobView w = parse(blob, bytes);
        check_activation_group(w, activation_group);
        std::optional<InstructionSet> wanted;
        if (isa)
            wanted = instruction_set_by_name(isa);
        const Kernel& kernel = select_kernel(w, activation_group, rows, wanted);
        with_threads(threads, [&] {
            const bool compensate = w.segment && kernel.reads_compensation && activation_group && !w.compensation;
            std::vector<int16_t> sums(compensate ? number_of_sums(w) : 0);
            if (!checked || compensate)
                validate_content(w, compensate ? sums.data() : nullptr);
            if (compensate)
                w.compensation = reinterpret_cast<const uint8_t*>(sums.data());
            matmul({{w, y}}, kernel, x, x_is_bf16 != 0, rows, activation_group);
        });
    });
}

// Writes one JSON object: which kernel runs, for each kind of weight the numbers of rows of x from which another one takes over, with
// quantized (bf16: rounded) activations.
OV_EXT_API int ov_ext_kernel_choice(char* json, uint64_t capacity) {
    return guarded([&] {
        std::string text = "{";
        for (const Kind kind : {Kind::bf16, Kind::int8, Kind::int4}) {
            text += std::string(text.back() == '{' ? "" : ", ") + "\"" + kind_name(kind) + "\": [";
            BlobView w{};
            w.kind = kind, w.k_pad = chunk_k, w.segment = kind == Kind::bf16 ? 0 : 128;
            const Kernel* before = nullptr;
            for (uint64_t rows = 1; rows <= 1024; rows++)
                if (const Kernel* kernel = &select_kernel(w, 128, rows); kernel != before) {
                    text += std::string(before ? ", [" : "[") + std::to_string(rows) + ", \"" + name_of(kernel->isa) + "\"]";
                    before = kernel;
                }
            text += "]";
        }
        write_text(text + "}", json, capacity);
    });
}
