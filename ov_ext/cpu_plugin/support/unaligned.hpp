// Reading plain values at any address, for every file that reads a blob. Always inlined and in an anonymous namespace: a file compiled
// for one instruction set must not lend its copy to the others.
#pragma once

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // the same for a lambda, behind its parameters

namespace ov_ext {
namespace {

template <class T>
INLINE T load(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
}

}  // namespace
}  // namespace ov_ext
