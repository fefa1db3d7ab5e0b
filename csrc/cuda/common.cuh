// What the kernels share: how a block shares out a row, 128-bit accesses, sums in a fixed order,
// launches. Offsets are 64 bits wide from the first product on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "kernels.h"

namespace fluxkern::cuda {

constexpr int WIDTH = 8;  // elements moved at once: 16 bytes of bf16 or fp16, twice 16 of fp32
constexpr int WARP = 32;

// elements

template <class T>
struct Pair;
template <>
struct Pair<float> {
    using type = float2;
};
template <>
struct Pair<__nv_bfloat16> {
    using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
    using type = __half2;
};

__device__ inline float2 widen(float2 v) {
    return v;
}
__device__ inline float2 widen(__nv_bfloat162 v) {
    return __bfloat1622float2(v);
}
__device__ inline float2 widen(__half2 v) {
    return __half22float2(v);
}
__device__ inline void narrow(float2& out, float a, float b) {
    out = make_float2(a, b);
}
__device__ inline void narrow(__nv_bfloat162& out, float a, float b) {
    out = __floats2bfloat162_rn(a, b);
}
__device__ inline void narrow(__half2& out, float a, float b) {
    out = __floats2half2_rn(a, b);
}

struct Vec {
    float v[WIDTH];

    __device__ float& operator[](int i) {
        return v[i];
    }
    __device__ float operator[](int i) const {
        return v[i];
    }
};

template <class T>
struct Packed {  // a Vec in memory
    static constexpr int CHUNKS = WIDTH * sizeof(T) / 16;
    typename Pair<T>::type pairs[WIDTH / 2];
};

template <class T>
__device__ Vec unpack(const Packed<T>& packed) {
    Vec out;
    for (int i = 0; i < WIDTH / 2; ++i) {
        const float2 pair = widen(packed.pairs[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
    return out;
}

template <class T>
__device__ Packed<T> pack(const Vec& v) {
    Packed<T> packed;
    for (int i = 0; i < WIDTH / 2; ++i) narrow(packed.pairs[i], v[2 * i], v[2 * i + 1]);
    return packed;
}

// What one instruction moves; of any type, so that a compiler for CPUs takes it for all of them.
struct [[gnu::may_alias]] alignas(16) Chunk {
    uint32_t words[4];
};

// p lies at a multiple of 16 bytes
template <class T>
__device__ Packed<T> load_packed(const T* p) {
    Chunk chunks[Packed<T>::CHUNKS];
#pragma unroll
    for (int i = 0; i < Packed<T>::CHUNKS; ++i) chunks[i] = reinterpret_cast<const Chunk*>(p)[i];
    Packed<T> packed;
    memcpy(static_cast<void*>(&packed), chunks, sizeof(packed));
    return packed;
}

template <class T>
__device__ void store_packed(T* p, const Packed<T>& packed) {
    Chunk chunks[Packed<T>::CHUNKS];
    memcpy(chunks, static_cast<const void*>(&packed), sizeof(packed));
#pragma unroll
    for (int i = 0; i < Packed<T>::CHUNKS; ++i) reinterpret_cast<Chunk*>(p)[i] = chunks[i];
}

// rows

// How a block shares out a row of C. VECTORS > 0: that many vectors a thread, SIDE of them side by
// side, 128 bits an access. VECTORS = 0: any C and alignment, as many tiles as it takes, element by
// element.
template <class T, int VECTORS, int SIDE = 1>
struct Share {
    int C;

    __device__ int tiles() const {
        return (C + WIDTH * int(blockDim.x) - 1) / (WIDTH * int(blockDim.x));
    }
    __device__ int column(int tile, int i) const {
        const int step = blockDim.x, thread = threadIdx.x;
        if constexpr (VECTORS > 0) {
            return ((tile / SIDE * step + thread) * SIDE + tile % SIDE) * WIDTH + i;
        }
        return (tile * WIDTH + i) * step + thread;
    }
    __device__ bool has(int tile, int i) const {
        return column(tile, VECTORS > 0 ? 0 : i) < C;
    }
    template <class Body>
    __device__ void each_tile(Body body) const {
        if constexpr (VECTORS > 0) {
#pragma unroll
            for (int tile = 0; tile < VECTORS; ++tile) body(tile);
        } else {
#pragma unroll 1
            for (int tile = 0; tile < tiles(); ++tile) body(tile);
        }
    }
    template <class Element>
    __device__ Packed<Element> load_whole(const Element* row, int tile) const {
        return has(tile, 0) ? load_packed(row + column(tile, 0)) : Packed<Element>{};
    }
    template <class Element>
    __device__ Vec load(const Element* row, int tile) const {  // zeros behind the end
        Vec out = {};
        if constexpr (VECTORS > 0) {
            out = unpack(load_whole(row, tile));
        } else {
            for (int i = 0; i < WIDTH; ++i) {
                if (has(tile, i)) out[i] = float(row[column(tile, i)]);
            }
        }
        return out;
    }
    template <class Element>
    __device__ void store(Element* row, int tile, const Vec& v) const {
        if constexpr (VECTORS > 0) {
            if (has(tile, 0)) store_packed(row + column(tile, 0), pack<Element>(v));
        } else {
            for (int i = 0; i < WIDTH; ++i) {
                if (has(tile, i)) row[column(tile, i)] = Element(v[i]);
            }
        }
    }
};

struct Place {  // of a token
    int64_t b, l;
    bool txt;
};

// One block a token: both divisions fit 32 bits because a grid does.
__device__ inline Place place_of_block(const Sizes& sizes) {
    const unsigned row = blockIdx.x, length = unsigned(sizes.L);
    const int64_t b = row / length, l = row % length;
    return {b, l, l < sizes.txt_len};
}

template <class T>
__device__ T* row_of(const Tokens& x, int64_t b, int64_t l) {
    return static_cast<T*>(x.data) + b * x.stride_b + l * x.stride_l;
}

template <class T>
__device__ T* row_of(const Rows& x, int64_t b) {
    return static_cast<T*>(x.data) + b * x.stride_b;
}

template <class T>
__device__ T* row_of(const Vectors& x, int64_t b, bool txt) {
    return static_cast<T*>(x.data) + b * x.stride_b + (txt ? 0 : x.stride_s);
}

// sums

// Shared memory: one struct a kernel, of the size given at the launch.
#ifdef FLUXKERN_EMULATOR
template <class Storage>
Storage& shared() {
    return *static_cast<Storage*>(emulator::self().shared);
}
#else
template <class Storage>
__device__ Storage& shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return *reinterpret_cast<Storage*>(memory);
}
#endif

__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffff, v, bits);
    return v;
}

// Each of N values summed over the block, the same bits in every thread. The slots, a float a warp,
// must not be those of the sum before.
template <int N>
__device__ void block_sum(float (&v)[N], float (&slots)[N][WARP]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        v[n] = warp_sum(v[n]);
        if (lane == 0) slots[n][warp] = v[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
        v[n] = warp_sum(lane < int(blockDim.x) / WARP ? slots[n][lane] : 0.0f);
    }
}

// launches

inline bool at_16_bytes(const void* data, std::initializer_list<int64_t> strides, DType dtype) {
    bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t stride : strides) all &= stride * (dtype == DType::f32 ? 4 : 2) % 16 == 0;
    return all;
}

