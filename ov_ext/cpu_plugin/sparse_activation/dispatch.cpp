#include "dispatch.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../support/blob.hpp"
#include "../support/floats.hpp"
#include "../support/isa_selection.hpp"
#include "../support/parallel.hpp"
#include "../support/scratch.hpp"

namespace ov_ext::sparse_activation {
namespace {

constexpr const Kernel* kernels[] = {// best first
#if defined(__x86_64__)
                                     &avx2_kernel,
#endif
                                     &reference_kernel};

// Rows of x at a time: a chunk of the weights of a few blocks, 256 KiB, stays in a level-2 cache for them.
constexpr uint64_t most_rows = 32, blocks_of_many_rows = 4;
// Bytes that memory reads in vain, or could have read meanwhile, for each run of rows that stay: see README.md, "Skipped inputs".
constexpr uint64_t waste = 1800;
constexpr uint64_t parallel_from_rows = 4;        // a parallel region costs more than finding what stays in fewer rows
constexpr uint64_t parallel_from_sums = 1 << 16;  // or than adding fewer

// The lists of some rows of x, in scratch memory.
class Lists {
  public:
    Lists(const View& w, uint64_t rows, bool integer)
        // An odd segment takes a place more, a vector store writes 8 at once.
        : m_room(round_up(w.k + w.segments + entries_ahead + 8, 16)),
          m_segments(round_up(w.segments + 1, 16)),
          m_integer(integer),
          m_scratch(rows * bytes()) {}
    Kept row(uint64_t row) {
        uint8_t* at = m_scratch.data() + row * bytes();
        const auto take = [&](uint64_t words) {
            uint8_t* taken = at;
            at += 4 * words;
            return taken;
        };
        Kept kept{};
        kept.starts = reinterpret_cast<uint32_t*>(take(m_segments));
        kept.factors = reinterpret_cast<float*>(take(m_segments));
        kept.sums = reinterpret_cast<int32_t*>(take(m_segments));
        kept.channels = reinterpret_cast<uint32_t*>(take(m_room));
        kept.values = reinterpret_cast<float*>(take(m_room));
        kept.codes = reinterpret_cast<uint32_t*>(take(m_room / 2));
        kept.integer = m_integer;
        return kept;
    }

  private:
    uint64_t bytes() const { return round_up(4 * (3 * m_segments + 2 * m_room + m_room / 2), 64); }
    uint64_t m_room, m_segments;
    bool m_integer;
    Scratch m_scratch;
};

// Whether one row of x had better read all inputs than `kept` of them. Where they stay at random, one run in k / (kept * skipped) begins.
// row: bytes of an input's weights that are read at once.
bool all_is_faster(const View& w, double kept, double row) {
    const double share = kept / double(w.k);
    return share + share * (1 - share) * double(waste) / row > 1;
}

// How the work of some rows is cut: units are (chunk, blocks, rows). Memory gives rows of a weight at its full rate only when some KiB of
// them are read at once, so one row of x is cut into chunks first, which then have sums of their own, and into blocks only where that is not
// enough. More rows of x are cut themselves before they would have sums for each chunk.
struct Cut {
    uint64_t chunks;              // that have sums of their own; 1: a unit takes all of them
    uint64_t blocks_each, parts;  // blocks
    uint64_t rows_each, groups;   // rows

    Cut(const View& w, uint64_t rows) {
        const uint64_t threads = uint64_t(max_threads());
        chunks = rows == 1 && threads > 1 ? w.chunks : 1;
        const uint64_t most_blocks = rows == 1 ? most_outputs / w.block_n : blocks_of_many_rows;
        blocks_each = std::min(most_blocks, divided(w.blocks, std::min(w.blocks, divided(threads, chunks))));
        parts = divided(w.blocks, blocks_each);
        rows_each = divided(rows, std::min(rows, divided(threads, parts * chunks)));
        groups = divided(rows, rows_each);
    }
    uint64_t units() const { return chunks * parts * groups; }

