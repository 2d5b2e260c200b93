// Our mutations for libFuzzer (linked in) and for AFL++ (a shared library named by AFL_CUSTOM_MUTATOR_LIBRARY).
#include <cstring>

#include "harness.hpp"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    Random random{seed};
    std::vector<uint8_t> input(data, data + size);
    mutate(input, random);
    if (input.size() > max_size)
        return size;
    std::memcpy(data, input.data(), input.size());
    return input.size();
}

namespace {
struct AflState {
    Random random;
    std::vector<uint8_t> input;
};
}  // namespace

extern "C" void* afl_custom_init(void*, unsigned seed) { return new AflState{{seed}, {}}; }

extern "C" size_t afl_custom_fuzz(void* state, uint8_t* data, size_t size, uint8_t** out, uint8_t*, size_t, size_t max_size) {
    auto& [random, input] = *static_cast<AflState*>(state);
    input.assign(data, data + size);
    mutate(input, random);
    if (input.size() > max_size)
        input.assign(data, data + size);
    *out = input.data();
    return input.size();
}

extern "C" void afl_custom_deinit(void* state) { delete static_cast<AflState*>(state); }
