// AMX: tiles of 16 tile rows of 64 bytes. One panel of one k tile of the format is one B tile (a slice is a tile row); 16 rows of
// activations are one A tile.
//
// The weights of a block are expanded, a chunk at a time, to B tiles on the stack, then multiplied with all rows of activations, 32 at a
// time: 2x2 tiles of sums, so that each tile that is loaded is used twice.
//
// The lanes of the tiles (see multiply_tiles in amx_tiles.hpp) are the reason why a slice of the format is 16 outputs by 4 bytes of inputs:
// an expanded slice is a tile row of B without any further shuffle.
#include <immintrin.h>

#include "../support/amx_tiles.hpp"
#include "../support/avx512_activations.hpp"
#include "avx512_slices.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

static_assert(panel_bytes == tile_bytes && slice_bytes == tile_row_bytes, "a panel of the format is a tile");

// ------------------------------------------------------------------------------------------------- tile registers

// Registers: 0 to 3 sums, 4 and 5 activations, 6 and 7 weights. upper, lower: rows of activations in the two halves of a step; sums 0 and 1
// belong to the upper half, 2 and 3 to the lower one. With one half only, all four sums belong to it, so upper and lower are equal.
//
// Tiles of activations and sums get as many tile rows as there are rows of activations. Behind the last row the prepared memory holds
// whatever was there before: it is never loaded.
INLINE TileConfig tiles_for(uint64_t upper, uint64_t lower) {
    constexpr uint16_t all = tile_row_bytes;
    const auto u = uint8_t(upper), l = uint8_t(lower);
    return {1, 0, {}, {all, all, all, all, all, all, all, all}, {u, u, l, l, u, l, tile_rows, tile_rows}};
}

// Adds the products of `count` k tiles to the sums: rows of activations x panels. Two halves: 32 rows x 2 panels from `b` on;
// one half: 16 rows x 4 panels. The upper half's A tiles start at `a`, the lower half's at `a_lower`. A k tile of the blocked memory is one
// A tile, and one B tile for each panel, so both pointers only step on.
//
// Two halves: 4 loads for 4 products. One half: 5, as the single A tile meets each B tile just once. In both cases the four products have
// four different sums, so none waits for the one before it.
//
//     for each k tile, two halves:                     one half:
//         sum0 += upper * panel 0                          sum0 += upper * panel 0
//         sum1 += upper * panel 1                          sum1 += upper * panel 1
//         sum2 += lower * panel 0                          sum2 += upper * panel 2
//         sum3 += lower * panel 1                          sum3 += upper * panel 3
template <bool integer, bool two_halves>
INLINE void add_products(const uint8_t* a, const uint8_t* a_lower, const uint8_t* b, uint64_t count) {
    for (; count; count--, a += tile_bytes, a_lower += tile_bytes, b += k_tile_bytes) {
        load_tile<4>(a, tile_row_bytes);
        load_tile<6>(b, tile_row_bytes);
        load_tile<7>(b + tile_bytes, tile_row_bytes);
        multiply_tiles<integer, 0, 4, 6>();
        multiply_tiles<integer, 1, 4, 7>();
        if (two_halves) {
            load_tile<5>(a_lower, tile_row_bytes);
            multiply_tiles<integer, 2, 5, 6>();
            multiply_tiles<integer, 3, 5, 7>();
        } else {
            load_tile<6>(b + 2 * tile_bytes, tile_row_bytes);
            load_tile<7>(b + 3 * tile_bytes, tile_row_bytes);
            multiply_tiles<integer, 2, 4, 6>();
            multiply_tiles<integer, 3, 4, 7>();
        }
    }
}

INLINE void zero_sums() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
}

// ------------------------------------------------------------------------------------------------- weights

// Dense bf16 and int8 weights are stored as B tiles. The blob may lie at any address, which tile loads allow. Dense int4 has to be taken out
// of its nibbles, like everything with a mask.
template <Kind kind, bool dense>
constexpr bool stored_as_tiles = dense && kind != Kind::int4;

