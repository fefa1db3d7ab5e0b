// q and k: RMSNorm over D, times a weight, pairs (2i, 2i + 1) rotated, in place or text and image as
// one sequence with v copied beside them; and the backward.
// Grid: a warp a token of q, of k or of v, over all heads; backward a block a span of tokens.
// Bytes: forward 2 B L H D elements for each of q, k (and v); backward 3; the angles once for each.
// Accumulation: fp32, one rounding; weight gradients in a fixed order.
// Limits: B * L < 2^29; D of 8, 16, ... 256 and aligned by vectors, any even D pair by pair.
#include "heads.cuh"
#include "partials.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int AHEAD = 4;  // loads in flight a lane

struct Job {  // one of q, k, v
    Heads txt, img, out;
    const void *txt_weight, *img_weight;  // none: a copy
};

struct Stream {  // of one token: where it starts, its heads so far apart
    const void* in;
    void* out;
    const void* weight;
    int64_t in_stride_h, out_stride_h;
};

template <class T>
__device__ Stream stream_of(const Job& job, const Place& at, const HeadSizes& sizes) {
    const Heads in = at.txt ? job.txt : job.img;
    const int64_t l = at.txt ? at.l : at.l - sizes.txt_len;
    return {head_of<const T>(in, at.b, l, 0), head_of<T>(job.out, at.b, at.l, 0),
            at.txt ? job.txt_weight : job.img_weight, in.stride_h, job.out.stride_h};
}

template <class T>
__device__ void rotate_by_vectors(const Stream& s, const Rotation& rotation,
                                  const HeadSizes& sizes, float eps) {
    const int D = int(sizes.D), H = int(sizes.H), lanes = D / WIDTH, heads = WARP / lanes;
    const int lane = threadIdx.x % WARP, column = lane % lanes * WIDTH;
    const T* from = static_cast<const T*>(s.in) + column;
    T* const to = static_cast<T*>(s.out) + column;
    const Packed<T> weight = load_packed(static_cast<const T*>(s.weight) + column);
    for (int first = 0; first < H; first += AHEAD * heads) {
        Packed<T> x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int h = first + i * heads + lane / lanes;
            x[i] = h < H ? load_packed(from + h * s.in_stride_h) : Packed<T>{};
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int h = first + i * heads + lane / lanes;
            Vec v = unpack(x[i]);
            const float rstd = rsqrtf(lanes_sum(dot(v, v), lanes) / float(D) + eps);
            const Vec scale = unpack(weight);
            for (int j = 0; j < WIDTH; ++j) v[j] *= rstd * scale[j];
            const Packed<T> out = pack<T>(rotation.applied(v, 1));
            if (h < H) store_packed(to + h * s.out_stride_h, out);
        }
    }
}

template <class T>
__device__ void rotate_by_pairs(const Stream& s, const Angles& cos, const Angles& sin, int64_t l,
                                const HeadSizes& sizes, float eps) {
    const T* weight = static_cast<const T*>(s.weight);
    for (int h = 0; h < sizes.H; ++h) {
        const T* x = static_cast<const T*>(s.in) + h * s.in_stride_h;
        T* const out = static_cast<T*>(s.out) + h * s.out_stride_h;
        float squares = 0;
        for (int i = threadIdx.x % WARP; i < sizes.D / 2; i += WARP) {
            const float a = float(x[2 * i]), b = float(x[2 * i + 1]);
            squares += a * a + b * b;
        }
        const float rstd = rsqrtf(warp_sum(squares) / float(sizes.D) + eps);
        for (int i = threadIdx.x % WARP; i < sizes.D / 2; i += WARP) {
            const float2 pair = make_float2(float(x[2 * i]) * rstd * float(weight[2 * i]),
                                            float(x[2 * i + 1]) * rstd * float(weight[2 * i + 1]));
            const float2 turned = rotated(pair, angle_of(cos, l, i), angle_of(sin, l, i));
            out[2 * i] = T(turned.x);
            out[2 * i + 1] = T(turned.y);
        }
    }
}

