// What the drivers (main.cpp, and engine.cpp for libFuzzer and AFL++) call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

constexpr size_t call_bytes = 8;  // how to call, before the blob

// Ends the process when the library is wrong. Returns whether the blob is valid.
bool check(const uint8_t* input, size_t size);

// SplitMix64: the same numbers on every machine.
struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        return z ^ z >> 31;
    }
    uint64_t below(uint64_t count) { return next() % count; }
    bool one_in(uint64_t count) { return below(count) == 0; }
};

// One blob per kind, group, storage, scale type, bias, and shape with ragged edges.
std::vector<std::vector<uint8_t>> seeds();
// Changes an input a little, knowing the format: half of the time into another valid blob.
void mutate(std::vector<uint8_t>& input, Random& random);
