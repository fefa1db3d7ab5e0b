// A row in e4m3 with one scale, x = q * scale, of values that a block has in registers.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>

#include "common.cuh"

namespace fluxkern::cuda {

constexpr float FP8_MAX = 448;
constexpr int FP8_SIDE = 2;  // vectors of 8 whose bytes are stored at once

template <class T, int VECTORS>
using Fp8Share = Share<T, VECTORS, FP8_SIDE>;

// Bits of |v|: they order as numbers do, with infinity and then NaN on top.
__device__ inline uint32_t magnitude(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    return bits & 0x7fffffff;
}

__device__ inline uint32_t warp_max(uint32_t v) {
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
        v = max(v, __shfl_xor_sync(0xffffffff, v, bits));
    }
    return v;
}

__device__ inline float block_max_magnitude(uint32_t v, uint32_t (&slots)[WARP]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    v = warp_max(v);
    if (lane == 0) slots[warp] = v;
    __syncthreads();
    v = warp_max(lane < int(blockDim.x) / WARP ? slots[lane] : 0);
    float largest;
    memcpy(&largest, &v, sizeof(largest));
    return largest;
}

__device__ inline uint16_t fp8_pair(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline void store_fp8(uint8_t* p, const Vec& a, const Vec& b, float inverse) {
    uint16_t pairs[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
        pairs[i] = fp8_pair(a[2 * i] * inverse, a[2 * i + 1] * inverse);
        pairs[WIDTH / 2 + i] = fp8_pair(b[2 * i] * inverse, b[2 * i + 1] * inverse);
    }
    Chunk chunk;
    memcpy(&chunk, pairs, sizeof(chunk));
    *reinterpret_cast<Chunk*>(p) = chunk;
}

// The row of value(tile) -> Vec. Nothing above FLT_MIN * 448 counts as zeros; a NaN or an infinity
// makes the whole row NaN.
template <class T, int VECTORS, class Value>
__device__ void write_fp8_row(const Fp8Share<T, VECTORS>& share, uint8_t* out, float* row_scale,
                              uint32_t (&slots)[WARP], Value value) {
    Vec row[VECTORS > 0 ? VECTORS : 1];
    uint32_t top = 0;
    share.each_tile([&](int tile) {
        const Vec v = value(tile);
        if constexpr (VECTORS > 0) row[tile] = v;
        for (int i = 0; i < WIDTH; ++i) {
            if (share.has(tile, i)) top = max(top, magnitude(v[i]));
        }
    });
    float scale = block_max_magnitude(top, slots) / FP8_MAX;
    scale = scale < FLT_MIN ? 0 : scale;
    const float inverse = scale == 0 ? 0 : 1 / scale;
    if (threadIdx.x == 0) *row_scale = scale;
    if constexpr (VECTORS > 0) {
#pragma unroll
        for (int tile = 0; tile < VECTORS; tile += FP8_SIDE) {
            if (!share.has(tile, 0)) continue;
            store_fp8(out + share.column(tile, 0), row[tile], row[tile + 1], inverse);
        }
    } else {
        share.each_tile([&](int tile) {
            const Vec v = value(tile);
            for (int i = 0; i < WIDTH; ++i) {
                if (!share.has(tile, i)) continue;
                out[share.column(tile, i)] =
                    __nv_cvt_float_to_fp8(v[i] * inverse, __NV_SATFINITE, __NV_E4M3);
            }
        });
    }
}

// launches

inline bool fp8_aligned(const Tokens& out) {
    const uint64_t places = uint64_t(out.data) | uint64_t(out.stride_b) | uint64_t(out.stride_l);
    return places % sizeof(Chunk) == 0;
}

// Of `most` vectors a thread at most.
inline Plan fp8_plan_of(int64_t C, bool vectors, int most) {
    for (int n = FP8_SIDE; n <= most; n *= 2) {
        const int64_t threads = (C + WIDTH * n - 1) / (WIDTH * n);
        const bool fits = C % (WIDTH * FP8_SIDE) == 0 && threads <= threads_of(n);
        if (vectors && fits) return {n, whole_warps(threads)};
    }
    return plan_of(C, false);
}

// Calls launch<T, VECTORS>() of the plan.
template <int MOST, class Launch>
cudaError_t with_fp8_plan(DType dtype, int vectors, Launch launch) {
    return with_types(dtype, vectors > 0, [&]<class T, int ANY>() {
        if constexpr (ANY == 0) return launch.template operator()<T, 0>();
        if constexpr (MOST == 4) {
            if (vectors == 4) return launch.template operator()<T, 4>();
        }
        return launch.template operator()<T, 2>();
    });
}

}  // namespace fluxkern::cuda
