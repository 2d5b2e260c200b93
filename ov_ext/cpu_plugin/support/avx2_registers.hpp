// Loads and views of AVX2 registers. For files compiled with AVX2 only; everything is in an anonymous namespace.
#pragma once

#include <immintrin.h>

#include "unaligned.hpp"

namespace ov_ext {
namespace {

INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256 floats(__m256i bits) { return _mm256_castsi256_ps(bits); }
INLINE __m256i join(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

}  // namespace
}  // namespace ov_ext
