// Dense copies of sparse weights, for CPUs whose kernels are faster with those. A weight that was packed sparse for another CPU is expanded
// once, while its model is compiled, if memory allows.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "kernel.hpp"

namespace ov_ext::sparse_matmul {

struct DenseCopy;  // shared by all operations of the process that read the same blob in the same memory

// Of the constant blobs of one operation. Safe to use from several threads.
class DenseCopies {
  public:
    // The view of the dense copy of a valid blob, or `w`, its own view: for a dense blob, where sparse is faster, or without memory for it.
    // The owner of the blob's memory stays alive with the copy: an address alone proves nothing.
    BlobView instead_of(const BlobView& w, int64_t activation_group, const std::shared_ptr<const void>& owner, const uint8_t* blob,
                        size_t bytes);

  private:
    struct Entry {
        const uint8_t* blob;
        size_t bytes;
        std::shared_ptr<const void> owner;
        std::shared_ptr<DenseCopy> copy;  // null: it stays as it is
    };
    std::mutex m_mutex;
    std::vector<Entry> m_entries;
};

// Bytes of all copies that there are now.
uint64_t bytes_of_dense_copies();

// Sets how many bytes all copies may take from now on, and gives the limit that was.
uint64_t limit_dense_copies(uint64_t bytes);

}  // namespace ov_ext::sparse_matmul
