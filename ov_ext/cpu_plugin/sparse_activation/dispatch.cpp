#include "dispatch.hpp"

#include <algorithm>
#include <atomic>
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
                                     &avx512_core_vnni_kernel, &avx512_core_kernel, &avx2_kernel,
#endif
                                     &reference_kernel};

// Rows of x at a time: a chunk of the weights of a few blocks, 256 KiB, stays in a level-2 cache for them. Few rows read wider ones.
constexpr uint64_t most_rows = 32, blocks_of_many_rows = 4;
constexpr uint64_t few_rows = 8, blocks_of_few_rows = 16;
static_assert(most_rows * blocks_of_many_rows * 256 <= most_sums && few_rows * blocks_of_few_rows * 256 <= most_sums);
// Blocks of a unit at least: 2 KiB of each row of the weight, which suffice for memory; where all inputs are read, or many times, 512 bytes.
constexpr uint64_t least_blocks = 16, least_blocks_of_rows = 4;
constexpr uint64_t most_spans = 4;  // see "Arithmetic" in format.md
// Share of inputs that stay, from which one row of x is faster with all inputs; and up to which several rows are faster with lists of their
// own. Measured on Zen 4, with two threads.
constexpr double all_from = 0.85;
constexpr double lists_up_to(uint64_t rows) { return 0.3 + 0.6 / double(rows); }
constexpr uint64_t parallel_from_rows = 4;  // a parallel region costs more than finding what stays in fewer rows

// The lists of some rows of x, in scratch memory. Lists of all inputs share their channels.
class Lists {
  public:
    Lists(const View& w, uint64_t rows, bool integer, bool all)
        // Ends of segments are rounded up, and a vector store writes 16 at once.
        : m_room(round_up(w.k + (together - 1) * w.segments + entries_ahead + 16, 16)),
          m_segments(round_up(w.segments + 1, 16)),
          m_integer(integer),
          m_all(all),
          m_scratch((all ? 4 * m_room : 0) + rows * bytes()) {
        for (uint64_t i = 0; all && i < m_room; i++)
            reinterpret_cast<uint32_t*>(m_scratch.data())[i] = uint32_t(std::min(i, w.k - 1));
    }
    Kept row(uint64_t row) {
        uint8_t* at = m_scratch.data() + (m_all ? 4 * m_room : 0) + row * bytes();
        const auto take = [&](uint64_t bytes) {
            uint8_t* taken = at;
            at += bytes;
            return taken;
        };
        Kept kept{};
        kept.starts = reinterpret_cast<uint32_t*>(take(4 * m_segments));
        kept.factors = reinterpret_cast<float*>(take(4 * m_segments));
        kept.sums = reinterpret_cast<int32_t*>(take(4 * m_segments));
        kept.channels = reinterpret_cast<uint32_t*>(m_all ? m_scratch.data() : take(4 * m_room));
        (m_integer ? reinterpret_cast<void*&>(kept.codes) : reinterpret_cast<void*&>(kept.values)) = at;
        kept.integer = m_integer;
        return kept;
    }

  private:
    uint64_t bytes() const { return round_up(12 * m_segments + (m_all ? 0 : 4 * m_room) + (m_integer ? m_room : 4 * m_room), 64); }
    uint64_t m_room, m_segments;
    bool m_integer, m_all;
    Scratch m_scratch;
};

uint64_t divided(uint64_t count, uint64_t by) { return (count + by - 1) / by; }

// How the work of some rows is cut: units are (spans, blocks, rows). One thread adds the sums of all spans, and reading what another one wrote
// takes as long as reading ten times as much from memory, so blocks are cut first. But memory gives rows of a weight at its full rate only
// when some KiB of them are read at once, and a row of x that reads all inputs had better read from begin to end.
struct Cut {
    uint64_t blocks_each, parts;  // blocks
    uint64_t rows_each, groups;   // rows
    uint64_t spans;               // of a unit: 1, 2 or all

    Cut(const View& w, uint64_t rows, bool all) {
        const uint64_t threads = uint64_t(max_threads());
        const bool one = rows == 1, few = rows <= few_rows;
        const uint64_t least = one && all ? w.blocks : few && !all ? least_blocks : least_blocks_of_rows;
        const uint64_t most = one ? most_outputs / w.block_n : few ? blocks_of_few_rows : blocks_of_many_rows;
        parts = std::max(divided(w.blocks, most), std::clamp(w.blocks / least, uint64_t(1), threads));
        blocks_each = divided(w.blocks, parts);
        parts = divided(w.blocks, blocks_each);
        rows_each = few ? rows : divided(rows, std::min(rows, divided(threads, parts)));
        groups = divided(rows, rows_each);
        const uint64_t wanted = one && all ? threads : divided(threads, parts);
        spans = !few || wanted == 1 ? most_spans : wanted == 2 ? 2 : 1;
    }
    uint64_t units() const { return most_spans / spans * parts * groups; }
};

// The lists of some rows of x; all: they hold all inputs.
struct Some {
    std::vector<Kept> kept;
    bool all;
};

