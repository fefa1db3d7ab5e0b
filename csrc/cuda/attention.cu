// softmax(q k^T / sqrt(D)) v and its log-sum-exp; q normed and rotated on its way, k ahead.
// Grid: a block a tile of 128 queries of a head, 32 of them a warp.
// Bytes: 4 B L H D elements, with norm 2 more of k; k and v of a head once a tile, from L2.
// Accumulation: fp32 softmax and sums, tile by tile of keys; p rounded for the second product.
// Limits: bf16, fp16, D of 8, 16, ... 128, aligned; others by attention_plain.cuh. B H L < 2^38.
#include "attention_plain.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int QUERIES = WARPS * WARP;  // a block
constexpr float SLACK = 8;  // powers of 2 that a score may exceed the top by which sums are scaled

// Tiles [rows, D] of 16 bytes a chunk, in which no two of 8 rows have a column in the same banks.
template <int D>
__device__ Chunk* chunk_at(Chunk* tile, int row, int column) {
    return tile + row * (D / WIDTH) + (column ^ (row & 7));
}

template <int D, int KEYS>
struct Storage {
    Chunk q[QUERIES * D / WIDTH], k[KEYS * D / WIDTH], v[KEYS * D / WIDTH];
};

// Where a lane reads such a tile: every 8th row from `row`, every 2nd column from `column`, 0 or 1.
template <int D>
struct Reader {
    const Chunk* from;
    int mixed;

    __device__ Reader(const Chunk* tile, int row, int column)
        : from(tile + row * (D / WIDTH)), mixed(column ^ (row & 7)) {}

    __device__ const Chunk* at(int rows, int columns) const {
        return from + rows * (D / WIDTH) + (mixed ^ columns);
    }
};

// ROWS rows on their way to shared memory; zeros where not among the first `rows` and `columns`.
template <int D, int ROWS, class T>
__device__ void stage(Chunk* tile, const T* first, int64_t stride, int64_t rows, int64_t columns) {
    constexpr int ACROSS = D / WIDTH, STEP = QUERIES / ACROSS;
    const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
    const int there = across * WIDTH < columns ? int(min(rows, int64_t(ROWS))) : 0;
    const T* from = first + down * stride + across * WIDTH;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i, from += STEP * stride) {
        const int row = down + i * STEP;
        copy_async(chunk_at<D>(tile, row, across), from, row < there);
    }
}

// The queries of a block, normed and rotated; D / 8 lanes hold one.
template <int D, class T>
__device__ void stage_normed(Chunk* tile, const Problem& p, const Tile& at) {
    constexpr int ACROSS = D / WIDTH, STEP = QUERIES / ACROSS;
    const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
    const bool inside = across * WIDTH < p.sizes.D;
    const T* const head = head_of<const T>(p.q, at.b, 0, at.h) + across * WIDTH;
    const T* const weight = static_cast<const T*>(p.norm.weight) + across * WIDTH;
    const Vec scale = unpack(inside ? load_packed(weight) : Packed<T>{});
#pragma unroll 2
    for (int i = 0; i < QUERIES / STEP; ++i) {
        const int row = down + i * STEP;
        const int64_t l = at.first + row;
        const bool there = inside && l < p.sizes.L;
        Vec x = unpack(there ? load_packed(head + l * p.q.stride_l) : Packed<T>{});
        const float squares = lanes_sum(dot(x, x), ACROSS);
        const float rstd = rsqrtf(squares / float(p.sizes.D) + p.norm.eps);
        for (int j = 0; j < WIDTH; ++j) x[j] *= rstd * scale[j];
        Packed<T> out = {};
        if (there) {
            out = pack<T>(rotation_of(p.norm.cos, p.norm.sin, l, across * WIDTH / 2).applied(x, 1));
        }
        store_packed(reinterpret_cast<T*>(chunk_at<D>(tile, row, across)), out);
    }
}

// 32 queries of a warp: two tiles of 16, in each of which a lane holds two rows.
template <class T, int D, int KEYS>
struct WarpState {
    float out[2][D / 8][4], scores[2][KEYS / 8][4], top[2][2], sum[2][2];

