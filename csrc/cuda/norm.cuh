// LayerNorm over a row that a block shares out: statistics in two passes over registers.
#pragma once

#include "common.cuh"

namespace fluxkern::cuda {

struct NormStorage {  // a float a warp for each sum of a row
    float sum[1][WARP], squares[1][WARP], gradient[2][WARP];
};

// A row read once and kept in registers; without VECTORS read from memory again each time.
template <class T, int VECTORS>
struct Kept {
    const T* memory;
    Packed<T> registers[VECTORS > 0 ? VECTORS : 1];

    __device__ void keep(int tile, const Packed<T>& packed) {
        if constexpr (VECTORS > 0) registers[tile] = packed;
    }
    template <int SIDE>
    __device__ Vec at(const Share<T, VECTORS, SIDE>& share, int tile) const {
        if constexpr (VECTORS > 0) return unpack(registers[tile]);
        return share.load(memory, tile);
    }
};

template <class T, int VECTORS, int SIDE>
__device__ Kept<T, VECTORS> read_row(const Share<T, VECTORS, SIDE>& share, const T* memory) {
    Kept<T, VECTORS> row = {memory, {}};
    if constexpr (VECTORS > 0) {
        share.each_tile([&](int tile) { row.keep(tile, share.load_whole(memory, tile)); });
    }
    return row;
}

struct Statistics {
    float mean, rstd;
};

template <class T, int VECTORS, int SIDE>
__device__ Statistics statistics_of(const Share<T, VECTORS, SIDE>& share,
                                    const Kept<T, VECTORS>& row, float eps, NormStorage& storage) {
    float sum[1] = {}, squares[1] = {};
    share.each_tile([&](int tile) {
        const Vec x = row.at(share, tile);
        for (int i = 0; i < WIDTH; ++i) sum[0] += x[i];
    });
    block_sum(sum, storage.sum);
    const float mean = sum[0] / float(share.C);
    share.each_tile([&](int tile) {
        const Vec x = row.at(share, tile);
        for (int i = 0; i < WIDTH; ++i) {
            if (share.has(tile, i)) squares[0] += (x[i] - mean) * (x[i] - mean);
        }
    });
    block_sum(squares, storage.squares);
    return {mean, rsqrtf(squares[0] / float(share.C) + eps)};
}

// norm(row) * (1 + scale) + shift
template <class T, int VECTORS, int SIDE>
__device__ Vec modulated(const Share<T, VECTORS, SIDE>& share, const Kept<T, VECTORS>& row,
                         const Statistics& s, const T* scale, const T* shift, int tile) {
    const Vec x = row.at(share, tile), m = share.load(scale, tile), a = share.load(shift, tile);
    Vec h;
    for (int i = 0; i < WIDTH; ++i) h[i] = (x[i] - s.mean) * s.rstd * (1 + m[i]) + a[i];
    return h;
}

template <class T, int VECTORS>
__device__ void write_norm_modulate(const Share<T, VECTORS>& share, const Kept<T, VECTORS>& row,
                                    const T* scale, const T* shift, T* out, float eps) {
    const Statistics s = statistics_of(share, row, eps, shared<NormStorage>());
    share.each_tile([&](int tile) {
        share.store(out, tile, modulated(share, row, s, scale, shift, tile));
    });
}

struct NormGradient {
    const Statistics s;
    const float mean_dn, mean_dn_n;

    __device__ float normed(float x) const {
        return (x - s.mean) * s.rstd;
    }
    __device__ float dx(float x, float dn) const {
        return s.rstd * (dn - mean_dn - normed(x) * mean_dn_n);
    }
};

// The two means that the gradient of a normed row needs, with dn = dh * (1 + scale).
template <class T, int VECTORS>
__device__ NormGradient gradient_of(const Share<T, VECTORS>& share, const Kept<T, VECTORS>& x_row,
                                    const Kept<T, VECTORS>& dh_row, const T* scale, float eps) {
    NormStorage& storage = shared<NormStorage>();
    const Statistics s = statistics_of(share, x_row, eps, storage);
    float sums[2] = {};
    share.each_tile([&](int tile) {
        const Vec x = x_row.at(share, tile), dh = dh_row.at(share, tile);
        const Vec m = share.load(scale, tile);
        for (int i = 0; i < WIDTH; ++i) {  // dh is zero behind the end
            const float dn = dh[i] * (1 + m[i]);
            sums[0] += dn;
            sums[1] += dn * ((x[i] - s.mean) * s.rstd);
        }
    });
    block_sum(sums, storage.gradient);
    return {s, sums[0] / float(share.C), sums[1] / float(share.C)};
}

}  // namespace fluxkern::cuda
