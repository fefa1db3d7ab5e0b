// out = activation(x weight^T + bias), or out + x weight^T; x, weight and out of one dtype.
// Parallel: over blocks of rows of the weight, and within them over UNIT rows of x; a thread packs a
// block once for all the units that it has of it, up to CHUNK rows.
// Bytes: S B (K + N) and N K elements; x again for each block, the weight for each chunk.
// Accumulation: fp32, in chains of DEPTH products whose sums are added in order; rounded once.
// Limits: K >= 1; 1.5 MiB of scratch a thread: fp32 copies of DEPTH columns of a block, and its sums.
#include "buffer.h"
#include "gelu.h"
#include "products.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

constexpr int64_t DEPTH = 256;        // products of a chain; a multiple of LINE
constexpr int64_t COLUMNS = 192;      // most rows of the weight; with DEPTH for the second level
constexpr int64_t UNIT = 24;          // rows of x, a multiple of ROWS
constexpr int64_t CHUNK = 64 * UNIT;  // rows of x whose sums are kept
constexpr int64_t PRODUCTS = int64_t(1) << 19;  // that are worth a thread
constexpr int64_t LINE = 32;          // elements of the weight that are widened together
constexpr int64_t STRIDE = DEPTH + 16;  // of the widened rows of x

// sums [ROWS, WIDTH] of rows [ROWS, STRIDE] times panel [depth, WIDTH], or added to what they are
__attribute__((noinline)) void multiply_tile(const float* rows, const float* panel, int64_t depth,
                                             bool add, float* sums) {
    Vec v[ROWS] = {};
    multiply_add(v, rows, Fixed<STRIDE>{}, 1, panel, depth);
    if (add) {
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) v[r] = v[r] + load(sums + r * WIDTH);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) store(sums + r * WIDTH, v[r]);
}

template <class T>
struct Linear {
    Tokens x;
    Rows weight;
    const void* bias;
    bool gelu, add;
    Tokens out;
    const MatrixSizes& sizes;
    const int64_t M = sizes.S * sizes.B;

    // Memory of one thread.
    struct Scratch {
        Buffer rows{ROWS * STRIDE};            // of x [ROWS, STRIDE]
        Buffer block{COLUMNS * DEPTH};         // of the weight [COLUMNS / WIDTH, DEPTH, WIDTH]
        Buffer sums;                           // [CHUNK / ROWS, COLUMNS / WIDTH, ROWS, WIDTH]
        float bias[COLUMNS];

        explicit Scratch(int64_t M) : sums((M < CHUNK ? M + UNIT : CHUNK) * COLUMNS) {}
    };

    const T* x_of(int64_t row) const {
        return row_of<T>(x, {row / sizes.B, row % sizes.B, false});
    }

    // `depth` columns of ROWS rows of x, zeros behind the last
    void widen_rows(int64_t row, int64_t k, int64_t depth, float* to) const {
        for (int64_t r = 0; r < ROWS; ++r, to += STRIDE) {
            if (row + r >= M) {
                for (int64_t i = 0; i < depth; ++i) to[i] = 0;
                continue;
            }
            const T* from = x_of(row + r) + k;
            each_vec<T>(depth, [&](int64_t i, int, auto part) {
                store(to + i, natural(load(from + i, part), T{}));
            });
        }
    }

    // `depth` columns of WIDTH rows of the weight to [depth, WIDTH], zeros behind the last
    void pack_panel(int64_t n, int64_t k, int64_t depth, float* to) const {
        alignas(64) float lines[WIDTH][LINE];
        for (int64_t at = 0; at < depth; at += LINE, to += LINE * WIDTH) {
            const int64_t here = depth - at < LINE ? depth - at : LINE;
            for (int64_t i = 0; i < WIDTH; ++i) {
                if (n + i >= sizes.N) {
                    for (int64_t j = 0; j < LINE; ++j) lines[i][j] = 0;
                    continue;
                }
                const T* from = row_of<T>(weight, n + i) + k + at;
                each_vec<T>(here, [&](int64_t j, int, auto part) {
                    store(lines[i] + j, natural(load(from + j, part), T{}));
                });
            }
            for (int64_t i = 0; i < WIDTH; i += 4) {
                for (int64_t j = 0; j < here; j += 4) {
                    transpose_4x4(lines[i] + j, LINE, to + j * WIDTH + i, WIDTH);
                }
            }
        }
    }

