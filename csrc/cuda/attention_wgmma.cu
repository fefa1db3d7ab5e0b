// softmax(q k^T / sqrt(D)) v and its log-sum-exp on Hopper: tiles by TMA, products by wgmma.
// Grid: a block a tile of 128 queries of a head; a warpgroup that loads, two with 64 queries each.
// Bytes: 4 B L H D elements; k and v of a head once a tile, from L2; with norm, 4 more of q and k.
// Accumulation: fp32 softmax and sums, tile by tile of keys; p rounded for the second product.
// Limits: sm_90a; bf16, fp16; D of 8, 16, ... 128; strides and pointers of 16 bytes; L, M < 2^31.
#include "attention.cuh"
#include "tensor_map.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int QUERIES = 128, KEYS = 128;  // of a tile
constexpr int CONSUMERS = 2, THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

static_assert((PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) * WARPGROUP <= 1 << 16);

constexpr int stages_of(int D) {
    return D == 64 ? 4 : 2;
}

template <int D>
struct Storage {
    static constexpr int STAGES = stages_of(D);
    Panels<QUERIES, D> q;
    Panels<KEYS, D> k[STAGES], v[STAGES];
    Barrier q_full, k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];

    __device__ void start_barriers() {
        start(q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            start(k_full[i], 1);
            start(v_full[i], 1);
            start(k_empty[i], CONSUMERS * WARPGROUP / WARP);
            start(v_empty[i], CONSUMERS * WARPGROUP / WARP);
        }
        show_barriers();
    }
};

struct Maps {
    CUtensorMap q, k, v;
};

template <int STAGES>
struct Place {  // in a ring of stages
    int stage = 0;
    unsigned parity = 0;

    __device__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

template <int D>
__device__ void produce(Storage<D>& memory, const Maps& maps, const Tile& at, int keys) {
    const int h = int(at.h), b = int(at.b);
    load(memory.q, maps.q, int(at.first), h, b, memory.q_full);
    Place<Storage<D>::STAGES> place;
    for (int key = 0; key < keys; key += KEYS, place.advance()) {
        wait_for(memory.k_empty[place.stage], place.parity ^ 1);
        load(memory.k[place.stage], maps.k, key, h, b, memory.k_full[place.stage]);
        wait_for(memory.v_empty[place.stage], place.parity ^ 1);
        load(memory.v[place.stage], maps.v, key, h, b, memory.v_full[place.stage]);
    }
}

// 64 queries of a warpgroup, 16 of a warp, of which a lane holds two rows.
template <class T, int D>
struct Consumer {
    static constexpr int OWN = QUERIES / CONSUMERS;
    static constexpr int TURN = 1, ROWS_READ = TURN + CONSUMERS;  // named barriers, one a warpgroup
    static constexpr float SLACK = 8;  // powers of 2 that a score may exceed its top

    Storage<D>& memory;
    const float factor;
    const int group, lane = threadIdx.x % WARP;
    float out[D / 2], scores[KEYS / 2], top[2], sum[2], less[2];
    uint32_t p[KEYS / 4];

    __device__ Consumer(Storage<D>& memory, float factor, int group)
        : memory(memory), factor(factor), group(group) {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] = 0;
        for (int row = 0; row < 2; ++row) top[row] = -INFINITY, sum[row] = 0;
    }

    __device__ void release(Barrier& empty) const {  // by a warp
        if (lane == 0) arrive(empty);
    }

    // scores = q k^T, on its way
    __device__ void start_scores(const Panels<KEYS, D>& k) {
        const uint64_t queries =
            matrix_at(address_of(memory.q.chunks[0][group * OWN]), 0, ATOM_ROWS * ATOM_ROW);
        const uint64_t keys = matrix_at(address_of(k.chunks), 0, ATOM_ROWS * ATOM_ROW);
#pragma unroll
        for (int d = 0; d < D; d += 16) {
            const int panel = d / ACROSS_ATOM, within = d % ACROSS_ATOM * 2;
            multiply<T>(scores, queries + ((panel * QUERIES * ATOM_ROW + within) >> 4),
                        keys + ((panel * KEYS * ATOM_ROW + within) >> 4), d > 0);
        }
        end_products();
    }

    // out += p v, on its way; two columns of 8 scores are one of 16 of this product
    __device__ void start_sums(const Panels<KEYS, D>& v) {
        const uint64_t values =
            matrix_at(address_of(v.chunks), KEYS * ATOM_ROW, ATOM_ROWS * ATOM_ROW);
#pragma unroll
        for (int key = 0; key < KEYS; key += 16) {
            multiply_transposed<T>(out, p + key / 4, values + (key * ATOM_ROW >> 4));
        }
        end_products();
    }

