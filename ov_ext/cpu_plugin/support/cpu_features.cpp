#include "cpu_features.hpp"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#include <cstring>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#endif

#include "isa_selection.hpp"

namespace ov_ext {

#if defined(__x86_64__)
namespace {

uint64_t enabled_state() {  // XCR0: the register state the operating system saves
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

CpuFeatures detect() {
    CpuFeatures f;
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d))
        return f;
    f.amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return f;
    const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    uint32_t a7, b7, c7, d7;
    if (!osxsave || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7))
        return f;
    const uint64_t state = enabled_state();
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xE6) == 0xE6, tiles = (state & 0x60000) == 0x60000;
    f.avx2 = ymm && fma && f16c && (b7 >> 5 & 1);
    f.avx512 = zmm && f.avx2 && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);
    f.avx512_vbmi2 = f.avx512 && (c7 >> 6 & 1);
    f.avx512_vnni = f.avx512 && (c7 >> 11 & 1);
    f.gfni = f.avx512 && (c7 >> 8 & 1);
    // Who asks for AMX by name is believed: an emulator can answer the request for permission, but not CPUID. Without permission no
    // kernel uses it, whatever is said here.
    const char* wanted = requested_name();
    const bool believed = wanted && std::strcmp(wanted, "amx") == 0;
    f.amx_tile = believed || (tiles && (d7 >> 24 & 1));
    f.amx_bf16 = believed || (f.amx_tile && (d7 >> 22 & 1));
    f.amx_int8 = believed || (f.amx_tile && (d7 >> 25 & 1));
    if (a7 >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        f.avx_vnni = f.avx2 && (a >> 4 & 1);
        f.avx512_bf16 = f.avx512 && (a >> 5 & 1);
    }
    return f;
}

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}
#else
const CpuFeatures& cpu_features() {
    static const CpuFeatures features;
    return features;
}
#endif

bool amx_permission() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = [] {
        if (!cpu_features().amx_tile)
            return false;
        if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0)
            return true;
        if (!requested_name())  // else the user has chosen: another kernel, or amx, which is then an error
            std::fprintf(stderr, "ov_ext: the system does not permit AMX (arch_prctl: %s), other kernels run\n", std::strerror(errno));
        return false;
    }();
    return granted;
#else
    return false;
#endif
}

}  // namespace ov_ext