// Expands `tiles` k tiles of all four panels to B tiles.
template <Kind kind, bool dense>
INLINE void expand_tiles(Stream<kind, dense>& stream, uint64_t tiles, uint8_t* to) {
    for (uint64_t panel = 0; panel < block_panels * tiles; panel++)
#pragma GCC unroll 8
        for (int s = 0; s < panel_slices; s += 2) {
            stream.prefetch(s);
            _mm512_store_si512(to, stream.template next<0>());
            stream.prefetch(s + 1);
            _mm512_store_si512(to + slice_bytes, stream.template next<1>());
            to += 2 * slice_bytes;
        }
}

// The next `tiles` k tiles as B tiles: in the blob, or expanded.
template <Kind kind, bool dense>
INLINE const uint8_t* b_tiles(Stream<kind, dense>& stream, uint64_t tiles, uint8_t* scratch) {
    if constexpr (stored_as_tiles<kind, dense>) {
        const uint8_t* stored = stream.values;
        stream.values += tiles * k_tile_bytes;
        return stored;
    }
    expand_tiles(stream, tiles, scratch);
    return scratch;
}

// ------------------------------------------------------------------------------------------------- one step: up to 32 rows x one block

// Rows of activations that go through the tiles together.
struct Step {
    const uint8_t *upper, *lower;  // A tiles of the first k tile
    uint64_t rows;                 // of both halves
    float* out;                    // [rows][block_n]

    INLINE uint64_t rows_from(uint64_t first) const { return rows - first < tile_rows ? rows - first : tile_rows; }
};

INLINE void store_sums(void* to) {
    uint8_t* const at = static_cast<uint8_t*>(to);
    store_tile<0>(at, tile_row_bytes);
    store_tile<1>(at + tile_bytes, tile_row_bytes);
    store_tile<2>(at + 2 * tile_bytes, tile_row_bytes);
    store_tile<3>(at + 3 * tile_bytes, tile_row_bytes);
}

// Where sum tile i of a pass over the panels from `panel` on belongs: its first row and its panel.
template <bool two_halves>
struct Place {
    uint64_t row, panel;
    INLINE Place(uint64_t i, uint64_t first_panel)
        : row(two_halves ? i / 2 * tile_rows : 0),
          panel(first_panel + (two_halves ? i % 2 : i)) {}
};

// The sums of a chunk of bf16 weights join out.
template <bool two_halves>
INLINE void add_chunk(const Step& step, uint64_t panel) {
    alignas(64) float sums[4][tile_rows][panel_n];
    store_sums(sums);
    for (uint64_t i = 0; i < 4; i++) {
        const Place<two_halves> at(i, panel);
        for (uint64_t r = 0; r < step.rows_from(at.row); r++) {
            float* const out = step.out + (at.row + r) * block_n + at.panel * panel_n;
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_load_ps(sums[i][r])));
        }
    }
}

// A chunk of bf16 weights: its sums stay in the tiles through all k tiles, 2 or 4 panels at a time, since there are four sum registers.
//
// They start at 0 and join out afterwards, rather than start with out. A chunk's sum must not depend on whether the chunks before it were
// added by the same call: with few blocks, dispatch gives each chunk to another thread.
template <bool two_halves>
void add_bf16(const Step& step, const uint8_t* b, uint64_t tiles) {
    for (uint64_t panel = 0; panel < block_panels; panel += two_halves ? 2 : 4) {
        zero_sums();
        add_products<false, two_halves>(step.upper, step.lower, b + panel * tile_bytes, tiles);
        add_chunk<two_halves>(step, panel);
    }
}

// What turns the integer sums of a chunk into floats.
struct Scales {
    const float* x;  // [rows, stride], from the chunk's first segment on
    uint64_t stride;
    __m512 w[8][block_panels];  // [segment][panel]: a chunk has up to 8 segments
};

// Of a chunk: [rows][outputs].
using Total = float[2 * tile_rows][block_n];

