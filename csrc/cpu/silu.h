// silu(z) = z sigmoid(z), and its slope.
#pragma once

#include "exp.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

// 1 + exp(-z)
template <class T>
FLUXKERN_INLINE Vec one_and_exp(Vec z, T) {
    constexpr float log2e = 1.4426950408889634f;
    return 1 + exp2(at_least(-126, z * -log2e), T{});
}

template <class T>
FLUXKERN_INLINE Vec silu(Vec z, T) {  // as exact as T asks; below -87 it is below 1e-35
    z = at_least(-87, z);
    return quotient(z, one_and_exp(z, T{}), T{});
}

template <class T>
FLUXKERN_INLINE Vec silu_slope(Vec z, T) {
    z = at_most(87, at_least(-87, z));
    const Vec s = quotient(all(1), one_and_exp(z, T{}), T{});
    return s * (1 + z * (1 + s * -1.0f));
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
