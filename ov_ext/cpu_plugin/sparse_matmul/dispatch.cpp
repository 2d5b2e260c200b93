#include "dispatch.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "../support/cpu_features.hpp"
#include "../support/floats.hpp"
#include "../support/isa_selection.hpp"
#include "../support/parallel.hpp"
#include "../support/scratch.hpp"
#include "format.hpp"

namespace ov_ext::sparse_matmul {
namespace {

// Rows of x prepared at a time: as many as stay in a level-2 cache, within limits. As many as a kernel takes share one expansion of a
// weight.
constexpr uint64_t strip_bytes = 1 << 20, min_strip_rows = 128, max_strip_rows = 512, strip_step = 32;
constexpr uint64_t prepared_rows_step = 16;  // the memory of prepared activations holds a multiple of so many rows: those of an AMX tile
// Up to this many rows, work is split along K as well when there are too few blocks to feed the threads. Each chunk then has its own
// partial sums, 256 bytes for each block and row, which are written and read once more: with many rows, rows are split instead.
constexpr uint64_t split_k_max_rows = 16;
constexpr uint64_t units_per_thread_wanted = 4;
// A parallel region costs more than preparing fewer rows, or adding up their partial sums.
constexpr uint64_t parallel_from_rows = 8;

#if defined(__x86_64__)
// From so many rows on the AMX kernel is faster than the AVX-512 kernel, which up to 4 uses each slice the moment it is decoded. Measured on
// an Emerald Rapids Xeon: nanoseconds for 64 bytes of dense weights in the level-2 cache, at 5 and at 8 rows,
//
//     bf16 0.9 and 1.0 against 4.1 and 5.6; int8 1.4 and 1.8 against 3.1 and 4.1; int4 2.0 and 2.4 against 2.6 and 3.7
//     with a bitmap: bf16 1.7 and 2.0 against 3.8 and 5.3; int8 2.8 and 3.0 against 2.7 and 3.6; int4 the same as int8
constexpr uint64_t amx_min_rows = 5;
// Up to so many rows, dense integer weights are multiplied faster by the kernel of avx512_core_vnni, which takes activations from memory as an
// operand of the dot product: 8 rows of int4 in 0.90 of the time, 16 in 0.91, on Zen 4.
constexpr uint64_t max_rows_without_broadcasts = 32;
#endif

static_assert(2 * strip_bytes <= Scratch::keep_bytes, "a full strip, which is a little more than its rows, stays with its thread");

// What multiply_strip multiplies with: activations [rows, k_pad] that are rows first_row... of x.
struct Strip {
    Activations a;
    uint64_t first_row, rows;
};

// A block of one of several weights, which are numbered through.
struct Block {
    const BlobView& w;
    void* y;
    uint64_t index;
};

// The weight is found by walking: an operation holds two or three.
Block block_of(const std::vector<Product>& products, uint64_t number) {
    auto product = products.begin();
    for (; number >= product->w.blocks; product++)
        number -= product->w.blocks;
    return {product->w, product->y, number};
}

// Adds the bias to one row of a block's sums and stores the real columns: y and the bias end with output n, without padding. The bias comes
// last, after all chunks, as format.md says; rounding to bf16 comes after it, once.
void store(const Block& block, const float* sums, uint64_t row, bool is_bf16) {
    const BlobView& w = block.w;
    const uint64_t columns = std::min(block_n, w.n - block.index * block_n), at = row * w.n + block.index * block_n;
    float result[block_n];
    std::memcpy(result, sums, sizeof(result));
    if (w.bias) {
        float bias[block_n];
        std::memcpy(bias, w.bias + 4 * block.index * block_n, 4 * columns);
        for (uint64_t c = 0; c < columns; c++)
            result[c] += bias[c];
    }
    if (is_bf16)
        std::transform(result, result + columns, static_cast<uint16_t*>(block.y) + at, [](float y) { return float_to_bf16(y); });
    else
        std::memcpy(static_cast<float*>(block.y) + at, result, 4 * columns);
}

// y of the rows of a strip, in units that threads take in equal shares. Which units there are depends on the number of threads, the bits of
// y do not: rows are independent, and chunk sums are added in ascending order, starting from 0, either by the kernel or here.
void multiply_strip(const std::vector<Product>& products, const Kernel& kernel, const Strip& strip, bool is_bf16) {
    const uint64_t rows = strip.rows, max_rows = std::min(kernel.max_rows, rows), chunks = products[0].w.chunks;
    uint64_t blocks = 0;
    for (const Product& product : products)
        blocks += product.w.blocks;
    const uint64_t wanted = units_per_thread_wanted * uint64_t(max_threads());
    if (blocks >= wanted || chunks == 1 || rows > split_k_max_rows) {
        // Units are (rows, block): rows are split further only when there are too few blocks, as every part expands the weights anew. The
        // blocks of one part follow each other, so a thread reads the weights forward. strip_step keeps parts at rows where kernels can
        // start, and is what AMX multiplies at a time.
        const uint64_t parts = std::min((wanted + blocks - 1) / blocks, (rows + strip_step - 1) / strip_step);
        const uint64_t part = round_up((rows + parts - 1) / parts, strip_step);
        parallel_ranges((rows + part - 1) / part * blocks, [&](uint64_t begin, uint64_t end) {
            Scratch scratch(max_rows * block_n * 4);
            auto* sums = reinterpret_cast<float*>(scratch.data());
            for (uint64_t unit = begin; unit < end; unit++) {
                const Block block = block_of(products, unit % blocks);
                const uint64_t first = unit / blocks * part, last = std::min(first + part, rows);
                for (uint64_t row = first; row < last; row += max_rows) {
                    const uint64_t some = std::min(max_rows, last - row);
                    kernel.multiply(block.w, strip.a, block.index, 0, chunks, row, some, sums);
                    for (uint64_t i = 0; i < some; i++)
                        store(block, sums + i * block_n, strip.first_row + row + i, is_bf16);
                }
            }
        });
        return;
    }
    // Few blocks: (block, chunk) units, whose sums are then added in chunk order, as the kernel itself does. One number of chunks for all
    // weights: they have the same kind and the same inputs (same_activations).
    //
    // partial[block][chunk][row][block_n]. Chunk 0 becomes the total.
    Scratch partial(blocks * chunks * rows * block_n * 4);
    auto* sums = reinterpret_cast<float*>(partial.data());
    parallel_ranges(blocks * chunks, [&](uint64_t begin, uint64_t end) {
        for (uint64_t unit = begin; unit < end; unit++) {
            const Block block = block_of(products, unit / chunks);
            for (uint64_t row = 0; row < rows; row += max_rows)
                kernel.multiply(block.w, strip.a, block.index, unit % chunks, unit % chunks + 1, row, std::min(max_rows, rows - row),
                                sums + (unit * rows + row) * block_n);
        }
    });
    const auto add_up = [&](uint64_t begin, uint64_t end) {
        for (uint64_t number = begin; number < end; number++) {
            const Block block = block_of(products, number);
            for (uint64_t row = 0; row < rows; row++) {
                float* total = sums + (number * chunks * rows + row) * block_n;
                for (uint64_t chunk = 1; chunk < chunks; chunk++)
                    for (uint64_t c = 0; c < block_n; c++)
                        total[c] += total[chunk * rows * block_n + c];
                store(block, total, strip.first_row + row, is_bf16);
            }
        }
    };
    if (rows < parallel_from_rows)
        add_up(0, blocks);
    else
        parallel_ranges(blocks, add_up);
}

// clang-format off
constexpr const Kernel* kernels[] = {  // best first
#if defined(__x86_64__)
    &amx_kernel, &avx512_bf16_kernel, &avx512_kernel, &avx512_core_vnni_kernel, &avx512_core_kernel,
    &avx2_vnni_kernel, &avx2_kernel,
#endif
    &reference_kernel};
// clang-format on

}  // namespace

const Kernel& select_kernel(const BlobView& w, int64_t activation_group, uint64_t rows, std::optional<InstructionSet> wanted) {
    static const std::vector<const Kernel*> available = available_kernels(kernels);
    if (!wanted)
        wanted = requested_instruction_set();
    auto kernel = std::find_if(available.begin(), available.end(), [&](const Kernel* k) { return k->isa == wanted; });
    const bool insisted = kernel != available.end();
    if (!insisted) {  // a CPU that runs one of these runs those behind it
        kernel = available.begin();
#if defined(__x86_64__)
        if (*kernel == &amx_kernel && rows < amx_min_rows)
            kernel++;
        // Two multiply-adds instead of vdpbf16ps are twice as fast on Sapphire Rapids, half as fast on Zen 4. Integer weights pass by this
        // kernel below, which has no code for them.
        if (*kernel == &avx512_bf16_kernel && !cpu_features().amd)
            kernel++;
#endif
    }
    // Ends at the reference kernel, which has code for everything.
    while (!(*kernel)->row_bytes(w, activation_group))
        kernel++;
#if defined(__x86_64__)
    const bool integer = w.segment && activation_group;
    if (!insisted && *kernel == &avx512_kernel && w.dense && integer && rows <= max_rows_without_broadcasts)
        kernel++;
#endif
    return **kernel;
}

// Cycles for a slice of a sparse weight and one row of x where there is no expand instruction: llvm-mca, for Skylake-SP and Skylake. 0: reading
// takes longer for any weight.
namespace {
double cycles_of_sparse_slice(InstructionSet isa, Kind kind) {
    const int i = int(kind) - int(Kind::bf16);
    switch (isa) {
        case InstructionSet::avx2: return std::array{11.0, 12.0, 12.0}[i];
        case InstructionSet::avx2_vnni: return std::array{11.0, 11.0, 11.0}[i];
        case InstructionSet::avx512_core: return std::array{7.8, 9.0, 7.8}[i];
        case InstructionSet::avx512_core_vnni: return std::array{7.8, 7.0, 7.1}[i];
        default: return 0.0;
    }
}
}  // namespace

bool dense_form_is_faster(const BlobView& w, int64_t activation_group) {
    constexpr double bytes_per_cycle = 5;  // that memory gives a core which shares it with few others
    const double dense = w.kind == Kind::int4 ? slice_bytes / 2 : slice_bytes;
    const double stored = double(w.nnz) / (double(w.n) * double(w.k));
    const double cycles = cycles_of_sparse_slice(select_kernel(w, activation_group, 1).isa, w.kind);
    return cycles != 0.0 && dense < std::max(double(mask_bytes_per_slice(w.kind)) + dense * stored, cycles * bytes_per_cycle);
}

bool reads_compensation(const BlobView& w, int64_t activation_group) {
    // Few rows and many may have different kernels.
    const auto reads = [&](uint64_t rows) { return select_kernel(w, activation_group, rows).reads_compensation; };
    return w.segment && activation_group && (reads(1) || reads(max_strip_rows));
}

// Kernels scale the sum of a segment by one factor of the activations and one of the weights, so a group of activations must consist of
// whole segments. -1 does: Kpad is a multiple of the segment.
void check_activation_group(const BlobView& w, int64_t group) {
    if (group == 0 || group == -1 || ((group == 64 || group == 128) && (!w.segment || uint64_t(group) % w.segment == 0)))
        return;
    throw InvalidBlob("activation_group " + std::to_string(group) +
                      " does not fit: 0 (none), -1 (per token), 64 or 128 are possible, and it must be a multiple of the weight's group (" +
                      std::to_string(w.segment) + ")");
}

bool same_activations(const BlobView& a, const BlobView& b) {
    return a.kind == b.kind && a.k == b.k && a.k_pad == b.k_pad && a.segment == b.segment;
}

void matmul(const std::vector<Product>& products, const Kernel& kernel, const void* x, bool is_bf16, uint64_t rows,
            int64_t activation_group) {
    const BlobView& w = products[0].w;
    const uint64_t element = is_bf16 ? 2 : 4, segments = w.segment ? w.k_pad / w.segment : 0;
    Strip strip{};
    Activations& a = strip.a;
    a.integer = w.segment && activation_group != 0;
    for (const Product& product : products)
        if (a.integer && kernel.reads_compensation && !product.w.compensation)
            throw std::logic_error("compensation needed");
    a.rounded = !w.segment && activation_group != 0;
    a.row = {w.k, w.k_pad, w.segment, activation_group < 0 ? w.k_pad : uint64_t(activation_group)};
    a.stride = kernel.row_bytes(w, activation_group);
    // A strip is prepared completely before it is multiplied: all threads read all of its rows.
    const uint64_t fitting = std::clamp(strip_bytes / a.stride / strip_step * strip_step, min_strip_rows, max_strip_rows);
    const uint64_t room = round_up(std::min(rows, fitting), prepared_rows_step);
    Scratch scratch(room * (a.stride + 4 * segments) + slice_bytes);
    a.data = scratch.data();
    a.scales = reinterpret_cast<float*>(scratch.data() + room * a.stride);
    for (strip.first_row = 0; strip.first_row < rows; strip.first_row += strip.rows) {
        strip.rows = std::min(fitting, rows - strip.first_row);
        const auto prepare = [&](uint64_t begin, uint64_t end) {
            for (uint64_t row = begin; row < end; row++)
                kernel.prepare(a, w.kind, static_cast<const uint8_t*>(x) + (strip.first_row + row) * w.k * element, is_bf16, row);
        };
        if (strip.rows < parallel_from_rows)
            prepare(0, strip.rows);
        else
            parallel_ranges(strip.rows, prepare);
        multiply_strip(products, kernel, strip, is_bf16);
    }
}

}  // namespace ov_ext::sparse_matmul
