// LayerNorm of one row: statistics in two passes, and its gradient. A row is given as read(i, part).
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

// ahead(i) fetches what is read after it
template <class T, class Ahead>
FLUXKERN_INLINE NormGradient gradient_of(const T* x, const T* dh, const T* scale, int64_t C,
                                         float eps, const Ahead& ahead) {
    const auto read = [&](int64_t i, const auto& part) { return load(x + i, part); };
    const float mean = mean_of<T>(C, read);
    Sum squares, dns, products;
    each_vec<T>(C, [&](int64_t i, int lane, auto part) {
        const Vec d = keep(read(i, part) - mean, part);
        const Vec dn = scaled(load(dh + i, part), load(scale + i, part));
        squares.add(lane, d * d);
        dns.add(lane, dn);
        products.add(lane, dn * d);
        ahead(i);
    });
    const float rstd = rstd_of(squares, C, eps);
    return {{mean, rstd}, dns.total() / float(C), products.total() * rstd / float(C)};
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
