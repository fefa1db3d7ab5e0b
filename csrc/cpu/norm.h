// LayerNorm of one row: statistics in two passes, and its gradient.
#pragma once

#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

struct Statistics {
    float mean, rstd;
};

template <class T>
FLUXKERN_INLINE Statistics statistics_of(const T* x, float sum, int64_t C, float eps) {
    const float mean = sum / float(C);
    Sum squares;
    each_vec(C, [&](int64_t i, int lane, auto part) {
        const Vec d = keep(load(x + i, part) - mean, part);
        squares.add(lane, d * d);
    });
    return {mean, 1 / __builtin_sqrtf(squares.total() / float(C) + eps)};
}

template <class T>
FLUXKERN_INLINE float sum_of(const T* x, int64_t C) {
    Sum sum;
    each_vec(C, [&](int64_t i, int lane, auto part) { sum.add(lane, load(x + i, part)); });
    return sum.total();
}

// h = (x - mean) * rstd * (1 + scale) + shift
template <class X, class T>
FLUXKERN_INLINE void write_norm_modulate(const X* x, const T* scale, const T* shift, Out<T> h,
                                         int64_t C, Statistics s) {
    each_vec(C, [&](int64_t i, int, auto part) {
        const Vec n = (load(x + i, part) - s.mean) * s.rstd;
        h.store(i, n * (1 + load(scale + i, part)) + load(shift + i, part), part);
    });
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
        return s.rstd * (dn - mean_dn - n * mean_dn_n);
    }
};

template <class T>
FLUXKERN_INLINE NormGradient gradient_of(const T* x, const T* dh, const T* scale, int64_t C,
                                         float eps) {
    const float mean = sum_of(x, C) / float(C);
    Sum squares, dns, products;
    each_vec(C, [&](int64_t i, int lane, auto part) {
        const Vec d = keep(load(x + i, part) - mean, part);
        const Vec dn = scaled(load(dh + i, part), load(scale + i, part));
        squares.add(lane, d * d);
        dns.add(lane, dn);
        products.add(lane, dn * d);
    });
    const float rstd = 1 / __builtin_sqrtf(squares.total() / float(C) + eps);
    return {{mean, rstd}, dns.total() / float(C), products.total() * rstd / float(C)};
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
