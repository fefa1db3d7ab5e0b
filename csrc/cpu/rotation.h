// RMSNorm of one head and its rotation by RoPE; the cosines and sines of a token.
#pragma once

#include <type_traits>

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

template <class T>
FLUXKERN_INLINE Vec pairs_of(Vec v, T) {  // a: the even elements, b: the odd ones
    return parted(v);
}
FLUXKERN_INLINE Vec pairs_of(Vec v, bf16) {
    return v;
}
template <class T>
FLUXKERN_INLINE Vec vec_of(Vec pairs, T) {
    return joined(pairs);
}
FLUXKERN_INLINE Vec vec_of(Vec pairs, bf16) {
    return pairs;
}

// The elements of each pair in the place of each other.
constexpr Words neighbours() {
    Words v = {};
    for (int i = 0; i < REG; ++i) v[i] = uint32_t(i ^ 1);
    return v;
}
template <class T>
FLUXKERN_INLINE Vec swapped(Vec v, T) {
    return {__builtin_shuffle(v.a, neighbours()), __builtin_shuffle(v.b, neighbours())};
}
FLUXKERN_INLINE Vec swapped(Vec v, bf16) {
    return {v.b, v.a};
}

FLUXKERN_INLINE Reg half(const float* p) {  // of a table [padded(D) / 2]
    Reg v;
    get(p, v);
    return v;
}

// The cosines and sines of one token.
struct Rotation {
    const float *cos, *sin;

    FLUXKERN_INLINE Vec forward(Vec x, int64_t i) const {
        const Reg c = half(cos + i / 2), s = half(sin + i / 2);
        return {c * x.a - s * x.b, s * x.a + c * x.b};
    }
    FLUXKERN_INLINE Vec back(Vec x, int64_t i) const {
        const Reg c = half(cos + i / 2), s = half(sin + i / 2);
        return {c * x.a + s * x.b, c * x.b - s * x.a};
    }
};

FLUXKERN_INLINE float plain(float v) {  // without the low bits of a NaN, as rounding to bf16 asks
    return v == v ? v : __builtin_nanf("");
}

// table = data[0], data[stride] ..., then zeros up to padded(D) / 2
template <class Stride>
FLUXKERN_INLINE void gather(const float* data, Stride stride, int64_t D, float* table) {
    for (int64_t i = 0; i < D / 2; ++i) table[i] = plain(data[i * stride]);
    for (int64_t i = D / 2; i < padded(D) / 2; ++i) table[i] = 0;
}

FLUXKERN_INLINE void row_of(const Angles& angles, int64_t l, int64_t D, float* table) {
    const float* data = angles.data + l * angles.stride_l;
    if (angles.stride_d == 1) return gather(data, std::integral_constant<int64_t, 1>{}, D, table);
    if (angles.stride_d == 2) return gather(data, std::integral_constant<int64_t, 2>{}, D, table);
    gather(data, angles.stride_d, D, table);
}

// The rotation of token l, written to a table of padded(D) floats: D / 2 cosines, zeros, the sines.
FLUXKERN_INLINE Rotation rotation_of(const Angles& cosines, const Angles& sines, int64_t l,
                                     int64_t D, float* table) {
    float* sin = table + padded(D) / 2;
    row_of(cosines, l, D, table);
    row_of(sines, l, D, sin);
    return {table, sin};
}

template <class T>
T* head_of(const Heads& x, int64_t b, int64_t l, int64_t h) {
    return static_cast<T*>(x.data) + b * x.stride_b + l * x.stride_l + h * x.stride_h;
}

template <class T>
FLUXKERN_INLINE float rstd_of(const T* x, int64_t D, float eps) {
    Sum squares;
    each_vec<T>(D, [&](int64_t i, int lane, auto part) {
        const Vec v = load(x + i, part);
        squares.add(lane, v * v);
    });
    return 1 / __builtin_sqrtf(squares.total() / float(D) + eps);
}

// The same of R heads at a time.
template <int R>
FLUXKERN_INLINE void rstds_of(const Sum (&squares)[R], int64_t D, float eps, float* rstd) {
    Quarter quarters[4] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) quarters[r] = squares[r].quarter();
    const Quarter found = 1 / square_root(totals(quarters) / float(D) + eps);
    for (int r = 0; r < R; ++r) rstd[r] = found[r];
}

// sink(i, pairs, part) for the normed and turned head, in the order that vec_of takes.
template <class T, class Sink>
FLUXKERN_INLINE void turned(const T* x, const T* weight, const Rotation& rotation, int64_t D,
                            float eps, const Sink& sink) {
    const float rstd = rstd_of(x, D, eps);
    each_vec<T>(D, [&](int64_t i, int, auto part) {
        const Vec n = load(x + i, part) * rstd * load(weight + i, part);
        sink(i, rotation.forward(pairs_of(n, T{}), i), part);
    });
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
