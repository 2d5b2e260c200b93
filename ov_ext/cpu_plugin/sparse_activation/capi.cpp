// The C interface behind native.py: checking and running a blob without OpenVINO. For errors see support/capi.hpp.
#include "../support/capi.hpp"

#include "../support/isa_selection.hpp"
#include "../support/parallel.hpp"
#include "dispatch.hpp"
#include "format.hpp"

using namespace ov_ext;
using namespace ov_ext::sparse_activation;

OV_EXT_API int ov_ext_activation_validate(const uint8_t* blob, uint64_t bytes) {
    return guarded([&] { validate(blob, bytes); });
}

OV_EXT_API int ov_ext_activation_describe(const uint8_t* blob, uint64_t bytes, uint64_t* n, uint64_t* k) {
    return guarded([&] {
        const View w = parse(blob, bytes);
        *n = w.n, *k = w.k;
    });
}

// isa: name of an instruction set, or null for the kernel that OpenVINO would use. threads: 0 = the arena of the caller.
OV_EXT_API int ov_ext_activation_matmul(const void* x, int x_is_bf16, uint64_t rows, const uint8_t* blob, uint64_t bytes,
                                        int64_t activation_group, const char* isa, int threads, int checked, void* y) {
    return guarded([&] {
        const View w = parse(blob, bytes);
        check_activation_group(w, activation_group);
        const Kernel& kernel = isa ? select_kernel(instruction_set_by_name(isa)) : select_kernel();
        with_threads(threads, [&] {
            if (!checked)
                validate_content(w);
            matmul(w, kernel, x, x_is_bf16 != 0, rows, activation_group, y);
        });
    });
}
