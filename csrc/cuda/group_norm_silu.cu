// out = silu(z), z = (x - mean) rstd weight + bias, statistics over a group's channels; backward.
// Grid: a block a run of pixels, of one group in planes and of all channels in channels-last; a
// block a group merges the runs; then blocks of 16 vectors a thread.
// Bytes: forward 2 B C P elements, and x once more for the statistics; backward 3, and x, x, dy.
// Accumulation: fp32; tiles in two passes over registers, merged as Chan et al.; in a fixed order.
// Limits: pictures contiguous or channels-last; single elements unless P, or C there, is 8 n.
#include "partials.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int TILE = 4, TILE_OF_TWO = 2;  // vectors that a thread keeps of x, and of x and dy each
constexpr int VECTORS_OF_A_THREAD = 16;   // where nothing is summed
constexpr int64_t WORTH_A_BLOCK = 16384;  // elements

template <class T, int W>
struct Held {  // W elements side by side, as in memory
    Packed<T> packed;

    __device__ void load(const T* p) {
        packed = load_packed(p);
    }
    __device__ Vec values() const {
        return unpack(packed);
    }
    __device__ static void store(T* p, const Vec& v) {
        store_packed(p, pack<T>(v));
    }
};

template <class T>
struct Held<T, 1> {
    T element;

    __device__ void load(const T* p) {
        element = *p;
    }
    __device__ Vec values() const {
        return {{float(element)}};
    }
    __device__ static void store(T* p, const Vec& v) {
        *p = T(v[0]);
    }
};

// parts of a picture

struct Runs {  // of `length` pixels of all channels, or in planes of `length` elements of each row
    int64_t length, each;
    int count;
    int64_t rows, columns, slices;  // rows of a picture; vectors of a block's pixel, blocks a pixel

    __host__ __device__ int64_t blocks(int64_t B) const {
        return B * count * rows * slices;
    }
    __device__ int64_t of(int run) const {
        return min(each, length - run * each);
    }
};

template <int W, bool LAST>
struct Part {  // vectors of a run that one thread takes: `count` from `first` on, each `step` ahead
    int64_t b, first, step;
    int run, row, channel, lane, lanes, count;  // channel: of its first element

    __device__ Part(const Runs& runs, int64_t C) {
        const unsigned block = blockIdx.x, thread = threadIdx.x;
        if constexpr (LAST) {
            const unsigned columns = unsigned(runs.columns), slices = unsigned(runs.slices);
            const unsigned runs_before = block / slices;
            run = int(runs_before % unsigned(runs.count));
            b = runs_before / unsigned(runs.count);
            lane = int(thread / columns);
            lanes = int(THREADS / columns);
            row = 0;
            channel = int((block % slices * columns + thread % columns) * W);
            first = (run * runs.each + lane) * C + channel;
            step = lanes * C;
            count = lane < lanes && channel < C ? pixels_of_lane(runs, lane) : 0;
        } else {
            const unsigned rows = unsigned(runs.rows), rows_before = block / unsigned(runs.count);
            run = int(block % unsigned(runs.count));
            b = rows_before / rows;
            lane = 0;
            lanes = 1;
            row = channel = int(rows_before % rows);
            const int64_t left = runs.of(run) - thread * W;
            first = row * runs.length + run * runs.each + thread * W;
            step = THREADS * W;
            count = left > 0 ? int((left + step - 1) / step) : 0;
        }
    }
    __device__ int pixels_of_lane(const Runs& runs, int lane) const {
        const int left = int(runs.of(run)) - lane;
        return left > 0 ? (left + lanes - 1) / lanes : 0;
    }
};

template <class T>
__device__ T* picture_of(const Images& x, int64_t b) {
    return static_cast<T*>(x.data) + b * x.stride_b;
}

template <int N, class T, int W, bool LAST>
__device__ void read_tile(Held<T, W> (&tile)[N], const T* x, const Part<W, LAST>& part, int done) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        if (done + k < part.count) tile[k].load(x + part.first + (done + k) * part.step);
    }
}

// values(k) -> Vec
template <int N, class T, int W, bool LAST, class Values>
__device__ void write_tile(const Held<T, W> (&)[N], T* out, const Part<W, LAST>& part, int done,
                           Values values) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        if (done + k >= part.count) break;
        Held<T, W>::store(out + part.first + (done + k) * part.step, values(k));
    }
}

// sums over a block

