// GELU in its tanh form, x sigmoid(2 u).
#pragma once

#include "common.cuh"

namespace fluxkern::cuda {

constexpr float ROOT = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

struct Gate {  // sigmoid(2u), and what is left of 1, neither by a difference
    float open, shut;
};

__device__ inline Gate gate_of(float x) {
    const float u = ROOT * (x + CUBIC * x * x * x), t = expf(-2 * fabsf(u));
    const float near = 1 / (1 + t), far = t / (1 + t);
    return u >= 0 ? Gate{near, far} : Gate{far, near};
}

}  // namespace fluxkern::cuda
