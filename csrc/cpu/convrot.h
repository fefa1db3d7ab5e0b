// The rotation of ConvRot: groups of a row by the Kronecker power of the regular Hadamard matrix of
// 4, which is its own inverse: of four elements half their sum, less the one across.
#pragma once

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

constexpr int SIXTEEN = 16 / REG;  // registers of 16 elements, whose first two powers are shuffles

template <int X>
constexpr Words across() {
    Words v = {};
    for (int i = 0; i < REG; ++i) v[i] = uint32_t(i) ^ uint32_t(X % REG);
    return v;
}

struct Sixteen {
    Reg r[SIXTEEN];

    // Element i ^ X in the place of element i.
    template <int X>
    FLUXKERN_INLINE Sixteen swapped() const {
        Sixteen v;
        for (int i = 0; i < SIXTEEN; ++i) v.r[i] = __builtin_shuffle(r[i ^ X / REG], across<X>());
        return v;
    }

    template <int STEP>
    FLUXKERN_INLINE void turn() {
        Sixteen sum = swapped<STEP>();
        for (int i = 0; i < SIXTEEN; ++i) sum.r[i] += r[i];
        const Sixteen other = sum.swapped<2 * STEP>(), last = swapped<3 * STEP>();
        for (int i = 0; i < SIXTEEN; ++i) r[i] = (sum.r[i] + other.r[i]) * 0.5f - last.r[i];
    }
};

FLUXKERN_INLINE void turn_four(float* x) {
    const float half = (x[0] + x[1] + (x[2] + x[3])) * 0.5f;
    const float turned[4] = {half - x[3], half - x[2], half - x[1], half - x[0]};
    __builtin_memcpy(x, turned, sizeof(turned));
}

FLUXKERN_INLINE void turn_far(float* x, int64_t step) {
    Reg a, b, c, d;
    get(x, a), get(x + step, b), get(x + 2 * step, c), get(x + 3 * step, d);
    const Reg half = (a + b + (c + d)) * 0.5f;
    put(x, half - d), put(x + step, half - c), put(x + 2 * step, half - b);
    put(x + 3 * step, half - a);
}

// x [K] in place; size, a power of 4, divides K.
inline void rotate(float* x, int64_t K, int64_t size) {
    if (size == 4) {
        for (int64_t k = 0; k < K; k += 4) turn_four(x + k);
        return;
    }
    if (size < 4) return;
    for (int64_t k = 0; k < K; k += 16) {
        Sixteen v;
        get(x + k, v);
        v.turn<1>();
        v.turn<4>();
        put(x + k, v);
    }
    for (int64_t step = 16; step < size; step *= 4) {
        for (int64_t begin = 0; begin < K; begin += 4 * step) {
            for (int64_t i = begin; i < begin + step; i += REG) turn_far(x + i, step);
        }
    }
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
