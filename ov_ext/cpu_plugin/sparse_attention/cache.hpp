// The tokens of a batch of sequences: dense ones and packed pages. See format.md.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernel.hpp"

namespace ov_ext::sparse_attention {

// What an operation's attributes say about its memory.
struct Settings {
    BlockShape shape;
    uint64_t heads;         // of keys and values
    uint64_t sink, recent;  // tokens
    uint64_t pack_from;     // tokens: nothing is packed while a sequence has fewer
};

// 64 packed tokens of all heads. Sequences that began alike share their pages: they never change.
class Page {
  public:
    explicit Page(uint64_t bytes);
    uint8_t* data() const { return m_memory.get(); }

  private:
    struct Free {
        void operator()(uint8_t* p) const;
    };
    std::unique_ptr<uint8_t, Free> m_memory;
};

// Keys and values of some successive tokens, f32 [heads, room, head_dim] each.
class DenseStore {
  public:
    DenseStore(const Settings& s, uint64_t room)
        : m_heads(s.heads),
          m_dim(s.shape.head_dim),
          m_room(room),
          m_floats(2 * m_heads * room * m_dim) {}
    uint64_t tokens() const { return m_tokens; }
    uint64_t room() const { return m_room; }
    void make_room(uint64_t room);  // at least for the tokens that are there
    const float* key(uint64_t head, uint64_t token = 0) const { return m_floats.data() + (head * m_room + token) * m_dim; }
    const float* value(uint64_t head, uint64_t token = 0) const { return key(m_heads + head, token); }
    void drop(uint64_t count);  // the first ones
    // k, v: [heads, all, head_dim]; takes tokens first .. first + count.
    void append(const float* k, const float* v, uint64_t all, uint64_t first, uint64_t count);

  private:
    uint64_t m_heads, m_dim, m_room, m_tokens = 0;
    std::vector<float> m_floats;
};

struct Sequence {
    explicit Sequence(const Settings& s);
    DenseStore sink;
    std::vector<std::shared_ptr<const Page>> pages;
    DenseStore recent;
    uint64_t tokens() const { return sink.tokens() + pages.size() * block_tokens + recent.tokens(); }
};

class Cache {
  public:
    explicit Cache(const Settings& settings) : settings(settings) {}

    const Settings settings;
    std::vector<Sequence> sequences;

    uint64_t tokens() const { return sequences.empty() ? 0 : sequences[0].tokens(); }
    uint64_t bytes() const;  // shared pages counted once

    // Sequence b continues what was sequence from[b]; the first call makes the sequences. Throws std::invalid_argument.
    void reorder(const int32_t* from, uint64_t count);

    // k, v: f32 [sequences, heads, count, head_dim]. Packs what leaves the recent window.
    void append(const float* k, const float* v, uint64_t count);
};

}  // namespace ov_ext::sparse_attention
