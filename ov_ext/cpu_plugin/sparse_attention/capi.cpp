// The C interface behind native.py: a cache without OpenVINO, for tests and timings. For errors see support/capi.hpp.
#include "../support/capi.hpp"

#include <cstring>
#include <vector>

#include "../support/isa_selection.hpp"
#include "../support/parallel.hpp"
#include "attention.hpp"
#include "packing.hpp"

using namespace ov_ext;
using namespace ov_ext::sparse_attention;

extern "C" {
struct OvExtCacheSettings {  // mirrors native.py
    double k_level, v_level;
    int64_t head_dim, heads, int4, sink, recent, pack_from;
};
}

namespace {
Settings settings_of(const OvExtCacheSettings& s) {
    const auto dim = uint64_t(s.head_dim);
    return {{dim, kept_of(dim, s.k_level), kept_of(dim, s.v_level), s.int4 != 0},
            uint64_t(s.heads),
            uint64_t(s.sink),
            uint64_t(s.recent),
            uint64_t(s.pack_from)};
}
}  // namespace

OV_EXT_API int ov_ext_cache_new(const OvExtCacheSettings* settings, uint64_t sequences, void** cache) {
    return guarded([&] {
        auto made = std::make_unique<Cache>(settings_of(*settings));
        made->reorder(nullptr, sequences);
        *cache = made.release();
    });
}

OV_EXT_API void ov_ext_cache_free(void* cache) { delete static_cast<Cache*>(cache); }

OV_EXT_API int ov_ext_cache_reorder(void* cache, const int32_t* from, uint64_t count) {
    return guarded([&] { static_cast<Cache*>(cache)->reorder(from, count); });
}

OV_EXT_API int ov_ext_cache_append(void* cache, const float* k, const float* v, uint64_t count, int threads) {
    return guarded([&] { with_threads(threads, [&] { static_cast<Cache*>(cache)->append(k, v, count); }); });
}

OV_EXT_API uint64_t ov_ext_cache_bytes(const void* cache) { return static_cast<const Cache*>(cache)->bytes(); }
OV_EXT_API uint64_t ov_ext_cache_tokens(const void* cache) { return static_cast<const Cache*>(cache)->tokens(); }
OV_EXT_API uint64_t ov_ext_cache_pages(const void* cache) {
    const auto& sequences = static_cast<const Cache*>(cache)->sequences;
    return sequences.empty() ? 0 : sequences[0].pages.size();
}

// mask: f32 [mask_batch, mask_queries, tokens + count], or null. isa: a name, or null for the kernel that OpenVINO would use.
OV_EXT_API int ov_ext_cache_attend(const void* cache, const float* q, const float* k, const float* v, uint64_t q_heads, uint64_t count,
                                   float scale, int causal, const float* mask, uint64_t mask_batch, uint64_t mask_queries, const char* isa,
                                   int threads, float* y) {
    return guarded([&] {
        const auto& from = *static_cast<const Cache*>(cache);
        std::optional<InstructionSet> wanted;
        if (isa)
            wanted = instruction_set_by_name(isa);
        const Kernel& kernel = select_kernel(wanted);
        with_threads(threads, [&] {
            attend(from, kernel, {q, k, v, q_heads, count, scale, causal != 0}, {mask, mask_batch, mask_queries, from.tokens() + count}, y);
        });
    });
}

OV_EXT_API int ov_ext_kv_block_bytes(const OvExtCacheSettings* settings, uint64_t* bytes) {
    return guarded([&] { *bytes = bytes_of_block(settings_of(*settings).shape); });
}

// k, v: f32 [64, head_dim]; block: ov_ext_kv_block_bytes.
OV_EXT_API int ov_ext_kv_pack(const OvExtCacheSettings* settings, const float* k, const float* v, uint8_t* block) {
    return guarded([&] {
        const Settings s = settings_of(*settings);
        const float *keys[block_tokens], *values[block_tokens];
        for (uint64_t j = 0; j < block_tokens; j++)
            keys[j] = k + j * s.shape.head_dim, values[j] = v + j * s.shape.head_dim;
        pack_block(s.shape, keys, values, block);
    });
}

OV_EXT_API int ov_ext_kv_unpack(const OvExtCacheSettings* settings, const uint8_t* block, float* k, float* v) {
    return guarded([&] { unpack_block(settings_of(*settings).shape, block, k, v); });
}
