#include "dense_copies.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <string>

#include "../support/isa_selection.hpp"
#include "dispatch.hpp"
#include "format.hpp"

namespace ov_ext::sparse_matmul {
namespace {

std::atomic<uint64_t> bytes_now{0};
constexpr uint64_t mebibyte = 1 << 20;

// The first number of a file, or behind a word in it; `otherwise` when there is none.
uint64_t number_in(const char* path, const std::string& word, uint64_t otherwise) {
    std::ifstream file(path);
    std::string text;
    uint64_t value = 0;
    while (!word.empty() && file >> text && text != word) {}
    return file >> value ? value : otherwise;
}

// Memory that this process may still take: of the machine, and of its control group.
uint64_t available_memory() {
    const uint64_t free = number_in("/proc/meminfo", "MemAvailable:", 0) * 1024;
    const uint64_t most = number_in("/sys/fs/cgroup/memory.max", "", ~0ull), used = number_in("/sys/fs/cgroup/memory.current", "", 0);
    return std::min(free, most > used ? most - used : 0);
}

// OV_EXT_EXPAND_MIB in bytes; `otherwise`, and a line on stderr, where it is no number of MiB.
uint64_t wanted_bytes(const char* text, uint64_t otherwise) {
    char* end = nullptr;
    errno = 0;
    const unsigned long long value = std::strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || value > ~0ull / mebibyte) {
        std::fprintf(stderr, "ov_ext: OV_EXT_EXPAND_MIB is a number of MiB, such as 512; got %.40s, which is ignored\n", text);
        return otherwise;
    }
    return value * mebibyte;
}

// Bytes that all copies may take: OV_EXT_EXPAND_MIB, else half of what is free when the first one is made.
std::atomic<uint64_t>& limit() {
    static std::atomic<uint64_t> value = [] {
        const char* wanted = std::getenv("OV_EXT_EXPAND_MIB");
        const uint64_t half = available_memory() / 2;
        return wanted && *wanted ? wanted_bytes(wanted, half) : half;
    }();
    return value;
}

// Bytes of the limit, given back at the end; none when they are not left.
class Reservation {
  public:
    explicit Reservation(uint64_t bytes) {
        const uint64_t most = limit();
        uint64_t before = bytes_now;
        do {
            if (before > most || bytes > most - before)
                return;
        } while (!bytes_now.compare_exchange_weak(before, before + bytes));
        m_bytes = bytes;
    }
    Reservation(const Reservation&) = delete;
    Reservation& operator=(const Reservation&) = delete;
    ~Reservation() { bytes_now -= m_bytes; }
    explicit operator bool() const { return m_bytes != 0; }

  private:
    uint64_t m_bytes = 0;
};

struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
};

// Once in a process; nothing where the limit is 0, which somebody chose.
void say(const char* isa, bool expanded) {
    static std::atomic<bool> said[2];
    const auto most = static_cast<unsigned long long>(limit() / mebibyte);
    if (!limit() || said[expanded].exchange(true))
        return;
    const char* text =
        expanded ? "ov_ext: sparse weights get a dense copy in memory, faster with %s: %llu MiB at most (OV_EXT_EXPAND_MIB)\n"
                 : "ov_ext: sparse weights are slower with %s, and there is no room for dense copies in %llu MiB (OV_EXT_EXPAND_MIB)\n";
    std::fprintf(stderr, text, isa, most);
}

}  // namespace

// One dense blob. Throws std::bad_alloc, when there is no memory or no room in the limit.
struct DenseCopy {
    uint64_t bytes;
    Reservation room;
    std::unique_ptr<uint8_t, Free> blob;

    explicit DenseCopy(const BlobView& sparse) : bytes(dense_bytes(sparse)), room(bytes) {
        if (room)
            blob.reset(static_cast<uint8_t*>(std::aligned_alloc(alignment, round_up(bytes, alignment))));
        if (!blob)
            throw std::bad_alloc();
        expand(sparse, blob.get());
    }
};

BlobView DenseCopies::instead_of(const BlobView& w, int64_t activation_group, const std::shared_ptr<const void>& owner, const uint8_t* blob,
                                 size_t bytes) {
    if (w.dense)
        return w;
    const auto make = [&]() -> std::unique_ptr<const DenseCopy> {
        if (!dense_form_is_faster(w, activation_group))
            return nullptr;
        std::unique_ptr<const DenseCopy> made;
        try {
            made = std::make_unique<const DenseCopy>(w);
        } catch (const std::bad_alloc&) {}
        say(name_of(select_kernel(w, activation_group, 1).isa), made != nullptr);
        return made;
    };
    const auto copy = m_copies.of(owner, blob, bytes, make, [](const DenseCopy&) { return true; });
    return copy ? parse(copy->blob.get(), copy->bytes) : w;
}

uint64_t bytes_of_dense_copies() { return bytes_now; }

uint64_t limit_dense_copies(uint64_t bytes) { return limit().exchange(bytes); }

}  // namespace ov_ext::sparse_matmul
