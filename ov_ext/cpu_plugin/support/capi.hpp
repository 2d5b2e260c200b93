// What the C interfaces of all operations share. Their functions return 0, or 1 with the reason in ov_ext_last_error(). No exception
// crosses the boundary.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#define OV_EXT_API extern "C" __attribute__((visibility("default")))

namespace ov_ext {

void set_last_error(const char* what);  // of this thread

template <class Body>
int guarded(const Body& body) {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        set_last_error(error.what());
        return 1;
    }
}

// Copies a text with its final zero. Throws std::length_error when it does not fit.
void write_text(const std::string& text, char* to, uint64_t capacity);

}  // namespace ov_ext
