// What this CPU and operating system let us execute, asked once per process.
#pragma once

namespace ov_ext {

struct CpuFeatures {
    bool avx2 = false;          // with FMA and F16C, and the OS saves YMM state
    bool avx_vnni = false;      // vpdpbusd on YMM registers, without AVX-512
    bool avx512 = false;        // F, BW, DQ, VL, and the OS saves ZMM state
    bool avx512_vbmi2 = false;  // vpexpandb / vpexpandw
    bool avx512_vnni = false;   // vpdpbusd
    bool avx512_bf16 = false;   // vdpbf16ps
    bool amd = false;           // made by AMD: vdpbf16ps is fast there
    bool gfni = false;          // gf2p8affineqb
    bool amx_tile = false;      // with the OS saving tile state
    bool amx_bf16 = false;
    bool amx_int8 = false;
};

const CpuFeatures& cpu_features();

// Linux hands out AMX tile state per process, on request. True when it was granted, false elsewhere. A refusal on a CPU that has AMX
// is reported on stderr, once, unless OV_EXT_ISA chooses a kernel.
bool amx_permission();

}  // namespace ov_ext
