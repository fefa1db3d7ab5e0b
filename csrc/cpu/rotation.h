// RMSNorm of one head and its rotation by RoPE; the cosines and sines of a token.
#pragma once

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

// The rotation of token l, written to a table of padded(D) floats: D / 2 cosines, zeros, the sines.
FLUXKERN_INLINE Rotation rotation_of(const Angles& cosines, const Angles& sines, int64_t l,
                                     int64_t D, float* table) {
    float *cos = table, *sin = table + padded(D) / 2;
    for (int64_t i = 0; i < D / 2; ++i) {
        cos[i] = plain(cosines.data[l * cosines.stride_l + i * cosines.stride_d]);
        sin[i] = plain(sines.data[l * sines.stride_l + i * sines.stride_d]);
    }
    for (int64_t i = D / 2; i < padded(D) / 2; ++i) cos[i] = sin[i] = 0;
    return {cos, sin};
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