// sums[rows from ... to][stride] of a span and the blocks [first, last).
void multiply_span(const View& w, const Kernel& kernel, const Some& rows, uint64_t from, uint64_t to, uint64_t first, uint64_t last,
                   uint64_t span, uint64_t stride, float* sums) {
    const uint64_t chunks_each = divided(w.chunks, most_spans);
    std::memset(sums, 0, (to - from) * stride * 4);
    for (uint64_t chunk = span * chunks_each; chunk < std::min((span + 1) * chunks_each, w.chunks); chunk++)
        if (rows.all && rows.kept.size() > 1)
            kernel.multiply_all(w, &rows.kept[from], to - from, first, last, chunk, sums, stride);
        else
            for (uint64_t row = from; row < to; row++)
                kernel.multiply(w, rows.kept[row], first, last, chunk, sums + (row - from) * stride);
}

// Adds sums of spans, each of `size` numbers, to those in front of them, when all up to `span` are there: 1 to 0, 3 to 2, 2 to 0.
void add_span(float* sums, uint64_t span, uint64_t size) {
    for (uint64_t step = 1; (span + 1) % (2 * step) == 0; step *= 2) {
        float* const to = sums + (span + 1 - 2 * step) * size;
        for (uint64_t i = 0; i < size; i++)
            to[i] += to[step * size + i];
    }
}

// Adds bias and offset to the sums of outputs [begin, begin + count) of a row, and stores those that exist.
void store(const View& w, float* sums, uint64_t begin, uint64_t count, bool is_bf16, void* y) {
    count = std::min(count, w.n - begin);
    for (const uint8_t* added : {w.bias, w.offset})
        for (uint64_t i = 0; added && i < count; i++)
            sums[i] += load<float>(added + 4 * (begin + i));
    if (is_bf16)
        std::transform(sums, sums + count, static_cast<uint16_t*>(y) + begin, [](float v) { return float_to_bf16(v); });
    else
        std::memcpy(static_cast<float*>(y) + begin, sums, 4 * count);
}

// y of some rows. Sums of spans are added as (0 + 1) + (2 + 3), by whoever has them.
void multiply(const View& w, const Kernel& kernel, const Some& rows, bool is_bf16, uint8_t* y) {
    const uint64_t count = rows.kept.size(), row_bytes = w.n * (is_bf16 ? 2 : 4);
    const Cut cut(w, count, rows.all);
    const bool whole = cut.spans == most_spans;
    Scratch shared(whole ? 0 : most_spans / cut.spans * count * w.n_pad * 4);  // [spans / those of a unit][rows][n_pad]
    auto* partial = reinterpret_cast<float*>(shared.data());
    parallel_ranges(cut.units(), [&](uint64_t begin, uint64_t end) {
        const uint64_t stride = cut.blocks_each * w.block_n;
        Scratch scratch(cut.spans * cut.rows_each * stride * 4);
        auto* sums = reinterpret_cast<float*>(scratch.data());
        for (uint64_t unit = begin; unit < end; unit++) {
            const uint64_t first = unit % cut.parts * cut.blocks_each, last = std::min(first + cut.blocks_each, w.blocks);
            const uint64_t from = unit / cut.parts % cut.groups * cut.rows_each, to = std::min(from + cut.rows_each, count);
            const uint64_t number = unit / cut.parts / cut.groups, size = (to - from) * stride;
            for (uint64_t span = 0; span < cut.spans; span++) {
                multiply_span(w, kernel, rows, from, to, first, last, number * cut.spans + span, stride, sums + span * size);
                add_span(sums, span, size);
            }
            for (uint64_t row = from; row < to; row++) {
                float* const of_row = sums + (row - from) * stride;
                const uint64_t outputs = (last - first) * w.block_n;
                if (whole)
                    store(w, of_row, first * w.block_n, outputs, is_bf16, y + row * row_bytes);
                else
                    std::memcpy(partial + (number * count + row) * w.n_pad + first * w.block_n, of_row, outputs * 4);
            }
        }
    });
    if (whole)
        return;
    for (uint64_t number = 0; number < most_spans / cut.spans; number++)
        add_span(partial, number, count * w.n_pad);
    for (uint64_t row = 0; row < count; row++)
        store(w, partial + row * w.n_pad, 0, w.n, is_bf16, y + row * row_bytes);
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
    const bool integer = activation_group != 0;
    for (uint64_t first = 0; first < rows; first += most_rows) {
        const uint64_t count = std::min(most_rows, rows - first);
        std::optional<Lists> lists;
        Some some{std::vector<Kept>(count), false};
        // Makes the lists of these rows, and returns which share of the inputs stays.
        const auto keep = [&](bool all) {
            lists.reset();
            lists.emplace(w, count, integer, all);
            some.all = all;
            std::atomic<uint64_t> total{0};
            const auto some_rows = [&](uint64_t begin, uint64_t end) {
                for (uint64_t row = begin; row < end; row++) {
                    some.kept[row] = lists->row(row);
                    total += kernel.keep(w, static_cast<const uint8_t*>(x) + (first + row) * w.k * element, is_bf16, all, some.kept[row]);
                }
            };
            if (count < parallel_from_rows)
                some_rows(0, count);
            else
                parallel_ranges(count, some_rows);
            return double(total) / double(count * w.k);
        };
        // Zeros among integers leave all sums as they are; floating point would meet weights that are not finite.
        if (integer && count > 1 && kernel.multiply_all) {
            if (keep(true) <= lists_up_to(count))
                keep(false);
        } else if (const double share = keep(false); integer && count == 1 && share > all_from) {
            keep(true);
        }
        multiply(w, kernel, some, is_bf16, static_cast<uint8_t*>(y) + first * w.n * element);
    }
}

}  // namespace ov_ext::sparse_activation
