// 2^x and a / b of a Vec, as sigmoids want them.
#pragma once

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

// The larger, the smaller; a NaN in the last argument stays one.
FLUXKERN_INLINE Reg larger(Reg least, Reg v) {
#if defined(__AVX512F__)
    return bit_cast<Reg>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(least), bit_cast<__m512>(v)));
#elif defined(__AVX2__)
    return bit_cast<Reg>(_mm256_max_ps(bit_cast<__m256>(least), bit_cast<__m256>(v)));
#else
    return v < least ? least : v;
#endif
}
FLUXKERN_INLINE Reg smaller(Reg most, Reg v) {
#if defined(__AVX512F__)
    return bit_cast<Reg>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(most), bit_cast<__m512>(v)));
#elif defined(__AVX2__)
    return bit_cast<Reg>(_mm256_min_ps(bit_cast<__m256>(most), bit_cast<__m256>(v)));
#else
    return v > most ? most : v;
#endif
}
FLUXKERN_INLINE Vec larger(Vec least, Vec v) {
    return {larger(least.a, v.a), larger(least.b, v.b)};
}
FLUXKERN_INLINE Reg at_least(float low, Reg v) {
    return larger(low - Reg{}, v);
}
FLUXKERN_INLINE Reg at_most(float high, Reg v) {
    return smaller(high - Reg{}, v);
}
FLUXKERN_INLINE Vec at_least(float low, Vec v) {
    return {at_least(low, v.a), at_least(low, v.b)};
}
FLUXKERN_INLINE Vec at_most(float high, Vec v) {
    return {at_most(high, v.a), at_most(high, v.b)};
}

// Minimax polynomials of 2^f for |f| <= 0.5: within 2 units of the last place of fp32, and within
// 2^-13.7, a 26th of what rounding to bf16 takes.
template <class T>
FLUXKERN_INLINE Reg exp2_of_fraction(Reg f, T) {
    Reg p = f * 0x1.5bb99ep-10f + 0x1.3ceafap-7f;
    p = p * f + 0x1.c6b756p-5f;
    p = p * f + 0x1.ebf9bap-3f;
    p = p * f + 0x1.62e42ap-1f;
    return p * f + 1.0f;
}
FLUXKERN_INLINE Reg exp2_of_fraction(Reg f, bf16) {
    Reg p = f * 0x1.c3f76p-5f + 0x1.f0de1ap-3f;
    p = p * f + 0x1.62f31ap-1f;
    return p * f + 0x1.fff692p-1f;
}

// For -126 <= x <= 127, as exact as T asks.
template <class T>
FLUXKERN_INLINE Reg exp2(Reg x, T) {
    constexpr float to_integer = 0x1.8p23f;
    const Reg shifted = x + to_integer, f = x - (shifted - to_integer);
    const Words exponent = bit_cast<Words>(shifted) << 23;
    return bit_cast<Reg>(bit_cast<Words>(exp2_of_fraction(f, T{})) + exponent);
}
template <class T = float>
FLUXKERN_INLINE Vec exp2(Vec x, T = {}) {
    return {exp2(x.a, T{}), exp2(x.b, T{})};
}

// a / b, as exact as T asks. A division has a unit of its own; Newton's method takes that of
// the products.
template <class T>
FLUXKERN_INLINE Vec quotient(Vec a, Vec b, T) {
    return {a.a / b.a, a.b / b.b};
}
#ifdef __AVX512F__
FLUXKERN_INLINE Vec quotient(Vec a, Vec b, bf16) {
    const auto estimate = [](Reg x) {  // within 2^-14
        return bit_cast<Reg>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
    };
    return {a.a * estimate(b.a), a.b * estimate(b.b)};
}
#endif

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