    void pack_block(int64_t n, int64_t columns, int64_t k, int64_t depth, float* to) const {
        for (int64_t c = 0; c < columns; c += WIDTH, to += DEPTH * WIDTH) {
            pack_panel(n + c, k, depth, to);
        }
    }

    // out[row, n .. n + WIDTH]
    FLUXKERN_INLINE void write(Vec v, int64_t row, int64_t n, const float* bias_here) const {
        v = v + load(bias_here);
        v = ordered_as(gelu ? FLUXKERN_ISA::gelu(v, T{}) : v, T{});
        T* to = static_cast<T*>(out.data) + row / sizes.B * out.stride_b +
                row % sizes.B * out.stride_l + n;
        const int64_t left = sizes.N - n;
        if (left >= WIDTH) return finish(to, v, Whole{});
        finish(to, v, first<T>(int(left)));
    }

    template <class Extent>
    FLUXKERN_INLINE void finish(T* to, Vec v, const Extent& extent) const {
        if (add) v = v + load(to, extent);
        Out<T>{to, false}.store(0, v, extent);
    }

    // `depth` columns of a block times those of ROWS rows of x
    void multiply_rows(int64_t row, int64_t n, int64_t columns, int64_t k, int64_t depth,
                       float* sums, const Scratch& scratch) const {
        widen_rows(row, k, depth, scratch.rows.data);
        const float* panel = scratch.block.data;
        for (int64_t c = 0; c < columns; c += WIDTH, panel += DEPTH * WIDTH, sums += ROWS * WIDTH) {
            multiply_tile(scratch.rows.data, panel, depth, k > 0, sums);
            if (k + depth < sizes.K) continue;
            for (int64_t r = 0; r < ROWS && row + r < M; ++r) {
                write(load(sums + r * WIDTH), row + r, n + c, scratch.bias + c);
            }
        }
    }

    // out[first .. end, n .. n + columns]
    void multiply_block(int64_t first, int64_t end, int64_t n, int64_t columns,
                        Scratch& scratch) const {
        for (int64_t i = 0; i < columns; ++i) {
            const bool there = bias != nullptr && n + i < sizes.N;
            scratch.bias[i] = there ? scalar<T>(bias, n + i) : 0;
        }
        for (int64_t k = 0; k < sizes.K; k += DEPTH) {
            const int64_t depth = sizes.K - k < DEPTH ? sizes.K - k : DEPTH;
            pack_block(n, columns, k, depth, scratch.block.data);
            float* sums = scratch.sums.data;
            for (int64_t row = first; row < end; row += ROWS, sums += ROWS * COLUMNS) {
                multiply_rows(row, n, columns, k, depth, sums, scratch);
            }
        }
    }

    void run(const Context& context) const {
        const int64_t quarter = (sizes.N / 4 + WIDTH - 1) / WIDTH * WIDTH;
        const int64_t width = quarter < WIDTH ? WIDTH : quarter < COLUMNS ? quarter : COLUMNS;
        const int64_t blocks = (sizes.N + width - 1) / width, units = (M + UNIT - 1) / UNIT;
        const int64_t grain = PRODUCTS / (UNIT * width * sizes.K) + 1;
        parallel(context, blocks * units, grain, [&](int64_t begin, int64_t end) {
            Scratch scratch(M);
            for (int64_t i = begin; i < end;) {
                const int64_t n = i / units * width, first = i % units * UNIT;
                const int64_t left = (sizes.N - n + WIDTH - 1) / WIDTH * WIDTH;
                int64_t last = (i / units + 1) * units;  // of this block, this thread and a chunk
                if (last > end) last = end;
                if (last > i + CHUNK / UNIT) last = i + CHUNK / UNIT;
                const int64_t rows = first + (last - i) * UNIT;
                multiply_block(first, rows < M ? rows : M, n, left < width ? left : width, scratch);
                i = last;
            }
        });
    }
};

}  // namespace

void linear(DType dtype, Tokens x, Rows weight, const void* bias, bool gelu, bool add, Tokens out,
            const MatrixSizes& sizes, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        Linear<T>{x, weight, bias, gelu, add, out, sizes}.run(context);
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
