// The instruction sets that kernels are written for. Plain data only: kernel headers include this file. What each one needs of the CPU
// stands in isa_selection.cpp, its compiler flags in CMakeLists.txt.
#pragma once

#include <cstdint>

namespace ov_ext {

// Weakest first.
enum class InstructionSet : uint8_t { reference, avx2, avx2_vnni, avx512_core, avx512_core_vnni, avx512, avx512_bf16, amx };

}  // namespace ov_ext
