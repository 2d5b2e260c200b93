// Dense copies of sparse weights, for CPUs whose kernels are faster with those. A weight that was packed sparse for another CPU is expanded
// once, while its model is compiled, if memory allows.
#pragma once

#include <memory>

#include "kernel.hpp"
#include "made_from_blobs.hpp"

namespace ov_ext::sparse_matmul {

struct DenseCopy;

// Of the constant blobs of one operation. Safe to use from several threads.
class DenseCopies {
  public:
    // The view of the dense copy of a valid blob, or `w`, its own view: for a dense blob, where sparse is faster, or without memory for it.
    BlobView instead_of(const BlobView& w, int64_t activation_group, const std::shared_ptr<const void>& owner, const uint8_t* blob,
                        size_t bytes);

  private:
    MadeFromBlobs<DenseCopy> m_copies;
};

// Bytes of all copies that there are now.
uint64_t bytes_of_dense_copies();

// Sets how many bytes all copies may take from now on, and gives the limit that was.
uint64_t limit_dense_copies(uint64_t bytes);

}  // namespace ov_ext::sparse_matmul
