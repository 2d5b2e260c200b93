// What both harnesses share: how a finding ends the process, and memory that nothing may be read or written behind.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

[[noreturn]] inline void found(const std::string& what) {
    std::fprintf(stderr, "FOUND: %s\n", what.c_str());
    std::abort();
}

inline void expect(bool ok, const std::string& what) {
    if (!ok)
        found(what);
}

// Memory that ends where an inaccessible page begins, or `behind` bytes before it; the address sanitizer then guards those.
class Guarded {
  public:
    Guarded(size_t bytes, size_t behind) : m_behind(behind) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        m_mapped = (bytes + behind + page - 1) / page * page + page;
        m_start = static_cast<uint8_t*>(mmap(nullptr, m_mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        expect(m_start != MAP_FAILED && !mprotect(m_start + m_mapped - page, page, PROT_NONE), "no guarded memory to be had");
        m_end = m_start + m_mapped - page;
        data = m_end - behind - bytes;
        ASAN_POISON_MEMORY_REGION(m_end - behind, behind);
    }
    ~Guarded() {
        ASAN_UNPOISON_MEMORY_REGION(m_end - m_behind, m_behind);
        munmap(m_start, m_mapped);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    uint8_t* data;

  private:
    size_t m_behind, m_mapped;
    uint8_t *m_start, *m_end;
};
