// out = silu(vec) weight^T + bias, few rows: the weight is read once for all of them.
// Parallel: silu over the rows of vec, the product over rows of the weight.
// Bytes: N K elements of the weight; the S B rows of silu(vec) stay in the caches.
// Accumulation: fp32, rounded once.
// Limits: for tens of rows; beyond them a matrix product is faster.
#include "rows.h"
#include "silu.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

constexpr int WEIGHTS = REG == 16 ? 2 : 1;  // rows of the weight at once, as registers allow
constexpr int ROWS = 4;

// Products of N rows of the weight with R rows.
template <int N, int R, class T>
FLUXKERN_INLINE void products(const T* weight, int64_t stride, const float* active, int64_t K,
                              float (&out)[N][R]) {
    Vec sums[N][R] = {};
    each_vec<T>(K, [&](int64_t i, int, auto part) {
        Vec w[N];
        for (int n = 0; n < N; ++n) w[n] = load(weight + n * stride + i, part);
        for (int r = 0; r < R; ++r) {
            const Vec a = load(active + r * padded(K) + i);
            for (int n = 0; n < N; ++n) sums[n][r] = sums[n][r] + w[n] * a;
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

    template <int N, int R>
    void write(int64_t n, int64_t row) const {
        float found[N][R];
        products<N, R>(row_of<T>(weight, n), weight.stride_b, active + row * padded(K), K, found);
        for (int i = 0; i < N; ++i) {
            const float shift = bias == nullptr ? 0 : scalar<T>(bias, n + i);
            for (int r = 0; r < R; ++r) {
                T* to = static_cast<T*>(out.data) + (row + r) * out.stride_b + n + i;
                Out<T>{to, false}.store(0, all(found[i][r] + shift), first<T>(1));
            }
        }
    }

    template <int N>
    void write_rows(int64_t n) const {
        int64_t row = 0;
        for (; row + ROWS <= rows; row += ROWS) write<N, ROWS>(n, row);
        if (rows - row == 3) write<N, 3>(n, row);
        if (rows - row == 2) write<N, 2>(n, row);
        if (rows - row == 1) write<N, 1>(n, row);
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
                store(active + i, silu(load(row_of<T>(vec, at) + i, part)));
            });
        });
        const Product<T> product = {weight, bias, scratch, out, rows, sizes.K};
        parallel(context, sizes.N, GRAIN / (sizes.K + 1) + 1, [&](int64_t begin, int64_t end) {
            int64_t n = begin;
            for (; n + WEIGHTS <= end; n += WEIGHTS) product.template write_rows<WEIGHTS>(n);
            for (; n < end; ++n) product.template write_rows<1>(n);
        });
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
