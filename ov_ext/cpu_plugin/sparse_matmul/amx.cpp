// AMX: tiles of 16 rows of 64 bytes. One panel of one k tile of the format is one B tile; 16 rows of activations are one A tile.
//
// The weights of a block are expanded, a chunk at a time, to B tiles on the stack, then multiplied with all rows of activations, 32 at a
// time: 2x2 tiles of sums, so that each tile that is loaded is used twice. The tile instructions are written in assembly: the intrinsics
// of GCC 12 to 16 lack the memory clobber, so that stores to the tiles' memory get lost.
#include <immintrin.h>

#include "../support/cpu_features.hpp"
#include "../support/avx512_activations.hpp"
#include "avx512_slices.hpp"
#include "kernel.hpp"

namespace ov_ext::sparse_matmul {
namespace {

constexpr uint64_t tile_rows = 16, tile_bytes = 1024, panel_n = 16, block_n = 64;

// ------------------------------------------------------------------------------------------------- tile registers

// Registers: 0 to 3 sums, 4 and 5 activations, 6 and 7 weights.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "the operand of ldtilecfg");

// Rows of activations in the two halves of a step: sums 0 and 1 belong to the upper half, 2 and 3 to the lower one.
INLINE void configure(uint64_t upper, uint64_t lower) {
    const auto u = uint8_t(upper), l = uint8_t(lower);
    const TileConfig config{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {u, u, l, l, u, l, 16, 16}};
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
INLINE void release() { __asm__ volatile("tilerelease"); }

template <int tile>
INLINE void load_tile(const void* from, uint64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void store_tile(void* to, uint64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <bool integer, int sum, int a, int b>
INLINE void multiply_tiles() {
    if (integer)
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    else
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// Adds the products of `count` k tiles to the sums: rows of activations x panels. Two halves: 32 rows x 2 panels from `b` on;
// one half: 16 rows x 4 panels. The upper half's A tiles start at `a`, the lower half's at `a_lower`.
template <bool integer, bool two_halves>
INLINE void add_products(const uint8_t* a, const uint8_t* a_lower, const uint8_t* b, uint64_t count) {
    for (; count; count--, a += tile_bytes, a_lower += tile_bytes, b += 4 * tile_bytes) {
        load_tile<4>(a, 64);
        load_tile<6>(b, 64);
        load_tile<7>(b + tile_bytes, 64);
        multiply_tiles<integer, 0, 4, 6>();
        multiply_tiles<integer, 1, 4, 7>();
        if (two_halves) {
            load_tile<5>(a_lower, 64);
            multiply_tiles<integer, 2, 5, 6>();
            multiply_tiles<integer, 3, 5, 7>();
        } else {
            load_tile<6>(b + 2 * tile_bytes, 64);
            load_tile<7>(b + 3 * tile_bytes, 64);
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

// Expands `tiles` k tiles of all four panels to B tiles, or finds them in the blob: dense bf16 and int8 weights are stored as B tiles.
template <Kind kind, bool dense>
INLINE const uint8_t* b_tiles(Stream<kind, dense>& stream, uint64_t tiles, uint8_t* scratch) {
    if (dense && kind != Kind::int4) {
        const uint8_t* stored = stream.values;
        stream.values += tiles * 4 * tile_bytes;
        return stored;
    }
    uint8_t* to = scratch;
    for (uint64_t panel = 0; panel < 4 * tiles; panel++)
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2) {
            stream.prefetch(r);
            _mm512_store_si512(to, stream.template next<0>());
            stream.prefetch(r + 1);
            _mm512_store_si512(to + 64, stream.template next<1>());
            to += 128;
        }
    return scratch;
}

// ------------------------------------------------------------------------------------------------- one step: up to 32 rows x 64 outputs

// Rows of activations that go through the tiles together.
struct Step {
    const uint8_t *upper, *lower;  // A tiles of the first k tile
    uint64_t rows;                 // of both halves
    float* out;                    // [rows][64]

    INLINE uint64_t rows_from(uint64_t first) const { return rows - first < tile_rows ? rows - first : tile_rows; }
};

INLINE void store_sums(void* to) {
    uint8_t* const at = static_cast<uint8_t*>(to);
    store_tile<0>(at, 64);
    store_tile<1>(at + tile_bytes, 64);
    store_tile<2>(at + 2 * tile_bytes, 64);
    store_tile<3>(at + 3 * tile_bytes, 64);
}

// Where sum tile i of a pass over the panels from `panel` on belongs: its first row and its panel.
template <bool two_halves>
struct Place {
    uint64_t row, panel;
    INLINE Place(uint64_t i, uint64_t first_panel)
        : row(two_halves ? i / 2 * tile_rows : 0), panel(first_panel + (two_halves ? i % 2 : i)) {}
};

template <bool two_halves>
void add_bf16(const Step& step, const uint8_t* b, uint64_t tiles) {
    alignas(64) float sums[4][tile_rows][panel_n];
    for (uint64_t panel = 0; panel < 4; panel += two_halves ? 2 : 4) {
        zero_sums();
        add_products<false, two_halves>(step.upper, step.lower, b + panel * tile_bytes, tiles);
        store_sums(sums);
        for (uint64_t i = 0; i < 4; i++) {
            const Place<two_halves> at(i, panel);
            for (uint64_t r = 0; r < step.rows_from(at.row); r++) {
                float* const out = step.out + (at.row + r) * block_n + at.panel * panel_n;
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_load_ps(sums[i][r])));
            }
        }
    }
}

// What turns the integer sums of a chunk into floats.
struct Scales {
    const float* x;              // [rows, stride], from the chunk's first segment on
    uint64_t stride;
    __m512 w[8][4];              // [segment][panel]
};

template <bool two_halves>
void add_integers(const Step& step, const uint8_t* b, uint64_t segments, uint64_t tiles_per_segment, const Scales& scales) {
    alignas(64) int32_t sums[4][tile_rows][panel_n];
    alignas(64) float chunk[2 * tile_rows][block_n];
    for (uint64_t panel = 0; panel < 4; panel += two_halves ? 2 : 4)
        for (uint64_t s = 0; s < segments; s++) {
            const uint64_t k = s * tiles_per_segment;
            zero_sums();
            add_products<true, two_halves>(step.upper + k * tile_bytes, step.lower + k * tile_bytes, b + (4 * k + panel) * tile_bytes,
                                           tiles_per_segment);
            store_sums(sums);
            for (uint64_t i = 0; i < 4; i++) {
                const Place<two_halves> at(i, panel);
                const float* x = scales.x + at.row * scales.stride + s;
                for (uint64_t r = 0; r < step.rows_from(at.row); r++) {  // in the order of format.md
                    float* const to = chunk[at.row + r] + at.panel * panel_n;
                    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x[r * scales.stride]), scales.w[s][at.panel]);
                    const __m512 before = s ? _mm512_load_ps(to) : _mm512_setzero_ps();
                    _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[i][r])), scale, before));
                }
            }
        }
    for (uint64_t r = 0; r < step.rows; r++)
        for (uint64_t p = 0; p < block_n; p += panel_n) {
            float* const out = step.out + r * block_n + p;
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_load_ps(chunk[r] + p)));
        }
}

