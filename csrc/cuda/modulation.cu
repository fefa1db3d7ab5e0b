// silu(vec) weight^T + bias, few rows: a product that only reads the weight.
// Grid: a block 16 rows of the weight, two a warp, and one row of vec or eight, side by side.
// Bytes: N K elements of the weight, for more than eight rows again from L2.
// Accumulation: fp32, one rounding.
// Limits: N S B < 2^34; above tens of rows a matrix product is faster.
#include "common.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int OUTPUTS = 2;  // a warp
constexpr int OUTPUTS_OF_BLOCK = THREADS / WARP * OUTPUTS;
constexpr int MANY = 8;  // rows of vec at once

template <class T>
constexpr int TILE = 2048 / sizeof(T);  // of K; 128 bytes of the weight in flight a lane
template <class T>
constexpr int STEPS = TILE<T> / WIDTH / WARP;

template <class T, int ROWS>
struct Storage {
    float active[ROWS][TILE<T>];

    // The first four of every eight elements, then the others: lanes side by side read neighbours.
    __device__ static int place(int k) {
        return k / 4 % 2 * (TILE<T> / 2) + k / WIDTH * 4 + k % 4;
    }
};

__device__ inline float silu(float x) {
    return x / (1 + expf(-x));
}

template <class T>
struct Product {
    Tokens vec;  // [S, B, K]
    Rows weight;
    const T* bias;
    Rows out;  // [S B, N]
    MatrixSizes sizes;

    __device__ int rows() const {
        return int(sizes.S * sizes.B);
    }
};

// silu of a tile of ROWS rows of vec from `first`; zeros behind the last and behind K.
template <class T, int ROWS>
__device__ void activate(Storage<T, ROWS>& memory, const Product<T>& p, int first, int64_t start) {
#pragma unroll 1
    for (int r = 0; r < ROWS; ++r) {
        const int row = first + r, batch = int(p.sizes.B);
        const T* const x = row_of<const T>(p.vec, row / batch, row % batch);
        for (int k = threadIdx.x; k < TILE<T>; k += THREADS) {
            const bool there = row < p.rows() && start + k < p.sizes.K;
            memory.active[r][memory.place(k)] = there ? silu(float(x[start + k])) : 0.0f;
        }
    }
}

// 8 elements of a lane, side by side or, not aligned, 32 apart.
template <bool VECTORS>
__device__ int element_of(int step, int i) {
    const int lane = threadIdx.x % WARP;
    return VECTORS ? (step * WARP + lane) * WIDTH + i : (step * WIDTH + i) * WARP + lane;
}

template <class T, bool VECTORS>
__device__ Packed<T> weights_of(const T* row, int step, int64_t left) {
    if constexpr (VECTORS) {
        const int k = element_of<VECTORS>(step, 0);
        return k < left ? load_packed(row + k) : Packed<T>{};
    }
    Vec out = {};
    for (int i = 0; i < WIDTH; ++i) {
        const int k = element_of<VECTORS>(step, i);
        if (k < left) out[i] = float(row[k]);
    }
    return pack<T>(out);
}

// sums += the weights of a warp times a tile of ROWS rows
template <class T, int ROWS, bool VECTORS>
__device__ void multiply(float (&sums)[OUTPUTS][ROWS],
                         const Packed<T> (&weights)[OUTPUTS][STEPS<T>],
                         const Storage<T, ROWS>& memory) {
#pragma unroll
    for (int s = 0; s < STEPS<T>; ++s) {
        Vec w[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) w[o] = unpack(weights[o][s]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            for (int i = 0; i < WIDTH; ++i) {
                const float x = memory.active[r][memory.place(element_of<VECTORS>(s, i))];
                for (int o = 0; o < OUTPUTS; ++o) sums[o][r] += w[o][i] * x;
            }
        }
    }
}

template <class T, int ROWS, bool VECTORS>
__global__ void __launch_bounds__(THREADS, VECTORS ? 2 : 1)
    modulation_kernel(Product<T> p, unsigned groups) {
    Storage<T, ROWS>& memory = shared<Storage<T, ROWS>>();
    const int first = int(blockIdx.x % groups) * ROWS, warp = threadIdx.x / WARP;
    const int64_t n = int64_t(blockIdx.x / groups) * OUTPUTS_OF_BLOCK + warp * OUTPUTS;
    float sums[OUTPUTS][ROWS] = {};
    for (int64_t start = 0; start < p.sizes.K; start += TILE<T>) {
        Packed<T> weights[OUTPUTS][STEPS<T>];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
            const T* const row = row_of<const T>(p.weight, n + o) + start;
            const int64_t left = n + o < p.sizes.N ? p.sizes.K - start : 0;
#pragma unroll
            for (int s = 0; s < STEPS<T>; ++s) weights[o][s] = weights_of<T, VECTORS>(row, s, left);
        }
        if (start > 0) __syncthreads();  // the tile before is used
        activate(memory, p, first, start);
        __syncthreads();
        multiply<T, ROWS, VECTORS>(sums, weights, memory);
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = warp_sum(sums[o][r]);
            const bool there = n + o < p.sizes.N && first + r < p.rows();
            if (threadIdx.x % WARP != 0 || !there) continue;
            const float shift = p.bias == nullptr ? 0.0f : float(p.bias[n + o]);
            row_of<T>(p.out, first + r)[n + o] = T(sum + shift);
        }
    }
}

template <class T, int ROWS, bool VECTORS>
cudaError_t launch_product(const Product<T>& p, const Context& context) {
    const int64_t groups = (p.sizes.S * p.sizes.B + ROWS - 1) / ROWS;
    const int64_t outputs = (p.sizes.N + OUTPUTS_OF_BLOCK - 1) / OUTPUTS_OF_BLOCK;
    return launch(context, modulation_kernel<T, ROWS, VECTORS>, groups * outputs, THREADS,
                  sizeof(Storage<T, ROWS>), p, unsigned(groups));
}

}  // namespace

cudaError_t modulation(DType dtype, Tokens vec, Rows weight, const void* bias, Rows out,
                       const MatrixSizes& sizes, float*, const Context& context) {
    const bool vectors = sizes.K % WIDTH == 0 && aligned(dtype, weight);
    return with_types(dtype, vectors ? 1 : 0, [&]<class T, int VECTORS>() {
        if constexpr (VECTORS == 2) return cudaErrorInvalidValue;
        const Product<T> p = {vec, weight, static_cast<const T*>(bias), out, sizes};
        if (sizes.S * sizes.B == 1) return launch_product<T, 1, VECTORS == 1>(p, context);
        return launch_product<T, MANY, VECTORS == 1>(p, context);
    });
}

}  // namespace fluxkern::cuda
