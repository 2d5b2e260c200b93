#include "handles.hpp"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>

namespace ov_ext::sparse_attention {
namespace {

constexpr int32_t magic = 0x31564B53, version = 1;
enum Word { magic_word, version_word, id_low, id_high, steps_word, tokens_word, sequences_word, unused_word };

uint64_t id_of(const int32_t* handle) { return uint64_t(uint32_t(handle[id_low])) | uint64_t(uint32_t(handle[id_high])) << 32; }

uint64_t random_id() {  // never 0
    static std::mutex mutex;
    static std::mt19937_64 engine{std::random_device{}()};
    std::lock_guard<std::mutex> lock(mutex);
    return engine() | 1;
}

}  // namespace

Caches::Step::Step(Caches& caches, const int32_t* handle, const void* address, const Settings& settings) : m_caches(caches) {
    const bool empty = std::all_of(handle, handle + handle_words, [](int32_t word) { return word == 0; });
    const auto fail = [](const std::string& what) {
        throw std::invalid_argument("its state " + what +
                                    ". A state is valid in the request that wrote it, until its next step: call reset_state()");
    };
    if (!empty && (handle[magic_word] != magic || handle[version_word] != version))
        fail("is none of this operation");
    std::lock_guard<std::mutex> lock(caches.m_mutex);
    if (empty) {
        if (const auto before = caches.m_at.find(address); before != caches.m_at.end())
            caches.drop(before->second);
        do
            m_id = random_id();
        while (caches.m_entries.count(m_id));
        caches.m_entries[m_id].cache = std::make_shared<Cache>(settings);
    } else {
        m_id = id_of(handle);
        const auto found = caches.m_entries.find(m_id);
        if (found == caches.m_entries.end())
            fail("names a cache that is not in memory: it is of another model, layer or session, or was reset");
        const Entry& entry = found->second;
        if (entry.busy)
            fail("is in use by another request");
        if (entry.steps != handle[steps_word] || uint64_t(uint32_t(handle[tokens_word])) != entry.cache->tokens() ||
            uint64_t(uint32_t(handle[sequences_word])) != entry.cache->sequences.size() ||
            !std::all_of(handle + unused_word, handle + handle_words, [](int32_t word) { return word == 0; }))
            fail("is not that of the cache's last step");
    }
    Entry& entry = caches.m_entries[m_id];
    entry.busy = true;
    m_cache = entry.cache;
    caches.m_at[address] = m_id;
}

Caches::Step::~Step() {
    std::lock_guard<std::mutex> lock(m_caches.m_mutex);
    const auto found = m_caches.m_entries.find(m_id);
    if (found == m_caches.m_entries.end())
        return;
    found->second.busy = false;
    if (!m_committed)
        m_caches.drop(m_id);
}

void Caches::Step::commit(int32_t* handle) {
    std::lock_guard<std::mutex> lock(m_caches.m_mutex);
    Entry& entry = m_caches.m_entries[m_id];
    std::fill_n(handle, handle_words, 0);
    handle[magic_word] = magic, handle[version_word] = version;
    handle[id_low] = int32_t(m_id), handle[id_high] = int32_t(m_id >> 32);
    handle[steps_word] = ++entry.steps;
    handle[tokens_word] = int32_t(m_cache->tokens());
    handle[sequences_word] = int32_t(m_cache->sequences.size());
    m_committed = true;
}

// Not while a request uses it: then that one drops it, or goes on.
void Caches::drop(uint64_t id) {
    const auto found = m_entries.find(id);
    if (found == m_entries.end() || found->second.busy)
        return;
    m_entries.erase(found);
    for (auto at = m_at.begin(); at != m_at.end();)
        at = at->second == id ? m_at.erase(at) : std::next(at);
}

uint64_t Caches::count() {
    std::lock_guard<std::mutex> lock(m_mutex);
    return m_entries.size();
}

uint64_t Caches::bytes() {
    std::lock_guard<std::mutex> lock(m_mutex);
    uint64_t bytes = 0;
    for (const auto& [id, entry] : m_entries)
        if (!entry.busy)
            bytes += entry.cache->bytes();
    return bytes;
}

}  // namespace ov_ext::sparse_attention
