// Sums over the tokens of a stream: a block sums a span of tokens, which crosses neither a batch
// element nor the border of text and image, to one partial of fp32; partials are added in order.
#pragma once

#include "common.cuh"

namespace fluxkern::cuda {

struct Partials {
    int rows, txt, img;  // tokens of each; how many of a batch element's text and image

    __host__ __device__ int64_t in_all(int64_t B) const {
        return B * (txt + img);
    }
};

// As many partials as keep a GPU busy, about two blocks a multiprocessor.
inline Partials partials_of(const Sizes& sizes, const Context& context) {
    const int64_t wanted = 2 * int64_t(context.multiprocessors);
    const int64_t tokens = sizes.B * sizes.L;
    const int64_t rows = tokens > wanted ? (tokens + wanted - 1) / wanted : 1;
    const int64_t txt = (sizes.txt_len + rows - 1) / rows;
    const int64_t img = (sizes.L - sizes.txt_len + rows - 1) / rows;
    return {int(rows), int(txt), int(img)};
}

struct Span {  // the tokens of a partial
    int64_t b;
    int first, end;
    bool txt;
};

__device__ inline Span span_of(unsigned i, const Partials& partials, const Sizes& sizes) {
    const unsigned each = unsigned(partials.txt + partials.img);
    const int64_t b = i / each;
    const int s = i % each, length = int(sizes.L), txt_len = int(sizes.txt_len);
    const bool txt = s < partials.txt;
    const int first = txt ? s * partials.rows : txt_len + (s - partials.txt) * partials.rows;
    return {b, first, min(first + partials.rows, txt ? txt_len : length), txt};
}

__device__ inline Span span_of_block(const Partials& partials, const Sizes& sizes) {
    return span_of(blockIdx.x, partials, sizes);
}

// Inside a loop: the compiler may not keep what follows from b in registers of its own.
__device__ inline int64_t not_hoisted(int64_t b) {
    asm volatile("" : "+l"(b));
    return b;
}

// N sums a column, [N, C] of this block: in registers, or without VECTORS in scratch memory.
template <class T, int VECTORS, int N>
struct Sums {
    float* const partial;  // [N, C]
    Vec registers[N][VECTORS > 0 ? VECTORS : 1];

    __device__ Sums(const Share<T, VECTORS>& share, float* scratch)
        : partial(scratch + int64_t(blockIdx.x) * N * share.C), registers{} {
        if constexpr (VECTORS == 0) {
            for (int n = 0; n < N; ++n) {
                share.each_tile([&](int tile) { share.store(at(share, n), tile, Vec{}); });
            }
        }
    }
    __device__ float* at(const Share<T, VECTORS>& share, int n) const {
        return partial + int64_t(n) * share.C;
    }
    __device__ void add(const Share<T, VECTORS>& share, int n, int tile, const Vec& v) {
        Vec sum = {};
        if constexpr (VECTORS > 0) sum = registers[n][tile];
        if constexpr (VECTORS == 0) sum = share.load(at(share, n), tile);
        for (int i = 0; i < WIDTH; ++i) sum[i] += v[i];
        if constexpr (VECTORS > 0) registers[n][tile] = sum;
        if constexpr (VECTORS == 0) share.store(at(share, n), tile, sum);
    }
    __device__ void write(const Share<T, VECTORS>& share) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if constexpr (VECTORS > 0) {
                share.each_tile([&](int i) { share.store(at(share, n), i, registers[n][i]); });
            }
        }
    }
};

template <int N>
struct StreamGradients {  // without data: not asked for
    Rows txt[N], img[N];
};

constexpr int SUM_COLUMNS = WARP, SUM_SLICES = 8;

struct SumStorage {
    float slices[SUM_SLICES][SUM_COLUMNS];
};

// Adds the partials of a stream and vector of `batches` elements; SUM_SLICES threads a column.
template <class T, int N>
__global__ void __launch_bounds__(SUM_COLUMNS * SUM_SLICES, 4)
    sum_partials_kernel(const float* scratch, Partials partials, StreamGradients<N> out,
                        int batches, int C) {
    const unsigned tiles = (unsigned(C) + SUM_COLUMNS - 1) / SUM_COLUMNS;
    const int64_t b = blockIdx.x / (tiles * 2 * N);
    const int which = blockIdx.x / tiles % (2 * N), n = which % N;
    const bool txt = which < N;
    const int column = blockIdx.x % tiles * SUM_COLUMNS + threadIdx.x % SUM_COLUMNS;
    const int slice = threadIdx.x / SUM_COLUMNS;
    const int each = txt ? partials.txt : partials.img, first = txt ? 0 : partials.txt;
    const float* partial = scratch + int64_t(n) * C + column;
    float sum = 0;
#pragma unroll 4
    for (int i = slice; i < batches * each && column < C; i += SUM_SLICES) {
        const int64_t element = b * batches + i / each, at = first + i % each;
        sum += partial[(element * (partials.txt + partials.img) + at) * N * C];
    }
    SumStorage& storage = shared<SumStorage>();
    storage.slices[slice][threadIdx.x % SUM_COLUMNS] = sum;
    __syncthreads();
    Rows rows = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i == n) rows = txt ? out.txt[i] : out.img[i];
    }
    if (slice != 0 || column >= C || rows.data == nullptr) return;
    sum = 0;
    for (int i = 0; i < SUM_SLICES; ++i) sum += storage.slices[i][threadIdx.x];
    row_of<T>(rows, b)[column] = T(sum);
}

// `rows` outputs, each of B / rows batch elements
template <class T, int N>
cudaError_t sum_partials(const Context& context, const float* scratch, const Partials& partials,
                         const StreamGradients<N>& out, int64_t B, int64_t rows, int64_t C) {
    const int64_t tiles = (C + SUM_COLUMNS - 1) / SUM_COLUMNS;
    return launch(context, sum_partials_kernel<T, N>, rows * 2 * N * tiles,
                  SUM_COLUMNS * SUM_SLICES, sizeof(SumStorage), scratch, partials, out,
                  rows ? int(B / rows) : 0, int(C));
}

// The gradients of vectors [B, S, C]; one row of all tokens is that of the image.
template <class T, int N>
cudaError_t sum_partials(const Context& context, const float* scratch, const Partials& partials,
                         const Vectors (&out)[N], const Sizes& sizes) {
    StreamGradients<N> gradients = {};
    for (int n = 0; n < N; ++n) {
        const Vectors& d = out[n];
        if (d.stride_s != 0) gradients.txt[n] = {d.data, d.stride_b};
        gradients.img[n] = {static_cast<T*>(d.data) + d.stride_s, d.stride_b};
    }
    return sum_partials<T>(context, scratch, partials, gradients, sizes.B, sizes.B, sizes.C);
}

}  // namespace fluxkern::cuda
