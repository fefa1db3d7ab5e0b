// What the kernels of attention share: the problem, where a block works, and how a row ends.
#pragma once

#include "heads.cuh"

namespace fluxkern::cuda {

constexpr float LOG2_E = 0x1.715476p0f, LN_2 = 0x1.62e43p-1f;

struct Norm {  // of queries; no weight: as they are
    const void* weight;
    Angles cos, sin;
    float eps;
};

struct Problem {
    Heads q, k, v, out;
    float* lse;
    AttentionSizes sizes;
    Norm norm;
    float factor;  // from scores to powers of 2
};

struct Tile {  // of queries of a head
    int64_t b, h, first;
};

__device__ inline Tile place_of(unsigned block, int64_t tiles, int queries,
                                const AttentionSizes& sizes) {
    const unsigned head = block / unsigned(tiles), heads = unsigned(sizes.H);
    return {head / heads, head % heads, int64_t(block % unsigned(tiles)) * queries};
}

// exp2 of scores minus this; a row may have met no score yet.
__device__ inline float base_of(float top, float factor) {
    return top == -INFINITY ? 0.0f : top * factor;
}

__device__ inline float inverse_of(float sum) {  // no keys at all: zeros
    return sum == 0 ? 0.0f : 1 / sum;
}

__device__ inline void write_lse(const Problem& p, const Tile& at, int64_t query, float top,
                                 float sum) {
    if (p.lse == nullptr || query >= p.sizes.L) return;
    p.lse[(at.b * p.sizes.L + query) * p.sizes.H + at.h] = top * p.factor * LN_2 + logf(sum);
}

}  // namespace fluxkern::cuda
