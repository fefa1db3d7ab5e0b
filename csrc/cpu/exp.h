// exp and what is made of it, for a Vec.
#pragma once

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

FLUXKERN_INLINE Reg clamp(Reg v, float low, float high) {  // a NaN stays one
    const Reg least = low - Reg{}, most = high - Reg{};
    v = v < least ? least : v;
    return v > most ? most : v;
}

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2; within 2 units of the last place, for -87 <= x <= 88
FLUXKERN_INLINE Reg exp(Reg x) {
    constexpr float to_integer = 0x1.8p23f, log2e = 0x1.715476p0f;
    constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
    const Reg shifted = x * log2e + to_integer, n = shifted - to_integer;
    const Reg r = (x - n * ln2_high) - n * ln2_low;
    Reg p = r * (1 / 5040.0f) + 1 / 720.0f;
    p = p * r + 1 / 120.0f;
    p = p * r + 1 / 24.0f;
    p = p * r + 1 / 6.0f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    return bit_cast<Reg>(bit_cast<Words>(p) + (bit_cast<Words>(shifted) << 23));
}

FLUXKERN_INLINE Vec exp(Vec x) {
    return {exp(clamp(x.a, -87, 88)), exp(clamp(x.b, -87, 88))};
}

FLUXKERN_INLINE Vec operator/(Vec x, Vec y) {
    return {x.a / y.a, x.b / y.b};
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
