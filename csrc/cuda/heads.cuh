// RMSNorm and rotation of heads of D elements. In the vector path D / 8 lanes of a warp hold a head
// and a pair lies within one lane; else a warp holds a head and each lane every 32nd pair.
#pragma once

#include "common.cuh"

namespace fluxkern::cuda {

template <class T>
__device__ T* head_of(const Heads& x, int64_t b, int64_t l, int64_t h) {
    return static_cast<T*>(x.data) + b * x.stride_b + l * x.stride_l + h * x.stride_h;
}

// Sum over groups of `lanes` lanes, a power of two.
__device__ inline float lanes_sum(float v, int lanes) {
    for (int bits = lanes / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffff, v, bits);
    return v;
}

__device__ inline float sum_of_products(const Vec& a, const Vec& b) {
    float sum = 0;
    for (int i = 0; i < WIDTH; ++i) sum += a[i] * b[i];
    return sum;
}

// What a lane keeps of a token's angles: those of its pairs.
struct Angles {
    float cos[WIDTH / 2], sin[WIDTH / 2];

    __device__ Vec rotated(const Vec& x, float sign) const {
        Vec out;
        for (int i = 0; i < WIDTH / 2; ++i) {
            const float s = sign * sin[i];
            out[2 * i] = cos[i] * x[2 * i] - s * x[2 * i + 1];
            out[2 * i + 1] = s * x[2 * i] + cos[i] * x[2 * i + 1];
        }
        return out;
    }
};

__device__ inline float angle_at(const Angle& table, int64_t l, int pair) {
    return table.data[l * table.stride_l + pair * table.stride_d];
}

__device__ inline Angles angles_of(const Angle& cos, const Angle& sin, int64_t l, int first_pair) {
    Angles out;
    for (int i = 0; i < WIDTH / 2; ++i) {
        out.cos[i] = angle_at(cos, l, first_pair + i);
        out.sin[i] = angle_at(sin, l, first_pair + i);
    }
    return out;
}

// How many lanes hold a head of the vector path; 0 where there is none.
inline int lanes_of(int64_t D, bool vectors) {
    const int64_t lanes = D / WIDTH;
    const bool power = lanes > 0 && (lanes & (lanes - 1)) == 0;
    return vectors && D % WIDTH == 0 && power && lanes <= WARP ? int(lanes) : 0;
}

}  // namespace fluxkern::cuda
