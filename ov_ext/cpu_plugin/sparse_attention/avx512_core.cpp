// AVX-512 F, BW, DQ and VL (Skylake-SP and later), and the same with VNNI (Cascade Lake): compiled twice. There is no expansion of bytes, so a
// shuffle is made of each mask: see support/avx512_core_expand.hpp. Nibbles are unpacked to bytes first.
#include "../support/avx512_core_expand.hpp"
#include "avx512_products.hpp"

namespace ov_ext::sparse_attention {
namespace {

constexpr uint64_t slack = 64;  // that may be read, or written, behind the codes of a block

struct Bytes {
    const uint8_t *masks, *codes;
    Ahead ahead;
    INLINE __m512i next() {
        ahead.fetch();
        return expand_bytes(masks, codes);
    }
};

// Levels of 4 bits as bytes: the low nibbles of `bytes` bytes, then the high ones.
INLINE void unpack_nibbles(const uint8_t* codes, uint64_t bytes, uint8_t* to) {
    const __m512i levels =
        _mm512_set4_epi32(0x08070605, 0x04030201, int(0xFFFEFDFC), int(0xFBFAF9F8));  // of codes 0..15: -8 ... -1, 1 ... 8
    const __m512i nibble = _mm512_set1_epi8(15);
    for (uint64_t i = 0; i < bytes; i += 64) {
        const uint64_t left = bytes - i;
        const __mmask64 here = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
        const __m512i both = _mm512_maskz_loadu_epi8(here, codes + i);
        _mm512_mask_storeu_epi8(to + i, here, _mm512_shuffle_epi8(levels, _mm512_and_si512(both, nibble)));
        const __m512i high = _mm512_and_si512(_mm512_maskz_srli_epi16(~__mmask32(0), both, 4), nibble);
        _mm512_storeu_si512(to + bytes + i, _mm512_shuffle_epi8(levels, high));
    }
}

struct Codes {
    template <class Product>
    INLINE static void multiply(const Product& product, const BlockShape& s, uint64_t rows, const uint8_t* masks, const uint8_t* codes,
                                uint64_t kept, const uint8_t* next) {
        alignas(64) uint8_t bytes[max_head_dim * slice_bytes + slack];
        if (s.int4) {
            unpack_nibbles(codes, half_tokens * kept, bytes);
            codes = bytes;
        }
        const uint8_t *late_masks = masks + 4 * s.head_dim, *late_codes = codes + half_tokens * kept;
        if (kept == s.head_dim)
            multiply_slices(product, rows, s.head_dim, Expanded{codes}, Expanded{late_codes});
        else
            multiply_slices(product, rows, s.head_dim, Bytes{masks, codes, Ahead(s, next, 0)},
                            Bytes{late_masks, late_codes, Ahead(s, next, 1)});
    }
};

void run(const Part& part, float* out) { attend<Products<Codes>>(part, out); }

}  // namespace

#if defined(__AVX512VNNI__)
const Kernel avx512_core_vnni_kernel = {InstructionSet::avx512_core_vnni, run};
#else
const Kernel avx512_core_kernel = {InstructionSet::avx512_core, run};
#endif

}  // namespace ov_ext::sparse_attention
