// What is made once of a constant blob and kept beside it, such as its dense copy.
#pragma once

#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "../support/unaligned.hpp"
#include "format.hpp"

namespace ov_ext::sparse_matmul {

// Of the constant blobs of one operation. All operations of the process that read the same memory share what was made of it, as long as one
// of them lives. Safe to use from several threads.
template <class Made>
class MadeFromBlobs {
  public:
    using Owner = std::shared_ptr<const void>;

    // What make() gave for this blob, a unique_ptr. Null is remembered by this operation alone. What another operation made is taken if
    // it fits.
    // The owner of the blob's memory stays alive with it: an address alone proves nothing.
    template <class Make, class Fits>
    std::shared_ptr<const Made> of(const Owner& owner, const uint8_t* blob, size_t bytes, const Make& make, const Fits& fits) {
        {
            std::lock_guard<std::mutex> lock(m_mutex);
            for (const Entry& entry : m_entries)
                if (entry.owner == owner && entry.blob == blob && entry.bytes == bytes)
                    return entry.made;
        }
        std::shared_ptr<const Made> made = shared(owner, blob, bytes, make, fits);
        std::lock_guard<std::mutex> lock(m_mutex);
        m_entries.push_back({blob, bytes, owner, made});
        return made;
    }

  private:
    struct Entry {
        const uint8_t* blob;
        size_t bytes;
        Owner owner;
        std::shared_ptr<const Made> made;
    };
    struct Shared {
        Owner owner;
        Header of;  // with its checksum: a Constant may share memory that its user writes anew
        std::unique_ptr<const Made> made;
    };

    // Nothing is made under the lock: a thread that waits for others may be given work that needs it. So two threads may make the same
    // thing; one stays.
    template <class Make, class Fits>
    static std::shared_ptr<const Made> shared(const Owner& owner, const uint8_t* blob, size_t bytes, const Make& make, const Fits& fits) {
        static std::mutex mutex;
        static std::map<std::pair<const uint8_t*, size_t>, std::weak_ptr<const Shared>> all;
        const auto known = [&]() {
            const auto found = all[{blob, bytes}].lock();
            return found && std::memcmp(&found->of, blob, sizeof(Header)) == 0 && fits(*found->made) ? found : nullptr;
        };
        const auto inside = [](const std::shared_ptr<const Shared>& found) {
            return std::shared_ptr<const Made>(found, found->made.get());
        };
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (const auto found = known())
                return inside(found);
        }
        std::unique_ptr<const Made> made = make();
        if (!made)
            return nullptr;
        const auto fresh = std::make_shared<const Shared>(Shared{owner, load<Header>(blob), std::move(made)});
        std::lock_guard<std::mutex> lock(mutex);
        for (auto each = all.begin(); each != all.end();)
            each = each->second.expired() ? all.erase(each) : std::next(each);
        if (const auto found = known())
            return inside(found);
        all[{blob, bytes}] = fresh;
        return inside(fresh);
    }

    std::mutex m_mutex;
    std::vector<Entry> m_entries;
};

}  // namespace ov_ext::sparse_matmul
