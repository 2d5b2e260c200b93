#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../support/isa_selection.hpp"
#include "../support/parallel.hpp"
#include "../support/scratch.hpp"
#include "packing.hpp"

namespace ov_ext::sparse_attention {
namespace {

// Pages of one part: enough work for a thread to be worth its share of the merge, few enough that two cores get equal shares at 2k tokens.
// A constant, so that results do not depend on the number of threads.
constexpr uint64_t part_pages = 8;

const Kernel* const kernels[] = {
#if defined(__x86_64__)
    &avx512_kernel, &avx512_core_vnni_kernel, &avx512_core_kernel, &avx2_kernel,
#endif
    &reference_kernel};

// Rows of one sequence and one head of keys: query heads of a group at each new token. Row r is token r / group, query head r % group.
struct Rows {
    const Cache& cache;
    const NewTokens& now;
    const Mask& mask;
    uint64_t group, per_head;  // rows
    uint64_t blocks;           // of max_rows rows at most
    uint64_t parts;

    const float* query(uint64_t b, uint64_t head, uint64_t row) const { return now.q + at(b, head, row); }
    uint64_t at(uint64_t b, uint64_t head, uint64_t row) const {
        return ((b * now.q_heads + head * group + row % group) * now.count + row / group) * cache.settings.shape.head_dim;
    }
    void run(const Kernel& kernel, uint64_t b, uint64_t head, uint64_t first, uint64_t rows, uint64_t part, float* out) const;
};

// The dense tokens belong to the last part, which has the fewest pages.
void Rows::run(const Kernel& kernel, uint64_t b, uint64_t head, uint64_t first, uint64_t rows, uint64_t part, float* out) const {
    const Settings& s = cache.settings;
    const Sequence& sequence = cache.sequences[b];
    const uint64_t dim = s.shape.head_dim, block = bytes_of_block(s.shape), pages = sequence.pages.size();
    const float *q[max_rows], *masks[max_rows];
    uint64_t visible[max_rows];
    const uint64_t past = sequence.tokens();
    for (uint64_t i = 0; i < rows; i++) {
        const uint64_t row = first + i, token = row / group;
        q[i] = query(b, head, row);
        visible[i] = past + (now.causal ? token + 1 : now.count);
        if (mask.data)
            masks[i] = mask.data + ((mask.batch == 1 ? 0 : b) * mask.queries + (mask.queries == 1 ? 0 : token)) * mask.columns;
    }
    const bool last = part + 1 == parts;
    const uint64_t begin = std::min(pages, part * part_pages), end = last ? pages : std::min(pages, begin + part_pages);
    std::vector<const uint8_t*> blocks;
    for (uint64_t p = begin; p < end; p++)
        blocks.push_back(sequence.pages[p]->data() + head * block);
    const DenseTokens dense[] = {
        {sequence.sink.key(head), sequence.sink.value(head), sequence.sink.tokens(), 0},
        {sequence.recent.key(head), sequence.recent.value(head), sequence.recent.tokens(), sequence.sink.tokens() + pages * block_tokens},
        {now.k + (b * s.heads + head) * now.count * dim, now.v + (b * s.heads + head) * now.count * dim, now.count, past}};
    kernel.attend({q, mask.data ? masks : nullptr, visible, rows, dim, now.scale, dense, last ? std::size(dense) : 0, blocks.data(),
                   blocks.size(), sequence.sink.tokens() + begin * block_tokens, s.shape},
                  out);
}

// parts: [parts] pointers to what a kernel wrote for one row. Merged in order.
void merge(const float* const* parts, uint64_t count, uint64_t dim, float* y) {
    float most = -std::numeric_limits<float>::infinity(), sum = 0;
    for (uint64_t i = 0; i < count; i++)
        most = std::max(most, parts[i][0]);
    std::fill_n(y, dim, 0.0f);
    for (uint64_t i = 0; i < count; i++) {
        const float* part = parts[i];
        const float factor = part[0] == most ? 1.0f : std::exp(part[0] - most);
        sum += part[1] * factor;
        for (uint64_t d = 0; d < dim; d++)
            y[d] += part[2 + d] * factor;
    }
    if (sum != 0)  // true for NaN
        for (uint64_t d = 0; d < dim; d++)
            y[d] /= sum;
}

}  // namespace

const Kernel& select_kernel(std::optional<InstructionSet> wanted) {
    static const std::vector<const Kernel*> available = available_kernels(kernels);
    if (!wanted)
        wanted = requested_instruction_set();
    // A name says how much the CPU may be asked for: the best kernel that needs no more of it.
    for (const Kernel* kernel : available)
        if (!wanted || kernel->isa <= *wanted)
            return *kernel;
    return reference_kernel;
}

void attend(const Cache& cache, const Kernel& kernel, const NewTokens& now, const Mask& mask, float* y) {
    const uint64_t heads = cache.settings.heads, dim = cache.settings.shape.head_dim, width = 2 + dim, batch = cache.sequences.size();
    if (!batch || !now.count)
        return;
    Rows rows{cache, now, mask, now.q_heads / heads, 0, 0, 1};
    rows.per_head = rows.group * now.count;
    rows.blocks = (rows.per_head + max_rows - 1) / max_rows;
    // Many rows are work enough for all threads, and partial results of them take more memory than they are worth.
    if (rows.blocks == 1)
        rows.parts = std::max<uint64_t>(1, (cache.sequences[0].pages.size() + part_pages - 1) / part_pages);
    const uint64_t units = batch * heads * rows.blocks * rows.parts;
    Scratch partial(rows.parts == 1 ? 0 : units * max_rows * width * 4);
    auto* partials = reinterpret_cast<float*>(partial.data());
    const auto some = [&](uint64_t block) { return std::min(max_rows, rows.per_head - block * max_rows); };
    // Consecutive units are parts of one head: a thread reads a head's pages forward.
    parallel_ranges(units, [&](uint64_t begin, uint64_t end) {
        float own[max_rows * (2 + max_head_dim)];
        for (uint64_t unit = begin; unit < end; unit++) {
            const uint64_t part = unit % rows.parts, block = unit / rows.parts % rows.blocks;
            const uint64_t head = unit / rows.parts / rows.blocks % heads, b = unit / rows.parts / rows.blocks / heads;
            float* out = rows.parts == 1 ? own : partials + unit * max_rows * width;
            rows.run(kernel, b, head, block * max_rows, some(block), part, out);
            for (uint64_t i = 0; rows.parts == 1 && i < some(block); i++) {
                const float* only = own + i * width;
                merge(&only, 1, dim, y + rows.at(b, head, block * max_rows + i));
            }
        }
    });
    if (rows.parts == 1)
        return;
    parallel_ranges(batch * heads, [&](uint64_t begin, uint64_t end) {
        std::vector<const float*> parts(rows.parts);
        for (uint64_t i = begin; i < end; i++)
            for (uint64_t row = 0; row < rows.per_head; row++) {
                for (uint64_t part = 0; part < rows.parts; part++)
                    parts[part] = partials + ((i * rows.parts + part) * max_rows + row) * width;
                merge(parts.data(), rows.parts, dim, y + rows.at(i / heads, i % heads, row));
            }
    });
}

}  // namespace ov_ext::sparse_attention
