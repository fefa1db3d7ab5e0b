// LayerNorm of one row: statistics in two passes, and its gradient. read(i, part) gives the row.
#pragma once

#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

struct Statistics {
    float mean, rstd;
};

FLUXKERN_INLINE float rstd_of(const Sum& squares, int64_t C, float eps) {
    return 1 / __builtin_sqrtf(squares.total() / float(C) + eps);
}

template <class T, class Read>
FLUXKERN_INLINE float mean_of(int64_t C, const Read& read) {
    Sum sum;
    each_vec<T>(C, [&](int64_t i, int lane, auto part) { sum.add(lane, read(i, part)); });
    return sum.total() / float(C);
}

template <class T, class Read>
FLUXKERN_INLINE Statistics statistics_of(float mean, int64_t C, float eps, const Read& read) {
    Sum squares;
    each_vec<T>(C, [&](int64_t i, int lane, auto part) {
        const Vec d = keep(read(i, part) - mean, part);
        squares.add(lane, d * d);
    });
    return {mean, rstd_of(squares, C, eps)};
}

// (x - mean) * rstd * (1 + scale) + shift
FLUXKERN_INLINE Vec modulated(Vec x, const Statistics& s, Vec scale, Vec shift) {
    return (x - s.mean) * s.rstd * (1 + scale) + shift;
}

// dn = dh * (1 + scale), the same bits wherever it is needed: its mean may cancel it
FLUXKERN_INLINE Vec scaled(Vec dh, Vec scale) {
    return product(dh, 1 + scale);
}

// dx = rstd * (dn - mean(dn) - n * mean(dn * n)), with n the normed x
struct NormGradient {
    Statistics s;
    float mean_dn, mean_dn_n;

    FLUXKERN_INLINE Vec normed(Vec x) const {
        return (x - s.mean) * s.rstd;
    }
    FLUXKERN_INLINE Vec dx(Vec n, Vec dn) const {
        return (dn - mean_dn - n * mean_dn_n) * s.rstd;
    }
};

// Of R rows; ahead(r, i) fetches what is read after them.
template <int R, class T, class Ahead>
FLUXKERN_INLINE void gradients_of(NormGradient (&out)[R], const T* x, int64_t x_stride, const T* dh,
                                  int64_t dh_stride, const T* scale, int64_t C, float eps,
                                  const Ahead& ahead) {
    float mean[R];
    for (int r = 0; r < R; ++r) {
        const T* row = x + r * x_stride;
        mean[r] = mean_of<T>(C, [&](int64_t i, const auto& part) { return load(row + i, part); });
    }
    Sum squares[R], dns[R], products[R];
    each_vec<T>(C, [&](int64_t i, int, auto part) {
        const Vec m = load(scale + i, part);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec d = keep(load(x + r * x_stride + i, part) - mean[r], part);
            const Vec dn = scaled(load(dh + r * dh_stride + i, part), m);
            squares[r].add(0, d * d);
            dns[r].add(0, dn);
            products[r].add(0, dn * d);
            ahead(r, i);
        }
    });
    for (int r = 0; r < R; ++r) {
        const float rstd = rstd_of(squares[r], C, eps);
        const float mean_dn = dns[r].total() / float(C);
        out[r] = {{mean[r], rstd}, mean_dn, products[r].total() * rstd / float(C)};
    }
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