template <class T, bool VECTORS>
__device__ void copy_heads(const Stream& s, const HeadSizes& sizes) {
    constexpr int STEP = VECTORS ? WIDTH : 1;
    const int a_head = int(sizes.D) / STEP, all = int(sizes.H) * a_head;
#pragma unroll 4
    for (int i = threadIdx.x % WARP; i < all; i += WARP) {
        const int h = i / a_head, d = i % a_head * STEP;
        const T* from = static_cast<const T*>(s.in) + h * s.in_stride_h + d;
        T* const to = static_cast<T*>(s.out) + h * s.out_stride_h + d;
        if constexpr (VECTORS) store_packed(to, load_packed(from));
        if constexpr (!VECTORS) *to = *from;
    }
}

template <class T, bool VECTORS>
__global__ void __launch_bounds__(WARPS * WARP, 5)
    qk_norm_rope_kernel(Job q, Job k, Job v, Angles cos, Angles sin, HeadSizes sizes,
                        unsigned blocks_a_job, float eps) {
    const int which = blockIdx.x / blocks_a_job;
    const unsigned row = blockIdx.x % blocks_a_job * WARPS + threadIdx.x / WARP;
    const unsigned length = unsigned(sizes.L);
    if (row >= unsigned(sizes.B) * length) return;
    const Place at = {row / length, row % length, row % length < sizes.txt_len};
    if (which == 2) return copy_heads<T, VECTORS>(stream_of<T>(v, at, sizes), sizes);
    const Stream s = which == 0 ? stream_of<T>(q, at, sizes) : stream_of<T>(k, at, sizes);
    if constexpr (VECTORS) {
        const int pair = int(threadIdx.x) % int(sizes.D / WIDTH) * (WIDTH / 2);
        rotate_by_vectors<T>(s, rotation_of(cos, sin, at.l, pair), sizes, eps);
    } else {
        rotate_by_pairs<T>(s, cos, sin, at.l, sizes, eps);
    }
}

// backward

struct BackwardJob {  // one of q, k
    Heads dout, txt, img, txt_dx, img_dx;
    const void *txt_weight, *img_weight;
};

struct BackwardStream {  // of one span
    Heads dout, x, dx;
    const void* weight;
    int64_t skipped;  // tokens of the joint sequence in front of the stream
};

__device__ inline BackwardStream stream_of(const BackwardJob& job, const Span& span,
                                           const HeadSizes& sizes) {
    if (span.txt) return {job.dout, job.txt, job.txt_dx, job.txt_weight, 0};
    return {job.dout, job.img, job.img_dx, job.img_weight, sizes.txt_len};
}

// dx = r (g - n mean(g n)) with n = x r and g = weight * (dout rotated back); gives dout back * n.
template <class T>
__device__ Vec backward_of_head(const T* dout, const T* x, const T* weight, T* dx,
                                const Rotation& rotation, int lanes, bool active, float eps) {
    const float D = float(lanes * WIDTH);
    const Vec v = unpack(active ? load_packed(x) : Packed<T>{}), w = unpack(load_packed(weight));
    const Vec g = rotation.applied(unpack(active ? load_packed(dout) : Packed<T>{}), -1);
    const float r = rsqrtf(lanes_sum(dot(v, v), lanes) / D + eps);
    Vec products, out;
    float sum = 0;
    for (int i = 0; i < WIDTH; ++i) {
        products[i] = g[i] * v[i] * r;
        sum += products[i] * w[i];
    }
    const float mean = lanes_sum(sum, lanes) / D;
    for (int i = 0; i < WIDTH; ++i) out[i] = r * (g[i] * w[i] - v[i] * r * mean);
    if (active) store_packed(dx, pack<T>(out));
    return products;
}

struct WeightStorage {
    float sums[WARPS][WARP * WIDTH];  // a D of 256 at most
};

// The sums of a span's lanes that hold the same columns, in order, to [D] of scratch.
__device__ inline void write_weight_sums(Vec sums, int lanes, float* partial) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int bits = lanes; bits < WARP; bits *= 2) {
        for (int i = 0; i < WIDTH; ++i) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], bits);
    }
    WeightStorage& storage = shared<WeightStorage>();
    for (int i = 0; i < WIDTH; ++i) {
        if (lane < lanes) storage.sums[warp][lane * WIDTH + i] = sums[i];
    }
    __syncthreads();
    for (int d = threadIdx.x; d < lanes * WIDTH; d += WARPS * WARP) {
        float sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += storage.sums[w][d];
        partial[d] = sum;
    }
}