struct Spread {  // two numbers of each thread's channels, a row of channels a lane
    float rows[2][THREADS * WIDTH];
};

struct BlockSlots {  // a float a warp for each sum
    float mean[1][WARP], squares[1][WARP], gradient[2][WARP];
};

template <int W>
__device__ void spread(Spread& storage, const float (&a)[W], const float (&b)[W]) {
#pragma unroll
    for (int i = 0; i < W; ++i) {
        storage.rows[0][threadIdx.x * W + i] = a[i];
        storage.rows[1][threadIdx.x * W + i] = b[i];
    }
    __syncthreads();
}

// body(first channel of the block + i, i) for the channels of a block, a thread each
template <int W, class Body>
__device__ void each_channel(const Runs& runs, int64_t C, Body body) {
    const int width = int(runs.columns) * W;
    const int first = int(blockIdx.x % unsigned(runs.slices)) * width;
#pragma unroll 1
    for (int i = threadIdx.x; i < width && first + i < C; i += THREADS) body(first + i, i);
}

// statistics

template <int N>
struct Moments {  // N means, and squares about each
    float count = 0, mean[N] = {}, squares[N] = {};

    __device__ void merge(float more, const float (&its_mean)[N], const float (&its_squares)[N]) {
        const float share = more / (count + more);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float d = its_mean[n] - mean[n];
            mean[n] += d * share;
            squares[n] += its_squares[n] + d * d * (count * share);
        }
        count += more;
    }
    template <class T>
    __device__ void add(const Held<T, N> (&tile)[TILE], int vectors) {
        const int now = min(vectors, TILE);
        float sum[N] = {}, about[N] = {};
#pragma unroll
        for (int k = 0; k < TILE; ++k) {
            const Vec v = tile[k].values();
            for (int i = 0; i < N; ++i) sum[i] += k < now ? v[i] : 0;
        }
        for (int i = 0; i < N; ++i) sum[i] /= float(now);
#pragma unroll
        for (int k = 0; k < TILE; ++k) {
            const Vec v = tile[k].values();
            for (int i = 0; i < N; ++i) {
                const float d = k < now ? v[i] - sum[i] : 0;
                about[i] += d * d;
            }
        }
        merge(float(now), sum, about);
    }
};

// moments [B, runs, 2, N] of the N groups, or in channels-last of the N = C channels
template <class T, int W, bool LAST>
__global__ void __launch_bounds__(THREADS, 2)
    group_moments_kernel(Images x, Runs runs, int64_t C, float* moments) {
    const Part<W, LAST> part(runs, C);
    const T* picture = picture_of<const T>(x, part.b);
    Moments<W> m;
#pragma unroll 1
    for (int done = 0; done < part.count; done += TILE) {
        Held<T, W> tile[TILE] = {};
        read_tile(tile, picture, part, done);
        m.add(tile, part.count - done);
    }
    const int64_t N = LAST ? C : runs.rows;
    float* means = moments + (part.b * runs.count + part.run) * 2 * N;
    const float in_all = float(runs.of(part.run));
    if constexpr (LAST) {
        Spread& storage = shared<Spread>();
        spread(storage, m.mean, m.squares);
        const int width = int(runs.columns) * W;
        each_channel<W>(runs, C, [&](int c, int i) {
            float mean = 0, squares = 0;
            for (int lane = 0; lane < part.lanes; ++lane) {
                mean += storage.rows[0][lane * width + i] * part.pixels_of_lane(runs, lane);
            }
            mean /= in_all;
            for (int lane = 0; lane < part.lanes; ++lane) {
                const float d = storage.rows[0][lane * width + i] - mean;
                squares += storage.rows[1][lane * width + i];
                squares += d * d * part.pixels_of_lane(runs, lane);
            }
            means[c] = mean;
            means[N + c] = squares;
        });
    } else {
        BlockSlots& slots = shared<BlockSlots>();
        float mean[1] = {}, squares[1] = {};
        for (int i = 0; i < W; ++i) mean[0] += m.mean[i];
        mean[0] *= m.count;
        block_sum(mean, slots.mean);
        mean[0] /= in_all;
        for (int i = 0; i < W; ++i) {
            const float d = m.mean[i] - mean[0];
            squares[0] += m.squares[i] + m.count * d * d;
        }
        block_sum(squares, slots.squares);
        if (threadIdx.x == 0) {
            means[part.row] = mean[0];
            means[N + part.row] = squares[0];
        }
    }
}

