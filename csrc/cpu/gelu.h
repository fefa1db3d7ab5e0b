// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), of a Vec.
#pragma once

#include "exp.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

namespace gelu_constants {
constexpr float C1 = 0.7978845608028654f, C3 = 0.044715f;  // sqrt(2 / pi)
constexpr float A = -2 * C1 * 1.4426950408889634f, B = A * C3;  // -2 u log2(e) = A x + B x^3
}  // namespace gelu_constants

// As exact as T asks. Below -9 the result is below 1e-26, above 9 the sigmoid is 1.
template <class T>
FLUXKERN_INLINE Vec gelu(Vec x, T) {
    using namespace gelu_constants;
    x = at_least(-9, x);
    return quotient(x, 1 + exp2(at_least(-126, x * (all(A) + x * x * B)), T{}), T{});
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
