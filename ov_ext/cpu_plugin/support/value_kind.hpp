// How the values of a packed weight are stored. Plain data only: kernel headers include this file.
#pragma once

#include <cstdint>

namespace ov_ext {

enum class Kind : uint8_t { bf16 = 1, int8 = 2, int4 = 3 };

}  // namespace ov_ext
