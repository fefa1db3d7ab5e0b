// What the kernels of attention share: the problem, where a block works, and how a row ends.
#pragma once

#include "heads.cuh"

namespace fluxkern::cuda {

constexpr float LOG2_E = 0x1.715476p0f;

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
    float scale;   // of scores
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
    p.lse[(at.b * p.sizes.L + query) * p.sizes.H + at.h] = top * p.scale + logf(sum);
}

// ahead of a kernel

inline int64_t elements_of(const AttentionSizes& sizes) {
    return sizes.B * sizes.L * sizes.H * sizes.D;
}

inline Heads dense(void* data, const AttentionSizes& sizes) {
    const int64_t token = sizes.H * sizes.D;
    return {data, sizes.L * token, token, sizes.D};
}

// k, and q unless it is normed while it is staged, to scratch.
inline cudaError_t norm_ahead(DType dtype, Problem& p, const void* k_weight, bool q_too,
                              float* scratch, const Context& context) {
    const AttentionSizes& s = p.sizes;
    const int64_t bytes = elements_of(s) * (dtype == DType::f32 ? 4 : 2);
    const Heads none = {}, k = dense(scratch, s);
    const Heads q = q_too ? dense(reinterpret_cast<char*>(scratch) + bytes, s) : none;
    const cudaError_t error = qk_norm_rope(
        dtype, none, none, none, p.q, p.k, none, p.norm.weight, k_weight, p.norm.weight, k_weight,
        p.norm.cos, p.norm.sin, q, k, none, {s.B, s.L, s.H, s.D, 0}, p.norm.eps, context);
    p.k = k;
    if (q_too) p.q = q, p.norm.weight = nullptr;
    return error;
}

}  // namespace fluxkern::cuda
