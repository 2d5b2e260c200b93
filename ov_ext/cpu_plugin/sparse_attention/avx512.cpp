// AVX-512 with VBMI2 and VNNI: a slice is loaded, expanded and multiplied while it is in a register.
#include "../support/avx512_expand.hpp"
#include "avx512_products.hpp"

namespace ov_ext::sparse_attention {
namespace {

INLINE __m512i next_slice(const uint8_t* at) { return _mm512_loadu_si512(at); }

struct Bytes {
    const uint8_t *masks, *codes;
    Ahead ahead;
    INLINE __m512i next() {
        ahead.fetch();
        return expand<uint64_t>(next_slice(codes), masks, codes);
    }
};
template <int half>
struct Nibbles {
    const uint8_t *masks, *codes;
    Ahead ahead;
    INLINE __m512i next() {
        ahead.fetch();
        const __m512i levels =
            _mm512_set4_epi32(0x08070605, 0x04030201, int(0xFFFEFDFC), int(0xFBFAF9F8));  // of codes 0..15: -8 ... -1, 1 ... 8
        const __m512i packed = next_slice(codes);
        const __m512i nibble = _mm512_and_si512(half ? _mm512_maskz_srli_epi16(~__mmask32(0), packed, 4) : packed, _mm512_set1_epi8(15));
        return expand<uint64_t>(_mm512_shuffle_epi8(levels, nibble), masks, codes);
    }
};

struct Codes {
    template <class Product>
    INLINE static void multiply(const Product& product, const BlockShape& s, uint64_t rows, const uint8_t* masks, const uint8_t* codes,
                                uint64_t kept, const uint8_t* next) {
        const uint8_t *late_masks = masks + 4 * s.head_dim, *late_codes = codes + half_at(s, kept, 1);
        const Ahead ahead(s, next, 0), later(s, next, 1);
        if (s.int4)
            multiply_slices(product, rows, s.head_dim, Nibbles<0>{masks, codes, ahead}, Nibbles<1>{late_masks, late_codes, later});
        else
            multiply_slices(product, rows, s.head_dim, Bytes{masks, codes, ahead}, Bytes{late_masks, late_codes, later});
    }
};

void run(const Part& part, float* out) { attend<Products<Codes>>(part, out); }

}  // namespace

const Kernel avx512_kernel = {InstructionSet::avx512, run};

}  // namespace ov_ext::sparse_attention