template <class T>
__device__ void backward_by_vectors(const BackwardStream& s, const Span& span,
                                    const Angles& cos, const Angles& sin, const HeadSizes& sizes,
                                    float eps, float* partial) {
    const int H = int(sizes.H), lanes = int(sizes.D) / WIDTH, heads = WARP / lanes;
    const int lane = threadIdx.x % WARP, column = lane % lanes * WIDTH;
    const T* weight = static_cast<const T*>(s.weight) + column;
    Vec sums = {};
    for (int l = span.first + threadIdx.x / WARP; l < span.end; l += WARPS) {
        const Rotation rotation = rotation_of(cos, sin, l, column / 2);
        const T* dout = head_of<const T>(s.dout, span.b, l, 0) + column;
        const T* x = head_of<const T>(s.x, span.b, l - s.skipped, 0) + column;
        T* const dx = head_of<T>(s.dx, span.b, l - s.skipped, 0) + column;
        for (int h0 = 0; h0 < H; h0 += heads) {
            const int64_t h = h0 + lane / lanes;
            const Vec products = backward_of_head<T>(
                dout + h * s.dout.stride_h, x + h * s.x.stride_h, weight, dx + h * s.dx.stride_h,
                rotation, lanes, h < H, eps);
            for (int i = 0; i < WIDTH; ++i) sums[i] += products[i];
        }
    }
    write_weight_sums(sums, lanes, partial);
}

// One warp a block; a lane adds to its own elements of scratch.
template <class T>
__device__ void backward_by_pairs(const BackwardStream& s, const Span& span, const Angles& cos,
                                  const Angles& sin, const HeadSizes& sizes, float eps,
                                  float* partial) {
    const T* weight = static_cast<const T*>(s.weight);
    const int pairs = int(sizes.D) / 2;
    for (int i = threadIdx.x; i < pairs; i += WARP) partial[2 * i] = partial[2 * i + 1] = 0;
    for (int64_t row = 0; row < (span.end - span.first) * sizes.H; ++row) {
        const int64_t l = span.first + row / sizes.H, h = row % sizes.H;
        const T* dout = head_of<const T>(s.dout, span.b, l, h);
        const T* x = head_of<const T>(s.x, span.b, l - s.skipped, h);
        T* const dx = head_of<T>(s.dx, span.b, l - s.skipped, h);
        const auto back = [&](int i) {
            return rotated(make_float2(float(dout[2 * i]), float(dout[2 * i + 1])),
                           angle_of(cos, l, i), -angle_of(sin, l, i));
        };
        float squares = 0, sum = 0;
        for (int i = threadIdx.x; i < pairs; i += WARP) {
            const float a = float(x[2 * i]), b = float(x[2 * i + 1]);
            const float2 g = back(i);
            squares += a * a + b * b;
            sum += g.x * float(weight[2 * i]) * a + g.y * float(weight[2 * i + 1]) * b;
        }
        const float r = rsqrtf(warp_sum(squares) / float(sizes.D) + eps);
        const float mean = warp_sum(sum) * r / float(sizes.D);
        for (int i = threadIdx.x; i < pairs; i += WARP) {
            const float a = float(x[2 * i]) * r, b = float(x[2 * i + 1]) * r;
            const float2 g = back(i);
            dx[2 * i] = T(r * (g.x * float(weight[2 * i]) - a * mean));
            dx[2 * i + 1] = T(r * (g.y * float(weight[2 * i + 1]) - b * mean));
            partial[2 * i] += g.x * a;
            partial[2 * i + 1] += g.y * b;
        }
    }
}

template <class T, bool VECTORS>
__global__ void __launch_bounds__(WARPS * WARP, 4)
    qk_norm_rope_backward_kernel(BackwardJob q, BackwardJob k, Angles cos, Angles sin,
                                 HeadSizes sizes, Partials partials, float eps, float* scratch) {
    const Span span =
        span_of(blockIdx.x / 2, partials, {sizes.B, sizes.L, sizes.D, sizes.txt_len});
    const BackwardStream s =
        blockIdx.x % 2 == 0 ? stream_of(q, span, sizes) : stream_of(k, span, sizes);
    float* const partial = scratch + int64_t(blockIdx.x) * sizes.D;
    if constexpr (VECTORS) backward_by_vectors<T>(s, span, cos, sin, sizes, eps, partial);
    if constexpr (!VECTORS) backward_by_pairs<T>(s, span, cos, sin, sizes, eps, partial);
}