// Scales the sums of segment s of a chunk of integer weights and adds them to its total. They are exact: at most 128 products of at most
// 128 * 127, below 2^21, which converts to f32 without rounding. s8 by s8 needs no compensation.
//
// Scaling is the order of format.md, and must stay that: the product of the two scales is rounded, then one fused multiply-add for each
// segment, ascending.
template <bool two_halves>
INLINE void add_segment(const Step& step, uint64_t panel, uint64_t s, const Scales& scales, Total& chunk) {
    alignas(64) int32_t sums[4][tile_rows][panel_n];
    store_sums(sums);
    for (uint64_t i = 0; i < 4; i++) {
        const Place<two_halves> at(i, panel);
        const float* x = scales.x + at.row * scales.stride + s;
        for (uint64_t r = 0; r < step.rows_from(at.row); r++) {
            float* const to = chunk[at.row + r] + at.panel * panel_n;
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x[r * scales.stride]), scales.w[s][at.panel]);
            const __m512 before = s ? _mm512_load_ps(to) : _mm512_setzero_ps();
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[i][r])), scale, before));
        }
    }
}

// The chunk's total has its own memory for the same reason as in add_bf16.
INLINE void add_total(const Step& step, const Total& chunk) {
    for (uint64_t r = 0; r < step.rows; r++)
        for (uint64_t p = 0; p < block_n; p += panel_n) {
            float* const out = step.out + r * block_n + p;
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_load_ps(chunk[r] + p)));
        }
}

// A chunk of integer weights. The sums leave the tiles after every segment, because the next one has other scales.
template <bool two_halves>
void add_integers(const Step& step, const uint8_t* b, uint64_t segments, uint64_t tiles_per_segment, const Scales& scales) {
    alignas(64) Total chunk;
    for (uint64_t panel = 0; panel < block_panels; panel += two_halves ? 2 : 4)
        for (uint64_t s = 0; s < segments; s++) {
            const uint64_t k = s * tiles_per_segment;
            zero_sums();
            add_products<true, two_halves>(step.upper + k * tile_bytes, step.lower + k * tile_bytes,
                                           b + (block_panels * k + panel) * tile_bytes, tiles_per_segment);
            add_segment<two_halves>(step, panel, s, scales, chunk);
        }
    add_total(step, chunk);
}

// A chunk of weights that must be expanded, for one half: the expansion decides the speed. It goes one piece ahead of the products, a segment
// of integers or the same bytes of bf16, and so stays in a level-1 cache, of which a chunk would take two thirds or more. All four panels
// have their sums in registers.
template <Kind kind, bool dense>
void add_few(const Step& step, Stream<kind, dense>& stream, uint64_t tiles, uint64_t tiles_per_segment, const Scales& scales) {
    constexpr bool integer = kind != Kind::bf16;
    constexpr uint64_t most = 2;  // k tiles of a segment
    alignas(64) uint8_t b[2][most * k_tile_bytes];
    alignas(64) Total chunk;
    const uint64_t step_tiles = integer ? tiles_per_segment : most;
    const auto from = [&](uint64_t tile) INLINED { return tiles - tile < step_tiles ? tiles - tile : step_tiles; };
    expand_tiles(stream, from(0), b[0]);
    if (!integer)
        zero_sums();
    for (uint64_t tile = 0, i = 0, count; tile < tiles; tile += count, i++) {
        count = from(tile);
        if (tile + count < tiles)
            expand_tiles(stream, from(tile + count), b[(i + 1) % 2]);
        const uint8_t* x = step.upper + tile * tile_bytes;
        if (integer)
            zero_sums();
        add_products<integer, false>(x, x, b[i % 2], count);
        if constexpr (integer)
            add_segment<false>(step, 0, i, scales, chunk);
    }
    if constexpr (integer)
        add_total(step, chunk);
    else
        add_chunk<false>(step, 0);
}

// ------------------------------------------------------------------------------------------------- one block