// ------------------------------------------------------------------------------------------------- one block

template <Kind kind, bool dense>
void multiply_block(const BlobView& w, const Activations& a, uint64_t block, uint64_t first, uint64_t last, uint64_t row, uint64_t rows,
                    float* out) {
    constexpr uint64_t tiles_per_chunk = kind == Kind::bf16 ? 16 : 8;
    alignas(64) uint8_t scratch[tiles_per_chunk * 4 * tile_bytes];
    const uint64_t segments = kind == Kind::bf16 ? 0 : w.k_pad / w.segment;
    const uint64_t tiles_per_segment = kind == Kind::bf16 ? 1 : w.segment / 64;

    for (uint64_t i = 0; i < rows * block_n; i += panel_n)
        _mm512_storeu_ps(out + i, _mm512_setzero_ps());
    for (uint64_t chunk = first; chunk < last; chunk++) {
        const uint64_t tile = chunk * tiles_per_chunk, tiles = w.tiles - tile < tiles_per_chunk ? w.tiles - tile : tiles_per_chunk;
        Stream<kind, dense> stream(w, block, chunk);
        const uint8_t* b = b_tiles(stream, tiles, scratch);
        Scales scales;
        if constexpr (kind != Kind::bf16) {
            scales.stride = segments;
            for (uint64_t s = 0; s < tiles / tiles_per_segment; s++)
                for (int p = 0; p < 4; p++)
                    scales.w[s][p] = scales_of(w, block, tile / tiles_per_segment + s, p);
        }
        uint64_t configured = 0;
        for (uint64_t r = 0; r < rows; r += 2 * tile_rows) {
            Step step;
            step.rows = rows - r < 2 * tile_rows ? rows - r : 2 * tile_rows;
            step.upper = static_cast<const uint8_t*>(a.data) + (row + r) * a.stride + tile * tile_bytes;
            step.lower = step.upper + tile_rows * a.stride;
            step.out = out + r * block_n;
            const bool two_halves = step.rows > tile_rows;
            if (configured != step.rows) {
                configure(two_halves ? tile_rows : step.rows, two_halves ? step.rows - tile_rows : step.rows);
                configured = step.rows;
            }
            if constexpr (kind == Kind::bf16) {
                two_halves ? add_bf16<true>(step, b, tiles) : add_bf16<false>(step, b, tiles);
            } else {
                scales.x = a.scales + (row + r) * segments + tile / tiles_per_segment;
                two_halves ? add_integers<true>(step, b, tiles / tiles_per_segment, tiles_per_segment, scales)
                           : add_integers<false>(step, b, tiles / tiles_per_segment, tiles_per_segment, scales);
            }
        }
    }
    release();  // oneDNN's kernels run on the same threads and look at the palette before they load their own
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

// Sixteen rows form one A tile for each k tile; these tiles lie one after the other.
void prepare(const BlobView& w, const void* x, bool x_is_bf16, const Activations& a, uint64_t row) {
    uint8_t* const to = static_cast<uint8_t*>(a.data) + row / tile_rows * tile_rows * a.stride + row % tile_rows * 64;
    if (a.integer)
        quantize(w, x, x_is_bf16, a.group < 0 ? w.k_pad : uint64_t(a.group), 0, to, tile_bytes, a.scales + row * (w.k_pad / w.segment));
    else
        round_row_to_bf16(w, x, x_is_bf16, to, tile_bytes);
}

bool supported(const CpuFeatures& f) {
    return f.avx512 && f.avx512_vbmi2 && f.avx512_vnni && f.gfni && f.amx_tile && f.amx_bf16 && f.amx_int8 && amx_permission();
}

// Activations in floating point need multiplications that tiles do not have.
uint64_t row_bytes(const BlobView& w, int64_t activation_group) { return activation_group == 0 ? 0 : w.segment ? w.k_pad : 2 * w.k_pad; }

}  // namespace

const Kernel amx_kernel = {"amx", 512, supported, row_bytes, prepare, multiply};

}  // namespace ov_ext::sparse_matmul