struct Groups {
    int64_t C, size, P;  // channels in all and of a group
    int count;
};

// stats [B, 2, C]: mean and 1 / std of a channel's group, out of its runs' moments; a block a group
template <bool LAST>
__global__ void __launch_bounds__(THREADS, 4)
    merge_moments_kernel(const float* moments, Runs runs, Groups groups, float eps, float* stats) {
    const int N = LAST ? int(groups.C) : groups.count, each = LAST ? int(groups.size) : 1;
    const int g = int(blockIdx.x % unsigned(groups.count));
    const int64_t b = blockIdx.x / unsigned(groups.count);
    const float* first = moments + b * runs.count * 2 * N + g * each;
    const float in_all = fmaxf(1, float(groups.size * groups.P));
    BlockSlots& slots = shared<BlockSlots>();
    float mean[1] = {}, squares[1] = {};
#pragma unroll 4
    for (int i = threadIdx.x; i < runs.count * each; i += THREADS) {
        const int run = i / each;
        mean[0] += first[int64_t(run) * 2 * N + i % each] * float(runs.of(run));
    }
    block_sum(mean, slots.mean);
    mean[0] /= in_all;
#pragma unroll 4
    for (int i = threadIdx.x; i < runs.count * each; i += THREADS) {
        const int run = i / each;
        const float* one = first + int64_t(run) * 2 * N + i % each;
        const float d = one[0] - mean[0];
        squares[0] += one[N] + d * d * float(runs.of(run));
    }
    block_sum(squares, slots.squares);
    const float rstd = rsqrtf(squares[0] / in_all + eps);
    float* means = stats + b * 2 * groups.C + g * groups.size;
#pragma unroll 1
    for (int c = threadIdx.x; c < groups.size; c += THREADS) {
        means[c] = mean[0];
        means[groups.C + c] = rstd;
    }
}

// what z takes of a thread's channels

__device__ inline float silu(float z) {
    return z / (1 + expf(-z));
}

__device__ inline float silu_slope(float z) {
    const float t = expf(-fabsf(z)), near = 1 / (1 + t), far = t / (1 + t);
    const float open = z >= 0 ? near : far, shut = z >= 0 ? far : near;
    return open + (shut == 0 ? 0 : z * open * shut);
}

template <int W, bool LAST>
struct PerChannel {  // a number each of W channels, or of the one that all elements are of
    Vec v;

    template <class E>
    __device__ PerChannel(const E* table, int channel) {
        if constexpr (LAST) {
            Held<E, W> held;
            held.load(table + channel);
            v = held.values();
        } else {
            v[0] = float(table[channel]);
        }
    }
    __device__ float operator[](int i) const {
        return v[LAST ? i : 0];
    }
};

template <int W, bool LAST>
struct Affine {
    const PerChannel<W, LAST> mean, rstd, weight, bias;

    template <class T>
    __device__ Affine(const T* weight, const T* bias, const float* stats, int64_t b, int64_t C,
                      int channel)
        : mean(stats + b * 2 * C, channel),
          rstd(stats + (b * 2 + 1) * C, channel),
          weight(weight, channel),
          bias(bias, channel) {}

    __device__ float n(float x, int i) const {
        return (x - mean[i]) * rstd[i];
    }
    __device__ float z(float n, int i) const {
        return n * weight[i] + bias[i];
    }
};

template <class T, int W, bool LAST>
__global__ void __launch_bounds__(THREADS, LAST ? 2 : 3)
    group_norm_silu_kernel(Images x, const T* weight, const T* bias, const float* stats, Images out,
                           Runs runs, int64_t C) {
    const Part<W, LAST> part(runs, C);
    if (part.count == 0) return;
    const Affine<W, LAST> affine(weight, bias, stats, part.b, C, part.channel);
    const T* picture = picture_of<const T>(x, part.b);
#pragma unroll 1
    for (int done = 0; done < part.count; done += TILE) {
        Held<T, W> tile[TILE];
        read_tile(tile, picture, part, done);
        write_tile(tile, picture_of<T>(out, part.b), part, done, [&](int k) {
            Vec v = tile[k].values();
            for (int i = 0; i < W; ++i) v[i] = silu(affine.z(affine.n(v[i], i), i));
            return v;
        });
    }
}

// backward