// One block of outputs: see Kernel::multiply. The loop over rows is inside that over chunks, so that all rows share one expansion, which
// stays on the stack: 64 KiB for bf16, 32 KiB for integers. The scales of the weights are converted once for all rows, too.
template <Kind kind, bool dense>
void multiply_block(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                    float* out) {
    constexpr uint64_t tile_inputs = panel_slices * (kind == Kind::bf16 ? 2 : 4), tiles_per_chunk = chunk_k / tile_inputs;
    alignas(64) uint8_t scratch[tiles_per_chunk * k_tile_bytes];
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const uint64_t tiles_per_segment = kind == Kind::bf16 ? 1 : w.segment / tile_inputs;
    TileRegisters registers;

    for (uint64_t i = 0; i < rows * block_n; i += panel_n)
        _mm512_storeu_ps(out + i, _mm512_setzero_ps());
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t tile = chunk * tiles_per_chunk, tiles = w.tiles - tile < tiles_per_chunk ? w.tiles - tile : tiles_per_chunk;
        Stream<kind, dense> stream(w, block, chunk);
        const bool few = rows <= tile_rows && !stored_as_tiles<kind, dense>;
        const uint8_t* b = few ? nullptr : b_tiles(stream, tiles, scratch);
        Scales scales;
        if constexpr (kind != Kind::bf16) {
            scales.stride = segments;
            for (uint64_t s = 0; s < tiles / tiles_per_segment; s++)
                for (int p = 0; p < block_panels; p++)
                    scales.w[s][p] = scales_of(w, block, tile / tiles_per_segment + s, p);
        }
        uint64_t configured = 0;
        for (uint64_t r = 0; r < rows; r += 2 * tile_rows) {
            Step step;
            step.rows = rows - r < 2 * tile_rows ? rows - r : 2 * tile_rows;
            step.upper = static_cast<const uint8_t*>(a.data) + (row + r) * a.stride + tile * tile_bytes;
            step.lower = step.upper + tile_rows * a.stride;  // not read unless there are two halves
            step.out = out + r * block_n;
            const bool two_halves = step.rows > tile_rows;
            // Full steps share a configuration. The last step may be ragged: a new one, which zeroes the tiles, but nothing lives in them
            // between two steps.
            if (configured != step.rows) {
                registers.configure(tiles_for(two_halves ? tile_rows : step.rows, two_halves ? step.rows - tile_rows : step.rows));
                configured = step.rows;
            }
            if constexpr (kind != Kind::bf16)
                scales.x = a.scales + (row + r) * segments + tile / tiles_per_segment;
            if (few) {
                add_few(step, stream, tiles, tiles_per_segment, scales);
            } else if constexpr (kind == Kind::bf16) {
                two_halves ? add_bf16<true>(step, b, tiles) : add_bf16<false>(step, b, tiles);
            } else {
                two_halves ? add_integers<true>(step, b, tiles / tiles_per_segment, tiles_per_segment, scales)
                           : add_integers<false>(step, b, tiles / tiles_per_segment, tiles_per_segment, scales);
            }
        }
    }
}

template <Kind kind>
auto choose(bool dense) {
    return dense ? multiply_block<kind, true> : multiply_block<kind, false>;
}

void multiply(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
              float* out) {
    const auto function = w.kind == Kind::bf16   ? choose<Kind::bf16>(w.dense)
                          : w.kind == Kind::int8 ? choose<Kind::int8>(w.dense)
                                                 : choose<Kind::int4>(w.dense);
    function(w, a, block, first, last, row, rows, out);
}

// Sixteen rows form one A tile for each k tile; these tiles lie one after the other. tdpbssd multiplies s8 by s8: no offset.
//
//     rows 0..15     k tile 0: row 0 (64 bytes), row 1, ... row 15     k tile 1: row 0, ...
//     rows 16..31    the same, 16 * stride bytes further on
//
// So a tile is loaded from 1024 bytes that lie together instead of 16 places a whole row apart.
void prepare(const Activations& a, Kind, const void* x, bool x_is_bf16, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row / tile_rows * tile_rows * a.stride + row % tile_rows * tile_row_bytes;
    if (a.integer)
        quantize(a.row, x, x_is_bf16, 0, to, tile_bytes, a.scales + row * (a.row.k_pad / a.row.segment));
    else
        copy_as_bf16(a.row, x, x_is_bf16, to, tile_bytes);
}

// Activations in floating point need multiplications that tiles do not have.
uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return activation_group == 0 ? 0 : w.segment ? w.k_pad : 2 * w.k_pad; }

}  // namespace

const Kernel amx_kernel = {InstructionSet::amx, 512, false, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
