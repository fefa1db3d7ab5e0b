// RMSNorm and rotation of heads of D elements. In the vector path D / 8 lanes of a warp hold a head
// and a pair lies within one lane; else a warp holds a head and each lane every 32nd pair.
#pragma once

#include "common.cuh"

namespace fluxkern::cuda {

constexpr int WARPS = 4;  // a block

template <class T>
__device__ T* head_of(const Heads& x, int64_t b, int64_t l, int64_t h) {
    return static_cast<T*>(x.data) + b * x.stride_b + l * x.stride_l + h * x.stride_h;
}

// Sum over groups of `lanes` lanes, a power of two.
__device__ inline float lanes_sum(float v, int lanes) {
    for (int bits = lanes / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffff, v, bits);
    return v;
}

__device__ inline float dot(const Vec& a, const Vec& b) {
    float sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += a[i] * b[i];
    return sum;
}

// A rotation of a pair by +angle, or back by -angle.
__device__ inline float2 rotated(float2 x, float cos, float sin) {
    return make_float2(cos * x.x - sin * x.y, sin * x.x + cos * x.y);
}

struct Rotation {  // of the four pairs of a lane
    float cos[WIDTH / 2], sin[WIDTH / 2];

    __device__ Vec applied(const Vec& x, float sign) const {
        Vec out;
        for (int i = 0; i < WIDTH / 2; ++i) {
            const float2 pair = make_float2(x[2 * i], x[2 * i + 1]);
            const float2 turned = rotated(pair, cos[i], sign * sin[i]);
            out[2 * i] = turned.x;
            out[2 * i + 1] = turned.y;
        }
        return out;
    }
};

__device__ inline float angle_of(const Angles& table, int64_t l, int pair) {
    return table.data[l * table.stride_l + pair * table.stride_d];
}

__device__ inline Rotation rotation_of(const Angles& cos, const Angles& sin, int64_t l, int pair) {
    Rotation out;
    for (int i = 0; i < WIDTH / 2; ++i) {
        out.cos[i] = angle_of(cos, l, pair + i);
        out.sin[i] = angle_of(sin, l, pair + i);
    }
    return out;
}

// Whether a power of two of lanes of one warp hold a head, 8 elements each.
inline bool lanes_hold(int64_t D) {
    const int64_t lanes = D / WIDTH;
    return D % WIDTH == 0 && lanes >= 1 && lanes <= WARP && (lanes & (lanes - 1)) == 0;
}

}  // namespace fluxkern::cuda
