// Memory for one call that stays with the thread for the next one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace ov_ext {

// A lease, not a plain thread_local: while a thread waits inside a parallel loop, TBB may let it run another operation, which must not get
// the same memory. Aligned to 64 bytes, contents undefined.
class Scratch {
  public:
    explicit Scratch(uint64_t bytes);  // throws std::bad_alloc
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    uint8_t* data() { return m_buffer.get(); }

    static constexpr uint64_t keep_bytes = 2 << 20;  // larger ones are freed at once

  private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    using Buffer = std::unique_ptr<uint8_t, Free>;
    struct Kept;
    static Kept& kept();

    Buffer m_buffer;
    uint64_t m_bytes;
};

}  // namespace ov_ext