// partial [B, runs, 2, C]: sums of dz n and dz over the pixels of a run
template <class T, int W, bool LAST>
__global__ void __launch_bounds__(THREADS, 2)
    group_gradients_kernel(Images dy, Images x, const T* weight, const T* bias, const float* stats,
                           float* partial, Runs runs, int64_t C) {
    const Part<W, LAST> part(runs, C);
    const T* picture = picture_of<const T>(x, part.b);
    const T* gradient = picture_of<const T>(dy, part.b);
    float sums[2][W] = {};
    if (part.count > 0) {
        const Affine<W, LAST> affine(weight, bias, stats, part.b, C, part.channel);
#pragma unroll 1
        for (int done = 0; done < part.count; done += TILE_OF_TWO) {
            Held<T, W> x_tile[TILE_OF_TWO] = {}, dy_tile[TILE_OF_TWO] = {};
            read_tile(x_tile, picture, part, done);
            read_tile(dy_tile, gradient, part, done);
#pragma unroll
            for (int k = 0; k < TILE_OF_TWO; ++k) {
                const Vec v = x_tile[k].values(), g = dy_tile[k].values();
                for (int i = 0; i < W; ++i) {
                    const float n = affine.n(v[i], i);
                    const float dz = done + k < part.count ? g[i] * silu_slope(affine.z(n, i)) : 0;
                    sums[0][i] += dz == 0 ? 0 : dz * n;
                    sums[1][i] += dz;
                }
            }
        }
    }
    float* out = partial + (part.b * runs.count + part.run) * 2 * C;
    if constexpr (LAST) {
        Spread& storage = shared<Spread>();
        spread(storage, sums[0], sums[1]);
        const int width = int(runs.columns) * W;
        each_channel<W>(runs, C, [&](int c, int i) {
            for (int which = 0; which < 2; ++which) {
                float sum = 0;
                for (int l = 0; l < part.lanes; ++l) sum += storage.rows[which][l * width + i];
                out[which * C + c] = sum;
            }
        });
    } else {
        float of_channel[2] = {};
        for (int i = 0; i < 2 * W; ++i) of_channel[i / W] += sums[i / W][i % W];
        block_sum(of_channel, shared<BlockSlots>().gradient);
        if (threadIdx.x == 0) {
            out[part.row] = of_channel[0];
            out[C + part.row] = of_channel[1];
        }
    }
}

// totals [B, 2, C] of the runs, and means [B, 2, C] over its group of dn n and dn = dz weight; a
// block a group, a warp a channel at a time
template <class T>
__global__ void __launch_bounds__(THREADS, 4)
    group_means_kernel(const float* partial, const T* weight, float* totals, float* means, int runs,
                       Groups groups) {
    const int64_t b = blockIdx.x / unsigned(groups.count), C = groups.C;
    const int first = int(blockIdx.x % unsigned(groups.count) * groups.size);
    const int lane = threadIdx.x % WARP;
    float dn[2] = {};
#pragma unroll 1
    for (int i = threadIdx.x / WARP; i < groups.size; i += THREADS / WARP) {
        float sums[2] = {};
#pragma unroll 4
        for (int run = lane; run < runs; run += WARP) {
            const float* one = partial + (b * runs + run) * 2 * C + first + i;
            sums[0] += one[0];
            sums[1] += one[C];
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const float total = warp_sum(sums[which]);
            if (lane != 0) continue;
            totals[(b * 2 + which) * C + first + i] = total;
            dn[which] += total * float(weight[first + i]);
        }
    }
    block_sum(dn, shared<BlockSlots>().gradient);
    const float in_all = fmaxf(1, float(groups.size * groups.P));
#pragma unroll 1
    for (int i = threadIdx.x; i < groups.size; i += THREADS) {
        means[b * 2 * C + first + i] = dn[0] / in_all;
        means[(b * 2 + 1) * C + first + i] = dn[1] / in_all;
    }
}

