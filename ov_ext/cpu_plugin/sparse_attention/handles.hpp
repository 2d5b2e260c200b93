// Which cache does a model's state mean? The state is a handle of 16 words (see format.md); the memory is here, with the operation.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "cache.hpp"

namespace ov_ext::sparse_attention {

constexpr uint64_t handle_words = 16;

// The caches of one operation: one for each request whose state is not empty. Safe to use from several threads.
//
// OpenVINO does not tell an operation when a request ends or is reset. It keeps a request's state at one or two addresses, though: an empty
// handle at an address where another one was means that the other cache is of no use any more. A request that is destroyed leaves its
// cache until a new one has its state there, or until the compiled model goes.
class Caches {
  public:
    // One step of one request: the cache that `handle` names, or a new one for an empty handle. `address` is where the handle lies.
    // Throws std::invalid_argument for a handle that is not of the cache's last step. Commit writes the next handle; a step that ends
    // without it has perhaps changed the cache, which is dropped.
    class Step {
      public:
        Step(Caches& caches, const int32_t* handle, const void* address, const Settings& settings);
        ~Step();
        Step(const Step&) = delete;
        Step& operator=(const Step&) = delete;
        Cache& cache() { return *m_cache; }
        void commit(int32_t* handle);

      private:
        Caches& m_caches;
        uint64_t m_id;
        std::shared_ptr<Cache> m_cache;
        bool m_committed = false;
    };

    uint64_t count();
    uint64_t bytes();

  private:
    struct Entry {
        std::shared_ptr<Cache> cache;
        int32_t steps = 0;
        bool busy = false;
    };
    void drop(uint64_t id);

    std::mutex m_mutex;
    std::unordered_map<uint64_t, Entry> m_entries;
    std::unordered_map<const void*, uint64_t> m_at;  // the last handle seen at an address
};

}  // namespace ov_ext::sparse_attention