template <class Launch>
cudaError_t with_elements(DType dtype, bool vectors, Launch launch) {
    return with_types(dtype, vectors ? 1 : 0, [&]<class T, int VECTORS>() {
        if constexpr (VECTORS == 2) return cudaErrorInvalidValue;
        return launch.template operator()<T, VECTORS == 1>();
    });
}

Partials head_partials(const HeadSizes& sizes, const Context& context) {
    return partials_of({sizes.B, sizes.L, sizes.D, sizes.txt_len}, context);
}

}  // namespace

cudaError_t qk_norm_rope(DType dtype, Heads txt_q, Heads txt_k, Heads txt_v, Heads img_q,
                         Heads img_k, Heads img_v, const void* txt_q_weight,
                         const void* txt_k_weight, const void* img_q_weight,
                         const void* img_k_weight, Angles cos, Angles sin, Heads q, Heads k,
                         Heads v, HeadSizes sizes, float eps, const Context& context) {
    const Job q_job = {txt_q, img_q, q, txt_q_weight, img_q_weight};
    const Job k_job = {txt_k, img_k, k, txt_k_weight, img_k_weight};
    const Job v_job = {txt_v, img_v, v, nullptr, nullptr};
    const bool vectors =
        lanes_hold(sizes.D) && aligned(dtype, txt_q, txt_k, txt_v, img_q, img_k, img_v, q, k, v,
                                       txt_q_weight, txt_k_weight, img_q_weight, img_k_weight);
    const int64_t blocks = (sizes.B * sizes.L + WARPS - 1) / WARPS;
    const int jobs = q.data == nullptr ? 1 : v.data == nullptr ? 2 : 3;
    return with_elements(dtype, vectors, [&]<class T, bool VECTORS>() {
        return launch(context, qk_norm_rope_kernel<T, VECTORS>, blocks * jobs, WARPS * WARP, 0,
                      q.data ? q_job : k_job, k_job, v_job, cos, sin, sizes, unsigned(blocks), eps);
    });
}

int64_t qk_norm_rope_backward_scratch(HeadSizes sizes, const Context& context) {
    return head_partials(sizes, context).in_all(sizes.B) * 2 * sizes.D;
}

cudaError_t qk_norm_rope_backward(DType dtype, Heads dq_out, Heads dk_out, Heads txt_q, Heads txt_k,
                                  Heads img_q, Heads img_k, const void* txt_q_weight,
                                  const void* txt_k_weight, const void* img_q_weight,
                                  const void* img_k_weight, Angles cos, Angles sin, Heads txt_dq,
                                  Heads txt_dk, Heads img_dq, Heads img_dk, void* txt_dq_weight,
                                  void* txt_dk_weight, void* img_dq_weight, void* img_dk_weight,
                                  HeadSizes sizes, float eps, float* scratch,
                                  const Context& context) {
    const BackwardJob q = {dq_out, txt_q, img_q, txt_dq, img_dq, txt_q_weight, img_q_weight};
    const BackwardJob k = {dk_out, txt_k, img_k, txt_dk, img_dk, txt_k_weight, img_k_weight};
    const bool vectors =
        lanes_hold(sizes.D) &&
        aligned(dtype, dq_out, dk_out, txt_q, txt_k, img_q, img_k, txt_dq, txt_dk, img_dq, img_dk,
                txt_q_weight, txt_k_weight, img_q_weight, img_k_weight);
    const Partials partials = head_partials(sizes, context);
    const StreamGradients<2> weights = {{{txt_dq_weight, 0}, {txt_dk_weight, 0}},
                                        {{img_dq_weight, 0}, {img_dk_weight, 0}}};
    return with_elements(dtype, vectors, [&]<class T, bool VECTORS>() {
        const cudaError_t error =
            launch(context, qk_norm_rope_backward_kernel<T, VECTORS>, partials.in_all(sizes.B) * 2,
                   VECTORS ? WARPS * WARP : WARP, sizeof(WeightStorage), q, k, cos, sin, sizes,
                   partials, eps, scratch);
        if (error != cudaSuccess) return error;
        return sum_partials<T>(context, scratch, partials, weights, sizes.B, 1, sizes.D);
    });
}

}  // namespace fluxkern::cuda