template <class T, int W, bool LAST>
__global__ void __launch_bounds__(THREADS, 2)
    group_norm_silu_backward_kernel(Images dy, Images x, const T* weight, const T* bias,
                                    const float* stats, const float* means, Images dx, Runs runs,
                                    int64_t C) {
    const Part<W, LAST> part(runs, C);
    if (part.count == 0) return;
    const Affine<W, LAST> affine(weight, bias, stats, part.b, C, part.channel);
    const PerChannel<W, LAST> mean_dn_n(means + part.b * 2 * C, part.channel);
    const PerChannel<W, LAST> mean_dn(means + (part.b * 2 + 1) * C, part.channel);
    const T* picture = picture_of<const T>(x, part.b);
    const T* gradient = picture_of<const T>(dy, part.b);
#pragma unroll 1
    for (int done = 0; done < part.count; done += TILE_OF_TWO) {
        Held<T, W> x_tile[TILE_OF_TWO], dy_tile[TILE_OF_TWO];
        read_tile(x_tile, picture, part, done);
        read_tile(dy_tile, gradient, part, done);
        write_tile(x_tile, picture_of<T>(dx, part.b), part, done, [&](int k) {
            Vec v = x_tile[k].values();
            const Vec g = dy_tile[k].values();
            for (int i = 0; i < W; ++i) {
                const float n = affine.n(v[i], i);
                const float dn = g[i] * silu_slope(affine.z(n, i)) * affine.weight[i];
                v[i] = affine.rstd[i] * (dn - mean_dn[i] - n * mean_dn_n[i]);
            }
            return v;
        });
    }
}

// launches

int64_t divided(int64_t a, int64_t b) {  // rounded up
    return (a + b - 1) / b;
}

// Over the pixels of all channels, or in planes over each of `rows` a picture.
Runs runs_over(const ImageSizes& sizes, int64_t rows, int W) {
    if (!sizes.channels_last) return {rows ? sizes.C / rows * sizes.P : 0, 0, 0, rows, 1, 1};
    const int64_t columns = sizes.C / W < THREADS ? sizes.C / W : THREADS;
    return {sizes.P, 0, 0, 1, columns, divided(sizes.C / W, columns)};
}

// About four a multiprocessor, whatever W.
Runs runs_to_sum(const ImageSizes& sizes, int64_t rows, int W, const Context& context) {
    Runs runs = runs_over(sizes, rows, W);
    const int64_t others = sizes.B * runs.rows, wanted = 4 * int64_t(context.multiprocessors);
    const int64_t of_each = others ? divided(wanted, others) : 1;
    const int64_t pixel = sizes.channels_last && sizes.C < WORTH_A_BLOCK ? sizes.C : 1;
    const int64_t grain = WORTH_A_BLOCK / pixel, grains = divided(runs.length, grain);
    runs.each = grain * (grains > of_each ? divided(grains, of_each) : 1);
    runs.count = int(divided(runs.length, runs.each));
    return runs;
}

Runs runs_to_write(const ImageSizes& sizes, int W) {
    Runs runs = runs_over(sizes, sizes.C, W);
    runs.each = VECTORS_OF_A_THREAD * (sizes.channels_last ? THREADS / runs.columns : THREADS * W);
    runs.count = int(divided(runs.length, runs.each));
    return runs;
}

struct Scratch {  // in floats
    int64_t row, moments, partial;  // [B, 2, C], of the runs

    Scratch(const ImageSizes& sizes, const Context& context) {
        const Runs groups = runs_to_sum(sizes, sizes.groups, 1, context);
        const Runs channels = runs_to_sum(sizes, sizes.C, 1, context);
        row = sizes.B * 2 * sizes.C;
        moments = sizes.B * 2 * groups.count * (sizes.channels_last ? sizes.C : sizes.groups);
        partial = row * channels.count;
    }
};

Groups groups_of(const ImageSizes& sizes) {
    return {sizes.C, sizes.C / sizes.groups, sizes.P, int(sizes.groups)};
}

template <class Launch>
cudaError_t with_layout(DType dtype, const ImageSizes& sizes, bool vectors, Launch launch) {
    return with_types(dtype, vectors, [&]<class T, int VECTORS>() {
        if constexpr (VECTORS == 2) return cudaErrorInvalidValue;
        if constexpr (VECTORS < 2) {
            constexpr int W = VECTORS ? WIDTH : 1;
            if (sizes.channels_last) return launch.template operator()<T, W, true>();
            return launch.template operator()<T, W, false>();
        }
    });
}

bool in_vectors(DType dtype, const ImageSizes& sizes, const void* weight, const void* bias) {
    if (!sizes.channels_last) return sizes.P % WIDTH == 0;
    return sizes.C % WIDTH == 0 && aligned(dtype, weight, bias);
}

bool at_16_bytes(const Images& x, DType dtype) {
    return cuda::at_16_bytes(x.data, {x.stride_b}, dtype);
}