    __device__ void scores_settled() {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) settled(scores[i]);
    }

    __device__ void sums_settled() {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) settled(out[i]);
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) settled(p[i]);
    }

    // Scores of keys that are not there, of which only `keys` are.
    __device__ void mask(int keys) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
            const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (column >= keys) scores[i] = -INFINITY;
        }
    }

    __device__ float largest(int row) const {  // in all its lanes
        float most = -INFINITY;
#pragma unroll
        for (int i = 2 * row; i < KEYS / 2; i += 4) {
            most = fmaxf(most, fmaxf(scores[i], scores[i + 1]));
        }
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
        return fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    }

    // Tops follow their rows when one has grown by more than the slack; whether out has to follow.
    __device__ bool raise() {
        float most[2];
        bool grown = false;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            most[row] = fmaxf(top[row], largest(row));
            grown |= (most[row] - top[row]) * factor > SLACK;
        }
        if (!any_lane(grown)) return false;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            less[row] = exp2_estimate(top[row] * factor - base_of(most[row], factor));
            top[row] = most[row];
            sum[row] *= less[row];
        }
        return true;
    }

    // scores = exp(scores - top)
    __device__ void exponentiate() {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float base = base_of(top[row], factor);
#pragma unroll
            for (int i = 2 * row; i < KEYS / 2; i += 4) {
                scores[i] = exp2_estimate(scores[i] * factor - base);
                scores[i + 1] = exp2_estimate(scores[i + 1] * factor - base);
                sum[row] += scores[i] + scores[i + 1];
            }
        }
    }

    __device__ void round_scores() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) p[i] = pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
    }

    __device__ void scale_sums() {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] *= less[i / 2 % 2];
    }

    // All keys. The other warpgroup's products run while this one works out its exponentials, and
    // this one's sums of the tile before.
    __device__ void consume(int keys) {
        Place<Storage<D>::STAGES> k, v;
        wait_for(memory.q_full, 0);
        wait_for(memory.k_full[0], 0);
        begin_products();
        start_scores(memory.k[0]);
        wait_for_products<0>();
        scores_settled();
        release(memory.k_empty[0]);
        k.advance();
        if (keys < KEYS) mask(keys);
        raise();
        exponentiate();
        round_scores();
        if (group == 1 && keys > KEYS) announce(TURN, CONSUMERS * WARPGROUP);
#pragma unroll 1
        for (int left = keys - KEYS; left > 0; left -= KEYS, k.advance(), v.advance()) {
            wait_for(memory.k_full[k.stage], k.parity);
            meet(TURN + group, CONSUMERS * WARPGROUP);
            begin_products();
            start_scores(memory.k[k.stage]);
            wait_for(memory.v_full[v.stage], v.parity);
            begin_products();
            start_sums(memory.v[v.stage]);
            if (group == 0 || left > KEYS) announce(TURN + 1 - group, CONSUMERS * WARPGROUP);
            wait_for_products<1>();
            scores_settled();
            release(memory.k_empty[k.stage]);
            if (left < KEYS) mask(left);
            const bool grown = raise();
            exponentiate();
            wait_for_products<0>();
            sums_settled();
            release(memory.v_empty[v.stage]);
            if (grown) scale_sums();
            round_scores();
        }
        wait_for(memory.v_full[v.stage], v.parity);
        begin_products();
        start_sums(memory.v[v.stage]);
        wait_for_products<0>();
        sums_settled();
    }

    // Through the rows of q, which all of the warpgroup have read, so that stores are wide.
    __device__ void write(const Problem& problem, const Tile& at) {
        const int first = group * OWN + threadIdx.x % WARPGROUP / WARP * 16;
        meet(ROWS_READ + group, WARPGROUP);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float total = sum[row] + __shfl_xor_sync(0xffffffff, sum[row], 1);
            total += __shfl_xor_sync(0xffffffff, total, 2);
            const float inverse = inverse_of(total);
            const int at_row = first + 8 * row + lane / 4;
            if (lane % 4 == 0) write_lse(problem, at, at.first + at_row, top[row], total);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float* pair = &out[4 * n + 2 * row];
                memory.q.chunk_at(at_row, n).words[lane % 4] =
                    pack_pair<T>(pair[0] * inverse, pair[1] * inverse);
            }
        }
        __syncwarp();
        constexpr int ACROSS = D / WIDTH;
