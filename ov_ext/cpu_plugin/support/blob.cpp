#include "blob.hpp"

#include <array>
#include <cstdlib>

#include "unaligned.hpp"

namespace ov_ext {

const char* kind_name(Kind kind) { return kind == Kind::bf16 ? "bf16" : kind == Kind::int8 ? "int8" : "int4"; }

Kind kind_from_name(const std::string& name) {
    for (Kind kind : {Kind::bf16, Kind::int8, Kind::int4})
        if (name == kind_name(kind))
            return kind;
    throw InvalidBlob("unknown value kind '" + name + "': bf16, int8 or int4 is needed");
}

uint32_t crc32(const uint8_t* data, size_t bytes) {  // the polynomial and bit order of zlib, eight bytes a step
    static const auto tables = [] {
        std::array<std::array<uint32_t, 256>, 8> t{};
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++)
                c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
            t[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; i++)
            for (int s = 1; s < 8; s++)
                t[s][i] = t[0][t[s - 1][i] & 255] ^ (t[s - 1][i] >> 8);
        return t;
    }();
    uint32_t crc = 0xFFFFFFFFu;
    for (; bytes >= 8; bytes -= 8, data += 8) {
        const uint64_t v = load<uint64_t>(data) ^ crc;
        crc = 0;
        for (int s = 0; s < 8; s++)
            crc ^= tables[7 - s][v >> (8 * s) & 255];
    }
    for (; bytes; bytes--, data++)
        crc = tables[0][(crc ^ *data) & 255] ^ (crc >> 8);
    return ~crc;
}

std::atomic<bool>& verification() {
    static std::atomic<bool> wanted{[] {
        const char* value = std::getenv("OV_EXT_VERIFY");
        return value && *value && std::string(value) != "0";
    }()};
    return wanted;
}

}  // namespace ov_ext
