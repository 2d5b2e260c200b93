// What the formats of all operations share: the error for what cannot be read, names of kinds of values, checksums, finite numbers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "value_kind.hpp"

namespace ov_ext {

// A blob, an argument or a size that cannot be accepted. what() says what was found and what would be right.
struct InvalidBlob : std::runtime_error {
    using std::runtime_error::runtime_error;
};

const char* kind_name(Kind kind);
Kind kind_from_name(const std::string& name);  // throws InvalidBlob

constexpr uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

uint32_t crc32(const uint8_t* data, size_t bytes);

// Whether compiling a model compares checksums: what OV_EXT_VERIFY says until it is set.
std::atomic<bool>& verification();

}  // namespace ov_ext
