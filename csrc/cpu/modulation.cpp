// out = silu(vec) weight^T + bias, few rows: the weight is read once for all of them.
// Parallel: silu over the rows of vec, the product over rows of the weight.
// Bytes: N K elements of the weight; the S B rows of silu(vec) stay in the caches.
// Accumulation: fp32, rounded once.
// Limits: for tens of rows; beyond them a matrix product is faster.
#include "rows.h"
#include "silu.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

constexpr int SUMS = REG == 16 ? 8 : 4;  // Vecs, as registers allow
constexpr int ROWS = 4;
constexpr int AHEAD = 2048;  // bytes

// Products of N rows of the weight, `stride` apart, with R rows. A core reads several streams that
// lie far apart faster than one: 26 in place of 19 GB/s on Zen 4.
template <int N, int R, class T>
FLUXKERN_INLINE void products(const T* weight, int64_t stride, const float* active, int64_t K,
                              float (&out)[N][R]) {
    Vec sums[N][R] = {};
    each_vec<T>(K, [&](int64_t i, int, auto part) {
        Vec a[R];
        for (int r = 0; r < R; ++r) a[r] = load(active + r * padded(K) + i);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            prefetch(weight + n * stride + i + AHEAD / int(sizeof(T)));
            const Vec w = load(weight + n * stride + i, part);
            for (int r = 0; r < R; ++r) sums[n][r] = sums[n][r] + w * a[r];
        }
    });
    for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) out[n][r] = total(sums[n][r].a + sums[n][r].b);
    }
}

template <class T>
struct Product {
    Rows weight;
    const void* bias;
    const float* active;  // [rows, padded(K)]
    Rows out;
    int64_t rows, K;

    // of rows n, n + apart, n + 2 apart ...
    template <int N, int R>
    void write(int64_t n, int64_t apart, int64_t row) const {
        float found[N][R];
        products<N, R>(row_of<T>(weight, n), apart * weight.stride_b, active + row * padded(K), K,
                       found);
        for (int i = 0; i < N; ++i) {
            const float shift = bias == nullptr ? 0 : scalar<T>(bias, n + i * apart);
            for (int r = 0; r < R; ++r) {
                T* to = static_cast<T*>(out.data) + (row + r) * out.stride_b + n + i * apart;
                Out<T>{to, false}.store(0, all(found[i][r] + shift), first<T>(1));
            }
        }
    }

    template <int N, int R>
    void write_rows(int64_t n, int64_t apart, int64_t row) const {
        for (; row + R <= rows; row += R) write<N, R>(n, apart, row);
        if constexpr (R > 1) write_rows<N, R - 1>(n, apart, row);
    }

    // N streams of rows, and what is left one by one.
    template <int N>
    void write_streams(int64_t begin, int64_t end) const {
        const int64_t each = (end - begin) / N;
        for (int64_t n = begin; n < begin + each; ++n) write_rows<N, SUMS / N>(n, each, 0);
        for (int64_t n = begin + N * each; n < end; ++n) write_rows<1, ROWS>(n, 0, 0);
    }

    void write_all(int64_t begin, int64_t end) const {
        if (rows == 1) return write_streams<SUMS>(begin, end);
        if (rows == 2) return write_streams<SUMS / 2>(begin, end);
        write_streams<SUMS / ROWS>(begin, end);
    }
};

}  // namespace

void modulation(DType dtype, Tokens vec, Rows weight, const void* bias, Rows out,
                const MatrixSizes& sizes, float* scratch, const Context& context) {
    const int64_t K = padded(sizes.K), rows = sizes.S * sizes.B;
    with_dtype(dtype, [&]<class T>(T) {
        each_row(context, {sizes.S, sizes.B, sizes.K, 0}, [&](const Place& at) {
            float* active = scratch + (at.b * sizes.B + at.l) * K;
            each_vec<T>(sizes.K, [&](int64_t i, int, auto part) {
                store(active + i, silu(load(row_of<T>(vec, at) + i, part), float{}));
            });
        });
        const Product<T> product = {weight, bias, scratch, out, rows, sizes.K};
        parallel(context, sizes.N, GRAIN / (sizes.K + 1) + 1, [&](int64_t begin, int64_t end) {
            product.write_all(begin, end);
        });
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