inline bool at_16_bytes(const Rows& x, DType dtype) {
    return at_16_bytes(x.data, {x.stride_b}, dtype);
}

inline bool at_16_bytes(const Vectors& x, DType dtype) {
    return at_16_bytes(x.data, {x.stride_b, x.stride_s}, dtype);
}

inline bool at_16_bytes(const Tokens& x, DType dtype) {
    return at_16_bytes(x.data, {x.stride_b, x.stride_l}, dtype);
}

inline bool at_16_bytes(const Heads& x, DType dtype) {
    return at_16_bytes(x.data, {x.stride_b, x.stride_l, x.stride_h}, dtype);
}

inline bool at_16_bytes(const void* x, DType dtype) {
    return at_16_bytes(x, {}, dtype);
}

template <class... Views>
bool aligned(DType dtype, const Views&... views) {
    return (at_16_bytes(views, dtype) && ...);
}

struct Plan {  // of a row
    int vectors, threads;
};

constexpr int threads_of(int vectors) {  // at most
    return vectors > 0 ? 384 : 256;
}

inline int whole_warps(int64_t threads) {
    return int((threads + WARP - 1) / WARP * WARP);
}

inline Plan plan_of(int64_t C, bool vectors) {
    for (const int n : {1, 2}) {
        const int64_t threads = (C + WIDTH * n - 1) / (WIDTH * n);
        if (vectors && C % WIDTH == 0 && threads <= threads_of(n)) return {n, whole_warps(threads)};
    }
    const int64_t threads = (C + WIDTH - 1) / WIDTH;
    return {0, whole_warps(threads < threads_of(0) ? threads : threads_of(0))};
}

template <class T, class Launch>
cudaError_t with_vectors(int vectors, Launch launch) {
    if (vectors == 1) return launch.template operator()<T, 1>();
    if (vectors == 2) return launch.template operator()<T, 2>();
    return launch.template operator()<T, 0>();
}

// Calls launch<T, VECTORS>().
template <class Launch>
cudaError_t with_types(DType dtype, int vectors, Launch launch) {
    if (dtype == DType::f32) return with_vectors<float>(vectors, launch);
    if (dtype == DType::bf16) return with_vectors<__nv_bfloat16>(vectors, launch);
    return with_vectors<__half>(vectors, launch);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const Context& context, void (*kernel)(Parameters...), int64_t blocks,
                   int threads, size_t shared_bytes, Arguments&&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = context.stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace fluxkern::cuda