    __device__ WarpState() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            for (int n = 0; n < D / 8; ++n) {
                for (int j = 0; j < 4; ++j) out[i][n][j] = 0;
            }
            for (int j = 0; j < 2; ++j) top[i][j] = -INFINITY, sum[i][j] = 0;
        }
    }

    __device__ static int first_row() {  // of the block
        return threadIdx.x / WARP * WARP;
    }

    // scores = q k^T
    __device__ void score(const Chunk* q, const Chunk* k) {
        const int lane = threadIdx.x % WARP;
        const Reader<D> queries(q, first_row() + lane % 16, lane / 16);
        const Reader<D> keys(k, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            for (int n = 0; n < KEYS / 8; ++n) {
                for (int j = 0; j < 4; ++j) scores[i][n][j] = 0;
            }
        }
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t a[2][4];
            load_matrices(a[0], queries.at(0, d));
            load_matrices(a[1], queries.at(16, d));
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                uint32_t b[4];
                load_matrices(b, keys.at(8 * n, d));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    multiply_add<T>(scores[i][n], a[i], b[0], b[1]);
                    multiply_add<T>(scores[i][n + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    // Scores of keys that are not there, of which only `keys` are.
    __device__ void mask(int keys) {
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (8 * n + column + j % 2 < keys) continue;
                scores[0][n][j] = scores[1][n][j] = -INFINITY;
            }
        }
    }

    __device__ float largest(int i, int row) const {  // of a row, in all its lanes
        float most = -INFINITY;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
            most = fmaxf(most, fmaxf(scores[i][n][2 * row], scores[i][n][2 * row + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
        return fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    }

    // Tops follow their rows when one has grown by more than the slack, and the sums with them.
    __device__ void raise(float factor) {
        float most[2][2];
        bool grown = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                most[i][row] = fmaxf(top[i][row], largest(i, row));
                grown |= (most[i][row] - top[i][row]) * factor > SLACK;
            }
        }
        if (!any_lane(grown)) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float less = exp2_estimate(top[i][row] * factor -
                                                 base_of(most[i][row], factor));
                top[i][row] = most[i][row];
                sum[i][row] *= less;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    out[i][n][2 * row] *= less;
                    out[i][n][2 * row + 1] *= less;
                }
            }
        }
    }

    // scores = exp(scores - top)
    __device__ void exponentiate(float factor) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float base = base_of(top[i][row], factor);
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int j = 2 * row; j < 2 * row + 2; ++j) {
                        scores[i][n][j] = exp2_estimate(scores[i][n][j] * factor - base);
                        sum[i][row] += scores[i][n][j];
                    }
                }
            }
        }
    }

    // out += scores v; two columns of 8 scores are one of 16 of the other product
    __device__ void accumulate(const Chunk* v) {
        const int lane = threadIdx.x % WARP;
        const Reader<D> values(v, lane % 16, lane / 16);
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            uint32_t a[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* pair = &scores[i][key / 8 + j / 2][j % 2 * 2];
                    a[i][j] = pack_pair<T>(pair[0], pair[1]);
                }
            }
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                uint32_t b[4];
                load_transposed(b, values.at(key, n));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    multiply_add<T>(out[i][n], a[i], b[0], b[1]);
                    multiply_add<T>(out[i][n + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    // Through the rows of q, which all have read, so that stores are wide.
    __device__ void write(Chunk* tile, const Problem& p, const Tile& at) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float total = lanes_sum(sum[i][row], 4), inverse = inverse_of(total);
                const int at_row = first_row() + 16 * i + 8 * row + lane / 4;
                if (lane % 4 == 0) write_lse(p, at, at.first + at_row, top[i][row], total);
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    chunk_at<D>(tile, at_row, n)->words[lane % 4] = pack_pair<T>(
                        out[i][n][2 * row] * inverse, out[i][n][2 * row + 1] * inverse);
                }
            }
        }
        __syncwarp();
        constexpr int ACROSS = D / WIDTH;
#pragma unroll 4
        for (int row = first_row() + lane / ACROSS; row < first_row() + WARP;
             row += WARP / ACROSS) {
            const int64_t l = at.first + row;
            const int column = lane % ACROSS;
            if (l >= p.sizes.L || column * WIDTH >= p.sizes.D) continue;
            T* const to = head_of<T>(p.out, at.b, l, at.h) + column * WIDTH;
            *reinterpret_cast<Chunk*>(to) = *chunk_at<D>(tile, row, column);
        }
    }
};

