// 2^x and 1 / x of a Vec, as sigmoids want them.
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

// For -126 <= x <= 127; a minimax polynomial of the fraction, within 2 units of the last place.
FLUXKERN_INLINE Reg exp2(Reg x) {
    constexpr float to_integer = 0x1.8p23f;
    const Reg shifted = x + to_integer, f = x - (shifted - to_integer);
    Reg p = f * 0x1.5bb99ep-10f + 0x1.3ceafap-7f;
    p = p * f + 0x1.c6b756p-5f;
    p = p * f + 0x1.ebf9bap-3f;
    p = p * f + 0x1.62e42ap-1f;
    p = p * f + 1.0f;
    return bit_cast<Reg>(bit_cast<Words>(p) + (bit_cast<Words>(shifted) << 23));
}
FLUXKERN_INLINE Vec exp2(Vec x) {
    return {exp2(x.a), exp2(x.b)};
}

// 1 / x by an estimate and one step of Newton's method, within 2 units of the last place
FLUXKERN_INLINE Reg reciprocal(Reg x) {
#if defined(__AVX512F__)
    const Reg estimate = bit_cast<Reg>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(x)));
#elif defined(__AVX2__)
    const Reg estimate = bit_cast<Reg>(_mm256_rcp_ps(bit_cast<__m256>(x)));
#else
    return 1.0f / x;
#endif
#if defined(__AVX2__)
    return estimate + estimate * (1.0f - x * estimate);
#endif
}

FLUXKERN_INLINE Vec reciprocal(Vec x) {
    return {reciprocal(x.a), reciprocal(x.b)};
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
