// silu(z) = z sigmoid(z), and its slope.
#pragma once

#include "exp.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

FLUXKERN_INLINE Vec sigmoid(Vec z) {
    constexpr float log2e = 1.4426950408889634f;
    return reciprocal(1 + exp2(at_least(-126, z * -log2e)));
}

FLUXKERN_INLINE Vec silu(Vec z) {  // below -87 it is below 1e-35
    z = at_least(-87, z);
    return z * sigmoid(z);
}

FLUXKERN_INLINE Vec silu_slope(Vec z) {
    z = at_most(87, at_least(-87, z));
    const Vec s = sigmoid(z);
    return s * (1 + z * (1 + s * -1.0f));
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