#pragma unroll 4
        for (int row = first + lane / ACROSS; row < first + 16; row += WARP / ACROSS) {
            const int64_t l = at.first + row;
            const int column = lane % ACROSS;
            if (l >= problem.sizes.L || column * WIDTH >= problem.sizes.D) continue;
            T* const to = head_of<T>(problem.out, at.b, l, at.h) + column * WIDTH;
            *reinterpret_cast<Chunk*>(to) = memory.q.chunk_at(row, column);
        }
    }
};

template <class T, int D>
__device__ void attend(const Problem& p, const Maps& maps, unsigned tiles) {
    Storage<D>& memory = atoms<Storage<D>>();
    const Tile at = place_of(blockIdx.x, tiles, QUERIES, p.sizes);
    if (threadIdx.x == 0) memory.start_barriers();
    __syncthreads();
    const int group = __shfl_sync(0xffffffff, int(threadIdx.x) / WARPGROUP, 0);  // uniform
    if (group == 0) {
        give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(memory, maps, at, int(p.sizes.M));
        return;
    }
    take_registers<CONSUMER_REGISTERS>();
    Consumer<T, D> consumer(memory, p.factor, group - 1);
    consumer.consume(int(p.sizes.M));
    consumer.write(p, at);
}

template <class T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    attention_wgmma_kernel(const Problem p, const __grid_constant__ Maps maps, unsigned tiles) {
    if constexpr (HOPPER) attend<T, D>(p, maps, tiles);
    if constexpr (!HOPPER) __trap();
}

// launches

template <class T, int D>
cudaError_t launch_wgmma(DType dtype, const Problem& p, const Context& context) {
    const auto kernel = attention_wgmma_kernel<T, D>;
    const int bytes = sizeof(Storage<D>);
    static_assert(sizeof(Storage<D>) <= 227 << 10);
    const AttentionSizes& s = p.sizes;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    Maps maps;
    const Encoder encode;
    error = encode.error;
    if (error == cudaSuccess) error = encode(maps.q, dtype, p.q, s, s.L, QUERIES);
    if (error == cudaSuccess) error = encode(maps.k, dtype, p.k, s, s.M, KEYS);
    if (error == cudaSuccess) error = encode(maps.v, dtype, p.v, s, s.M, KEYS);
    if (error != cudaSuccess) return error;
    const int64_t tiles = (s.L + QUERIES - 1) / QUERIES;
    return launch(context, kernel, s.B * s.H * tiles, THREADS, bytes, p, maps, unsigned(tiles));
}

template <class T>
cudaError_t launch_wgmma(DType dtype, const Problem& p, const Context& context) {
    return p.sizes.D <= 64 ? launch_wgmma<T, 64>(dtype, p, context)
                           : launch_wgmma<T, 128>(dtype, p, context);
}

bool takes(DType dtype, const AttentionSizes& s) {
    return dtype != DType::f32 && s.D % WIDTH == 0 && s.D > 0 && s.D <= 128 && s.M > 0 &&
           s.L <= INT32_MAX - QUERIES && s.M <= INT32_MAX - KEYS;
}

}  // namespace

cudaError_t attention_wgmma(DType dtype, Heads q, Heads k, Heads v, const void* q_weight,
                            const void* k_weight, Angles cos, Angles sin, Heads out, float* lse,
                            const AttentionSizes& sizes, float eps, float* scratch,
                            const Context& context) {
    if (sizes.B == 0 || sizes.L == 0 || sizes.H == 0) return cudaSuccess;
    const float root = std::sqrt(float(sizes.D));
    Problem p = {q, k, v, out, lse, sizes, {q_weight, cos, sin, eps}, 1 / root, LOG2_E / root};
    const bool normed = q_weight != nullptr;
    const bool loads = has_map(dtype, v, sizes, sizes.M) &&
                       (normed || (has_map(dtype, q, sizes, sizes.L) &&
                                   has_map(dtype, k, sizes, sizes.M)));
    if (!takes(dtype, sizes) || !loads || !aligned(dtype, out)) return cudaErrorNotSupported;
    if (normed) {
        const cudaError_t error = norm_ahead(dtype, p, k_weight, true, scratch, context);
        if (error != cudaSuccess) return error;
    }
    return dtype == DType::bf16 ? launch_wgmma<__nv_bfloat16>(dtype, p, context)
                                : launch_wgmma<__half>(dtype, p, context);
}

}  // namespace fluxkern::cuda
