// Attention of any dtype, D and alignment, without tensor cores.
// Grid: a block a tile of 32 queries of a head and 128 columns of out.
// Bytes: 4 B L H D elements; q, k and v once a tile of 32 x 32, from L2.
// Accumulation: fp32 products, softmax and sums, tile by tile of keys.
// Limits: B H L D / 4096 < 2^31; shared memory bounds it, at a quarter of the fp32 units.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int TILE = 32;      // queries, keys and columns at a time
constexpr int COLUMNS = 128;  // of out, a block
constexpr int OF_A_ROW = WARPS * WARP / TILE;  // threads

struct PlainStorage {
    float q[TILE][TILE + 1], k[TILE][TILE + 1], p[TILE][TILE + 1], v[TILE][COLUMNS + 1];
};

// Rows from `first` and columns from `column` of a head, zeros behind its last.
template <int WIDE, class T>
__device__ void stage_plain(float (&tile)[TILE][WIDE + 1], const Heads& x, const Tile& at,
                            int64_t first, int64_t end, int64_t column, int64_t columns) {
    const T* const head = head_of<const T>(x, at.b, 0, at.h);
    for (int i = threadIdx.x; i < TILE * WIDE; i += WARPS * WARP) {
        const int64_t l = first + i / WIDE, d = column + i % WIDE;
        const bool there = l < end && d < columns;
        tile[i / WIDE][i % WIDE] = there ? float(head[l * x.stride_l + d]) : 0.0f;
    }
}

// Of one row a thread holds scores, and columns of out, in steps of OF_A_ROW.
template <class T>
struct RowState {
    const Problem& p;
    const Tile& at;
    PlainStorage& memory;
    const int row = threadIdx.x / OF_A_ROW, own = threadIdx.x % OF_A_ROW;
    float out[COLUMNS / OF_A_ROW] = {}, scores[TILE / OF_A_ROW] = {}, top = -INFINITY, sum = 0;

    // Products are added in chains of 32: a long chain's rounding reaches every gradient.
    __device__ void score(int64_t key) {
#pragma unroll
        for (float& score : scores) score = 0;
        for (int64_t d = 0; d < p.sizes.D; d += TILE) {
            stage_plain<TILE, T>(memory.q, p.q, at, at.first, p.sizes.L, d, p.sizes.D);
            stage_plain<TILE, T>(memory.k, p.k, at, key, p.sizes.M, d, p.sizes.D);
            __syncthreads();
            float chains[TILE / OF_A_ROW] = {};
            for (int i = 0; i < TILE; ++i) {
#pragma unroll
                for (int j = 0; j < TILE / OF_A_ROW; ++j) {
                    chains[j] += memory.q[row][i] * memory.k[own + j * OF_A_ROW][i];
                }
            }
#pragma unroll
            for (int j = 0; j < TILE / OF_A_ROW; ++j) scores[j] += chains[j];
            __syncthreads();
        }
    }

    // Weights of the first `keys` keys to shared memory.
    __device__ void weigh(int64_t keys) {
        float most = top;
#pragma unroll
        for (int j = 0; j < TILE / OF_A_ROW; ++j) {
            if (own + j * OF_A_ROW >= keys) scores[j] = -INFINITY;
            most = fmaxf(most, scores[j]);
        }
        for (int bits = 1; bits < OF_A_ROW; bits *= 2) {
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, bits));
        }
        const float base = most == -INFINITY ? 0.0f : most;  // subtracted ahead of rounding by factor
        const float less = exp2_estimate((top - base) * p.factor);
        top = most;
        sum *= less;
#pragma unroll
        for (float& column : out) column *= less;
#pragma unroll
        for (int j = 0; j < TILE / OF_A_ROW; ++j) {
            const float weight = exp2_estimate((scores[j] - base) * p.factor);
            sum += weight;
            memory.p[row][own + j * OF_A_ROW] = weight;
        }
    }

    __device__ void accumulate(int64_t key, int64_t column) {
        stage_plain<COLUMNS, T>(memory.v, p.v, at, key, p.sizes.M, column, p.sizes.D);
        __syncthreads();
        for (int i = 0; i < TILE; ++i) {
#pragma unroll
            for (int j = 0; j < COLUMNS / OF_A_ROW; ++j) {
                out[j] += memory.p[row][i] * memory.v[i][own + j * OF_A_ROW];
            }
        }
        __syncthreads();
    }

    __device__ void write(int64_t column) const {
        const int64_t l = at.first + row;
        const float total = lanes_sum(sum, OF_A_ROW), inverse = inverse_of(total);
        if (own == 0 && column == 0) write_lse(p, at, l, top, total);
#pragma unroll
        for (int j = 0; j < COLUMNS / OF_A_ROW; ++j) {
            const int64_t d = column + own + j * OF_A_ROW;
            if (l >= p.sizes.L || d >= p.sizes.D) continue;
            head_of<T>(p.out, at.b, l, at.h)[d] = T(out[j] * inverse);
        }
    }
};

template <class T>
__global__ void __launch_bounds__(WARPS * WARP, 4)
    plain_attention_kernel(Problem p, unsigned tiles, unsigned parts) {
    const Tile at = place_of(blockIdx.x / parts, tiles, TILE, p.sizes);
    const int64_t column = int64_t(blockIdx.x % parts) * COLUMNS;
    RowState<T> state = {p, at, shared<PlainStorage>()};
    for (int64_t key = 0; key < p.sizes.M; key += TILE) {
        state.score(key);
        state.weigh(p.sizes.M - key);
        state.accumulate(key, column);
    }
    state.write(column);
}

template <class T>
cudaError_t launch_plain(const Problem& p, const Context& context) {
    const int64_t tiles = (p.sizes.L + TILE - 1) / TILE;
    const int64_t parts = (p.sizes.D + COLUMNS - 1) / COLUMNS;
    return launch(context, plain_attention_kernel<T>, p.sizes.B * p.sizes.H * tiles * parts,
                  WARPS * WARP, sizeof(PlainStorage), p, unsigned(tiles), unsigned(parts));
}

}  // namespace
}  // namespace fluxkern::cuda