template <class T, int W, bool LAST>
cudaError_t statistics(const Images& x, const ImageSizes& sizes, float eps, float* moments,
                       float* stats, const Context& context) {
    const Runs runs = runs_to_sum(sizes, sizes.groups, W, context);
    const size_t bytes = LAST ? sizeof(Spread) : sizeof(BlockSlots);
    const cudaError_t error = launch(context, group_moments_kernel<T, W, LAST>,
                                     runs.blocks(sizes.B), THREADS, bytes, x, runs, sizes.C,
                                     moments);
    if (error != cudaSuccess) return error;
    return launch(context, merge_moments_kernel<LAST>, sizes.B * sizes.groups, THREADS,
                  sizeof(BlockSlots), moments, runs, groups_of(sizes), eps, stats);
}

}  // namespace

int64_t group_norm_silu_scratch(const ImageSizes& sizes, const Context& context) {
    const Scratch scratch(sizes, context);
    return scratch.row + scratch.moments;
}

int64_t group_norm_silu_backward_scratch(const ImageSizes& sizes, const Context& context) {
    const Scratch scratch(sizes, context);
    return 3 * scratch.row + scratch.moments + scratch.partial;
}

cudaError_t group_norm_silu(DType dtype, Images x, const void* weight, const void* bias, Images out,
                            const ImageSizes& sizes, float eps, float* scratch,
                            const Context& context) {
    const bool vectors = in_vectors(dtype, sizes, weight, bias) && at_16_bytes(x, dtype) &&
                         at_16_bytes(out, dtype);
    return with_layout(dtype, sizes, vectors, [&]<class T, int W, bool LAST>() {
        float *stats = scratch, *moments = stats + Scratch(sizes, context).row;
        const cudaError_t error =
            statistics<T, W, LAST>(x, sizes, eps, moments, stats, context);
        if (error != cudaSuccess) return error;
        const Runs runs = runs_to_write(sizes, W);
        return launch(context, group_norm_silu_kernel<T, W, LAST>, runs.blocks(sizes.B), THREADS,
                      0, x, static_cast<const T*>(weight), static_cast<const T*>(bias), stats, out,
                      runs, sizes.C);
    });
}

cudaError_t group_norm_silu_backward(DType dtype, Images dy, Images x, const void* weight,
                                     const void* bias, Images dx, void* dweight, void* dbias,
                                     const ImageSizes& sizes, float eps, float* scratch,
                                     const Context& context) {
    const bool vectors = in_vectors(dtype, sizes, weight, bias) && at_16_bytes(dy, dtype) &&
                         at_16_bytes(x, dtype) && at_16_bytes(dx, dtype);
    return with_layout(dtype, sizes, vectors, [&]<class T, int W, bool LAST>() {
        const auto *w = static_cast<const T*>(weight), *b = static_cast<const T*>(bias);
        const Scratch size(sizes, context);
        float *stats = scratch, *means = stats + size.row, *totals = means + size.row;
        float *moments = totals + size.row, *partial = moments + size.moments;
        cudaError_t error = statistics<T, W, LAST>(x, sizes, eps, moments, stats, context);
        if (error != cudaSuccess) return error;
        const Runs runs = runs_to_sum(sizes, sizes.C, W, context);
        const size_t bytes = LAST ? sizeof(Spread) : sizeof(BlockSlots);
        error = launch(context, group_gradients_kernel<T, W, LAST>, runs.blocks(sizes.B), THREADS,
                       bytes, dy, x, w, b, stats, partial, runs, sizes.C);
        if (error != cudaSuccess) return error;
        error = launch(context, group_means_kernel<T>, sizes.B * sizes.groups, THREADS,
                       sizeof(BlockSlots), partial, w, totals, means, runs.count,
                       groups_of(sizes));
        if (error != cudaSuccess) return error;
        const Partials pictures = {1, 0, int(sizes.B)};
        error = sum_partials<T, 2>(context, totals, pictures,
                                 {{}, {{dweight, sizes.C}, {dbias, sizes.C}}}, 1, 1, sizes.C);
        if (error != cudaSuccess) return error;
        const Runs written = runs_to_write(sizes, W);
        return launch(context, group_norm_silu_backward_kernel<T, W, LAST>, written.blocks(sizes.B),
                      THREADS, 0, dy, x, w, b, stats, means, dx, written, sizes.C);
    });
}

}  // namespace fluxkern::cuda
