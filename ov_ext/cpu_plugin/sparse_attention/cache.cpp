#include "cache.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <set>
#include <stdexcept>
#include <string>

#include "../support/parallel.hpp"
#include "packing.hpp"

namespace ov_ext::sparse_attention {

void Page::Free::operator()(uint8_t* p) const { std::free(p); }

Page::Page(uint64_t bytes) : m_memory(static_cast<uint8_t*>(std::aligned_alloc(64, bytes + slice_bytes))) {
    if (!m_memory)
        throw std::bad_alloc();
    std::memset(m_memory.get() + bytes, 0, slice_bytes);
}

void DenseStore::drop(uint64_t count) {
    m_tokens -= count;
    for (uint64_t head = 0; head < 2 * m_heads; head++) {
        float* first = m_floats.data() + head * m_room * m_dim;
        std::memmove(first, first + count * m_dim, 4 * m_tokens * m_dim);
    }
}

void DenseStore::make_room(uint64_t room) {
    std::vector<float> floats(2 * m_heads * room * m_dim);
    for (uint64_t head = 0; m_tokens && head < 2 * m_heads; head++)
        std::memcpy(floats.data() + head * room * m_dim, m_floats.data() + head * m_room * m_dim, 4 * m_tokens * m_dim);
    m_floats = std::move(floats);
    m_room = room;
}

void DenseStore::append(const float* k, const float* v, uint64_t all, uint64_t first, uint64_t count) {
    if (m_tokens + count > m_room)
        throw std::logic_error("a dense store of " + std::to_string(m_room) + " tokens would overflow");
    if (!count)  // a store without room has no memory
        return;
    for (uint64_t head = 0; head < m_heads; head++)
        for (const float* from : {k, v})
            std::memcpy(m_floats.data() + (((from == v) * m_heads + head) * m_room + m_tokens) * m_dim, from + (head * all + first) * m_dim,
                        4 * count * m_dim);
    m_tokens += count;
}

Sequence::Sequence(const Settings& s) : sink(s, s.sink), recent(s, s.recent + block_tokens) {}

uint64_t Cache::bytes() const {
    std::set<const Page*> pages;
    uint64_t bytes = 0;
    for (const Sequence& one : sequences) {
        for (const auto& page : one.pages)
            pages.insert(page.get());
        bytes += 8 * settings.heads * settings.shape.head_dim * (one.sink.room() + one.recent.room());
    }
    return bytes + pages.size() * settings.heads * bytes_of_block(settings.shape);
}

void Cache::reorder(const int32_t* from, uint64_t count) {
    if (sequences.empty()) {
        sequences.assign(count, Sequence(settings));
        return;
    }
    std::vector<uint64_t> uses(sequences.size());
    bool changes = count != sequences.size();
    for (uint64_t b = 0; b < count; b++) {
        if (from[b] < 0 || uint64_t(from[b]) >= sequences.size())
            throw std::invalid_argument("beam_idx names sequence " + std::to_string(from[b]) + ", there are " +
                                        std::to_string(sequences.size()));
        uses[from[b]]++;
        changes |= uint64_t(from[b]) != b;
    }
    if (!changes)
        return;
    std::vector<Sequence> next;
    next.reserve(count);
    for (uint64_t b = 0; b < count; b++)
        if (--uses[from[b]])
            next.push_back(sequences[from[b]]);
        else
            next.push_back(std::move(sequences[from[b]]));
    sequences = std::move(next);
}

void Cache::append(const float* k, const float* v, uint64_t count) {
    const uint64_t dim = settings.shape.head_dim, heads = settings.heads, all = count;
    const uint64_t first = std::min(count, settings.sink - (sequences.empty() ? 0 : sequences[0].sink.tokens()));
    count -= first;
    const uint64_t before = sequences.empty() ? 0 : sequences[0].recent.tokens();
    const uint64_t waiting = before + count;  // tokens behind the pages
    const bool packs = tokens() + first + count >= settings.pack_from && waiting >= settings.recent + block_tokens;
    const uint64_t pages = packs ? (waiting - settings.recent) / block_tokens : 0;
    const uint64_t block = bytes_of_block(settings.shape);
    struct Job {
        const Sequence* from;
        const float *k, *v;  // new tokens of this sequence, behind those of the sink
        uint64_t first;      // waiting token
        std::shared_ptr<const Page> page;
    };
    std::vector<Job> jobs;
    for (uint64_t b = 0; b < sequences.size(); b++) {
        const uint64_t at = b * heads * all * dim;
        sequences[b].sink.append(k + at, v + at, all, 0, first);
        for (uint64_t p = 0; p < pages; p++)
            jobs.push_back(
                {&sequences[b], k + at + first * dim, v + at + first * dim, p * block_tokens, std::make_shared<const Page>(heads * block)});
    }
    parallel_ranges(jobs.size() * heads, [&](uint64_t begin, uint64_t end) {
        for (uint64_t i = begin; i < end; i++) {
            const Job& job = jobs[i / heads];
            const uint64_t head = i % heads;
            const float *keys[block_tokens], *values[block_tokens];
            for (uint64_t j = 0; j < block_tokens; j++) {
                const uint64_t token = job.first + j;
                keys[j] = token < before ? job.from->recent.key(head, token) : job.k + (head * all + token - before) * dim;
                values[j] = token < before ? job.from->recent.value(head, token) : job.v + (head * all + token - before) * dim;
            }
            pack_block(settings.shape, keys, values, job.page->data() + head * block);
        }
    });
    for (uint64_t b = 0; b < sequences.size(); b++) {
        Sequence& one = sequences[b];
        for (uint64_t p = 0; p < pages; p++)
            one.pages.push_back(std::move(jobs[b * pages + p].page));
        const uint64_t packed = pages * block_tokens, old = std::min(packed, before), left = waiting - packed;
        if (old)
            one.recent.drop(old);
        const uint64_t usual = settings.recent + block_tokens, room = one.recent.room();
        if (left > room)
            one.recent.make_room(std::max(left, 2 * room));
        else if (left <= usual && room > usual)
            one.recent.make_room(usual);
        const uint64_t at = b * heads * all * dim;
        one.recent.append(k + at, v + at, all, first + packed - old, count - (packed - old));
    }
}

}  // namespace ov_ext::sparse_attention
