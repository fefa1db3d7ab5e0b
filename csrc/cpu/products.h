// Products of matrices in registers, which attention and the linear layers are made of.
#pragma once

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // of an accumulator [ROWS, WIDTH], which the registers hold
#else
constexpr int ROWS = 6;
#endif

template <int64_t N>
struct Fixed {
    constexpr operator int64_t() const {
        return N;
    }
};

// sums[r] += rows[r * row_stride + i * step] * vectors[i], of n vectors
template <class Stride>
FLUXKERN_INLINE void multiply_add(Vec (&sums)[ROWS], const float* rows, Stride row_stride,
                                  int64_t step, const float* vectors, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const Vec v = load(vectors + i * WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + v * rows[r * row_stride + i * step];
    }
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Places __attribute__((vector_size(16)));

FLUXKERN_INLINE Four four(const float* p) {
    Four v;
    get(p, v);
    return v;
}

FLUXKERN_INLINE void transpose_4x4(const float* in, int64_t in_stride, float* out,
                                   int64_t out_stride) {
    const Four a = four(in), b = four(in + in_stride);
    const Four c = four(in + 2 * in_stride), d = four(in + 3 * in_stride);
    const Four ab_low = __builtin_shuffle(a, b, Places{0, 4, 1, 5});
    const Four cd_low = __builtin_shuffle(c, d, Places{0, 4, 1, 5});
    const Four ab_high = __builtin_shuffle(a, b, Places{2, 6, 3, 7});
    const Four cd_high = __builtin_shuffle(c, d, Places{2, 6, 3, 7});
    put(out, __builtin_shuffle(ab_low, cd_low, Places{0, 1, 4, 5}));
    put(out + out_stride, __builtin_shuffle(ab_low, cd_low, Places{2, 3, 6, 7}));
    put(out + 2 * out_stride, __builtin_shuffle(ab_high, cd_high, Places{0, 1, 4, 5}));
    put(out + 3 * out_stride, __builtin_shuffle(ab_high, cd_high, Places{2, 3, 6, 7}));
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
