// The specification in code: one lane at a time.
#include "steps.hpp"

namespace ov_ext::sparse_attention {
namespace {

struct Products {
    // Calls take(lane, value) for the set lanes of the next mask.
    template <class Take>
    static void each(const BlockShape& s, const uint8_t*& masks, const uint8_t*& codes, int half, const Take& take) {
        const uint64_t mask = load<uint64_t>(masks);
        masks += 8;
        for (int lane = 0; lane < 64; lane++)
            if (mask >> lane & 1) {
                const uint8_t code = *codes++;
                take(lane, s.int4 ? level_of(half ? code >> 4 : code & 15) : int8_t(code));
            }
    }

    static void scores(const BlockShape& s, const uint8_t* block, const uint8_t*, const int16_t* q, uint64_t rows, int32_t* sums) {
        std::memset(sums, 0, 4 * rows * block_tokens);
        const uint8_t* masks = block + key_masks_at();
        for (int half = 0; half < 2; half++) {
            const uint8_t* codes = block + key_codes_at(s) + half_at(s, s.k_kept, half);
            for (uint64_t quad = 0; quad < s.head_dim / 4; quad++)
                for (int p = 0; p < 2; p++)
                    each(s, masks, codes, half, [&](int lane, int value) {
                        for (uint64_t r = 0; r < rows; r++)
                            sums[r * block_tokens + 32 * half + 16 * p + lane / 4] += value * q[r * s.head_dim + 4 * quad + lane % 4];
                    });
        }
    }

    static void values(const BlockShape& s, const uint8_t* block, const uint8_t*, const int16_t* p15, uint64_t rows, int32_t* sums) {
        std::memset(sums, 0, 4 * rows * s.head_dim);
        const uint8_t* masks = block + value_masks_at(s);
        for (int half = 0; half < 2; half++) {
            const uint8_t* codes = block + value_codes_at(s) + half_at(s, s.v_kept, half);
            for (uint64_t d = 0; d < s.head_dim; d += 2 * panel)
                for (int quad = 0; quad < 8; quad++)
                    for (uint64_t p = d; p < d + 2 * panel && p < s.head_dim; p += panel)
                        each(s, masks, codes, half, [&](int lane, int value) {
                            for (uint64_t r = 0; r < rows; r++)
                                sums[r * s.head_dim + p + lane / 4] += value * p15[r * block_tokens + 32 * half + 4 * quad + lane % 4];
                        });
        }
    }
};

void run(const Part& part, float* out) { attend<Products>(part, out); }

}  // namespace

const Kernel reference_kernel = {InstructionSet::reference, run};

}  // namespace ov_ext::sparse_attention