template <class T, int D, int KEYS>
__global__ void __launch_bounds__(QUERIES, 2) attention_kernel(Problem p, unsigned tiles) {
    Storage<D, KEYS>& memory = shared<Storage<D, KEYS>>();
    const Tile at = place_of(blockIdx.x, tiles, QUERIES, p.sizes);
    const int64_t M = p.sizes.M, columns = p.sizes.D;
    const T* k = head_of<const T>(p.k, at.b, 0, at.h);
    const T* v = head_of<const T>(p.v, at.b, 0, at.h);
    stage<D, KEYS>(memory.k, k, p.k.stride_l, M, columns);
    if (p.norm.weight != nullptr) {
        stage_normed<D, T>(memory.q, p, at);
    } else {
        stage<D, QUERIES>(memory.q, head_of<const T>(p.q, at.b, at.first, at.h), p.q.stride_l,
                          p.sizes.L - at.first, columns);
    }
    WarpState<T, D, KEYS> state;
    for (int64_t left = M; left > 0; left -= KEYS) {
        wait_for_copies();
        __syncthreads();  // these k are there, the v before them used
        stage<D, KEYS>(memory.v, v, p.v.stride_l, left, columns);
        v += KEYS * p.v.stride_l;
        state.score(memory.q, memory.k);
        if (left < KEYS) state.mask(int(left));
        wait_for_copies();
        __syncthreads();  // these v are there, the k used
        k += KEYS * p.k.stride_l;
        if (left > KEYS) stage<D, KEYS>(memory.k, k, p.k.stride_l, left - KEYS, columns);
        state.raise(p.factor);
        state.exponentiate(p.factor);
        state.accumulate(memory.v);
    }
    state.write(memory.q, p, at);
}

// launches

template <class T, int D, int KEYS>
cudaError_t launch_tiled(const Problem& p, const Context& context) {
    const auto kernel = attention_kernel<T, D, KEYS>;
    const int bytes = sizeof(Storage<D, KEYS>);
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const int64_t tiles = (p.sizes.L + QUERIES - 1) / QUERIES;
    return launch(context, kernel, p.sizes.B * p.sizes.H * tiles, QUERIES, bytes, p,
                  unsigned(tiles));
}

template <class Storage>
constexpr int shared_of_two() {  // blocks, on one multiprocessor
    return 2 * (sizeof(Storage) + (1 << 10));
}

template <class T>
cudaError_t launch_tiled(const Problem& p, const Context& context) {
    static_assert(shared_of_two<Storage<64, 64>>() <= 100 << 10);
    static_assert(shared_of_two<Storage<128, 32>>() <= 100 << 10);
    static_assert(shared_of_two<Storage<128, 64>>() <= 164 << 10);
    if (p.sizes.D <= 64) return launch_tiled<T, 64, 64>(p, context);
    const bool roomy = context.shared_memory >= shared_of_two<Storage<128, 64>>();
    return roomy ? launch_tiled<T, 128, 64>(p, context) : launch_tiled<T, 128, 32>(p, context);
}

bool takes_tensor_cores(DType dtype, const AttentionSizes& sizes) {
    return dtype != DType::f32 && sizes.D % WIDTH == 0 && sizes.D <= 128 && sizes.M > 0;
}

}  // namespace

cudaError_t attention(DType dtype, Heads q, Heads k, Heads v, const void* q_weight,
                      const void* k_weight, Angles cos, Angles sin, Heads out, float* lse,
                      const AttentionSizes& sizes, float eps, float* scratch,
                      const Context& context) {
    const float root = std::sqrt(float(sizes.D));
    Problem p = {q, k, v, out, lse, sizes, {q_weight, cos, sin, eps}, 1 / root, LOG2_E / root};
    const bool tiled = takes_tensor_cores(dtype, sizes) && aligned(dtype, q, v, out, q_weight) &&
                       (q_weight != nullptr || aligned(dtype, k));
    if (q_weight != nullptr) {
        const cudaError_t error = norm_ahead(dtype, p, k_weight, !tiled, scratch, context);
        if (error != cudaSuccess) return error;
    }
    if (tiled && dtype == DType::bf16) return launch_tiled<__nv_bfloat16>(p, context);
    if (tiled) return launch_tiled<__half>(p, context);
    if (dtype == DType::f32) return launch_plain<float>(p, context);
    if (dtype == DType::bf16) return launch_plain<__nv_bfloat16>(p, context);
    return launch_plain<__half>(p, context);
}

}  // namespace fluxkern::cuda