  private:
    static uint64_t divided(uint64_t count, uint64_t by) { return (count + by - 1) / by; }
};

// sums[chunks of the cut][rows][n_pad]
void multiply(const View& w, const Kernel& kernel, Lists& lists, uint64_t rows, const Cut& cut, float* sums) {
    parallel_ranges(cut.units(), [&](uint64_t begin, uint64_t end) {
        for (uint64_t unit = begin; unit < end; unit++) {
            const uint64_t first = unit % cut.parts * cut.blocks_each, last = std::min(first + cut.blocks_each, w.blocks);
            const uint64_t from = unit / cut.parts % cut.groups * cut.rows_each, to = std::min(from + cut.rows_each, rows);
            const uint64_t own = unit / cut.parts / cut.groups;
            const uint64_t first_chunk = cut.chunks == 1 ? 0 : own, last_chunk = cut.chunks == 1 ? w.chunks : own + 1;
            const auto sums_of = [&](uint64_t row) { return sums + (own * rows + row) * w.n_pad + first * w.block_n; };
            for (uint64_t row = from; row < to; row++)
                std::memset(sums_of(row), 0, (last - first) * w.block_n * 4);
            for (uint64_t chunk = first_chunk; chunk < last_chunk; chunk++)
                for (uint64_t row = from; row < to; row++)
                    kernel.multiply(w, lists.row(row), first, last, chunk, sums_of(row));
        }
    });
}

// Adds the sums of chunks in ascending order, then bias and offset, and stores outputs [begin, end) of a row.
void finish(const View& w, float* sums, uint64_t stride, uint64_t chunks, uint64_t begin, uint64_t end, bool is_bf16, void* y) {
    for (uint64_t chunk = 1; chunk < chunks; chunk++)
        for (uint64_t i = begin; i < end; i++)
            sums[i] += sums[chunk * stride + i];
    for (const uint8_t* added : {w.bias, w.offset})
        for (uint64_t i = begin; added && i < end; i++)
            sums[i] += load<float>(added + 4 * i);
    if (is_bf16)
        std::transform(sums + begin, sums + end, static_cast<uint16_t*>(y) + begin, [](float v) { return float_to_bf16(v); });
    else
        std::memcpy(static_cast<float*>(y) + begin, sums + begin, 4 * (end - begin));
}

}  // namespace

const Kernel& select_kernel(std::optional<InstructionSet> wanted) {
    static const std::vector<const Kernel*> available = available_kernels(kernels);
    if (!wanted)
        wanted = requested_instruction_set();
    const auto kernel = std::find_if(available.begin(), available.end(), [&](const Kernel* k) { return !wanted || k->isa <= *wanted; });
    return **kernel;  // the reference kernel at the latest
}

void check_activation_group(const View& w, int64_t group) {
    if (group == 0 || (w.kind != Kind::bf16 && uint64_t(group) == w.segment))
        return;
    throw InvalidBlob("activation_group " + std::to_string(group) + " does not fit: it must be 0 (none)" +
                      (w.kind == Kind::bf16 ? " for bf16 weights" : " or " + std::to_string(w.segment)));
}

void matmul(const View& w, const Kernel& kernel, const void* x, bool is_bf16, uint64_t rows, int64_t activation_group, void* y) {
    const uint64_t element = is_bf16 ? 2 : 4;
    for (uint64_t first = 0; first < rows; first += most_rows) {
        const uint64_t some = std::min(most_rows, rows - first);
        Lists lists(w, some, activation_group != 0);
        const auto keep = [&](uint64_t begin, uint64_t end) {
            for (uint64_t row = begin; row < end; row++)
                kernel.keep(w, static_cast<const uint8_t*>(x) + (first + row) * w.k * element, is_bf16, false, lists.row(row));
        };
        if (some < parallel_from_rows)
            keep(0, some);
        else
            parallel_ranges(some, keep);

        const Cut cut(w, some);
        // Zeros among integers leave all sums as they are; floating point would meet weights that are not finite.
        if (const Kept kept = lists.row(0);
            some == 1 && kept.integer && all_is_faster(w, kept.starts[w.segments], double(cut.blocks_each * block_bytes)))
            kernel.keep(w, static_cast<const uint8_t*>(x) + first * w.k * element, is_bf16, true, kept);

        Scratch scratch(cut.chunks * some * w.n_pad * 4);
        auto* sums = reinterpret_cast<float*>(scratch.data());
        multiply(w, kernel, lists, some, cut, sums);
        const auto finish_rows = [&](uint64_t begin, uint64_t end) {
            for (uint64_t row = 0; row < some; row++)
                finish(w, sums + row * w.n_pad, some * w.n_pad, cut.chunks, begin, end, is_bf16,
                       static_cast<uint8_t*>(y) + (first + row) * w.n * element);
        };
        if (cut.chunks * some * w.n_pad < parallel_from_sums)
            finish_rows(0, w.n);
        else
            parallel_ranges(w.n, finish_rows);
    }
}

}  // namespace ov_ext::sparse_activation
