// Slices of the format in AVX-512 registers: what the AVX-512 and AMX kernels share. Included by files compiled with these instructions
// only; everything is in an anonymous namespace, so that no other object file can pick it up.
//
// One slice of the format is one register. Decoding it costs an expansion (see avx512_expand.hpp) and, for int4, one gf2p8affineqb that
// cuts out a nibble and extends its sign.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "../support/avx512_expand.hpp"
#include "avx512_sections.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// Walks the masks and values of a chunk, one slice at a time.
template <Kind kind, bool dense>
struct Stream {
    const uint8_t* masks;
    const uint8_t* values;  // bf16, int8: the run; int4: cursor of the even slices
    const uint8_t* odd;     // int4: cursor of the odd slices

    using Mask = std::conditional_t<kind == Kind::bf16, uint32_t, uint64_t>;  // of a slice
    static constexpr uint64_t mask_bytes = sizeof(Mask);

    INLINE Stream(const BlobView& w, uint64_t block, uint64_t chunk)
        : masks(dense ? nullptr : w.masks + (block * w.tiles + chunk * w.tiles_per_chunk) * block_panels * panel_slices * mask_bytes),
          values(w.values + load<uint64_t>(w.directory + 8 * (block * w.chunks + chunk))),
          odd(values) {}

    // Even and odd slices alternate; the parity chooses the cursor and the nibble of int4. The load takes 64 bytes wherever the cursor
    // stands. Fewer may be left in the run: what follows is the next run, or the 64 zero bytes at the end of the blob; expansion drops it.
    // int4: the nibble becomes a byte before the expansion, so that pruned lanes are true zeros.
    template <int parity>
    INLINE __m512i next() {
        const uint8_t*& at = kind == Kind::int4 && parity ? odd : values;
        __m512i slice = _mm512_loadu_si512(at);
        if (kind == Kind::int4)
            slice = _mm512_gf2p8affine_epi64_epi8(slice, _mm512_set1_epi64(int64_t(parity ? high_nibble : low_nibble)), 0);
        if (dense) {
            at += slice_bytes;
            return slice;
        }
        return expand<Mask>(slice, masks, at);
    }

    // Called before slice s of a panel.
    INLINE void prefetch(int s) const {
        const auto* value = reinterpret_cast<const char*>(values);
        if (dense) {  // bound by memory alone: early, and into L2, because the line buffers of L1 are few
            if (kind != Kind::int4 || s % 2 == 0)
                _mm_prefetch(value + dense_values_ahead, _MM_HINT_T1);
            return;
        }
        if (s % slices_per_fetch == 0) {
            _mm_prefetch(value + values_ahead, _MM_HINT_T0);
            if (kind != Kind::int4)
                _mm_prefetch(value + values_ahead + line_bytes, _MM_HINT_T0);
        }
        if (s % (line_bytes / int(mask_bytes)) == 0)
            _mm_prefetch(reinterpret_cast<const char*>(masks) + slices_ahead * mask_bytes, _MM_HINT_T0);
    }
};

}  // namespace
}  // namespace ov_ext::sparse_matmul
