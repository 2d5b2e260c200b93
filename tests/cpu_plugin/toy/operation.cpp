// Dispatch and C interface.
#include <stdexcept>

#include "kernel.hpp"
#include "support/capi.hpp"
#include "support/isa_selection.hpp"
#include "support/parallel.hpp"
#include "support/scratch.hpp"
#include "support/validation_cache.hpp"

namespace toy {
namespace {

// clang-format off
constexpr const Kernel* kernels[] = {
#if defined(__x86_64__)
    &avx512_kernel, &avx512_core_kernel, &avx2_kernel,
#endif
    &reference_kernel};
// clang-format on

ov_ext::ValidationCache validated;

}  // namespace
}  // namespace toy

// x: [slices * 64]; slices: even. y: for each kernel that can run here, best first, the sum of codes and the factor of the row.
// values: followed by 64 bytes that may be read.
OV_EXT_API int toy_multiply(const uint8_t* masks, const uint8_t* values, uint64_t count, const float* x, uint64_t slices, int64_t* sums,
                            float* factors) {
    return ov_ext::guarded([&] {
        static const auto owner = std::make_shared<int>();
        if (!toy::validated.knows(owner.get(), masks, 8 * slices)) {
            uint64_t stored = 0;
            for (uint64_t i = 0; i < 8 * slices; i++)
                stored += uint64_t(__builtin_popcount(masks[i]));
            if (stored != count)
                throw std::invalid_argument("the masks count other values than there are");
            toy::validated.add(owner, masks, 8 * slices);
        }
        const auto available = ov_ext::available_kernels(toy::kernels);
        const uint64_t k = 64 * slices;
        ov_ext::parallel_each(available.size(), [&](uint64_t i) {
            ov_ext::Scratch codes(4 * k);
            available[i]->prepare({k, k, k, k}, x, codes.data(), factors + i);
            sums[i] = available[i]->multiply(masks, values, codes.data(), slices);
        });
    });
}
