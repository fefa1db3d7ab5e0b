// RMSNorm of q and k over the head dim, pairs (2i, 2i+1) rotated, v copied beside them; backward.
// Parallel: forward over tokens; backward over chunks of tokens of one stream.
// Bytes: forward 4 B L H D elements, 6 with v; backward 6 B L H D; the table once a token.
// Accumulation: fp32, rounded once; gradients of the weights summed in a fixed order.
// Limits: D even; heads that are no multiple of a vector or misaligned go through the caches.
#include "buffer.h"
#include "rotation.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

template <class T>
FLUXKERN_INLINE void norm_rope(const T* x, const T* weight, const Rotation& rotation, Out<T> out,
                               int64_t D, float eps, const T* next) {
    turned(x, weight, rotation, D, eps, [&](int64_t i, Vec pairs, auto part) {
        out.store(i, vec_of(pairs, T{}), part);
        prefetch(next + i);
    });
}

template <class T>
FLUXKERN_INLINE void copy(const T* x, Out<T> out, int64_t D) {
    each_vec<T>(D, [&](int64_t i, int, auto part) {
        out.store_rounded(i, load(x + i, part), part);
    });
}

template <class T>
bool streams_heads(const HeadSizes& sizes, const Heads& in, const Heads& out) {
    const uint64_t places = uint64_t(out.data) |
                            (out.stride_b | out.stride_l | out.stride_h) * sizeof(T);
    const int64_t bytes = sizes.B * sizes.L * sizes.H * sizes.D * int64_t(sizeof(T));
    return places % sizeof(Reg) == 0 && bytes >= ENOUGH_TO_STREAM && in.data != out.data;
}

}  // namespace

void qk_norm_rope(DType dtype, Heads txt_q, Heads txt_k, Heads txt_v, Heads img_q, Heads img_k,
                  Heads img_v, const void* txt_q_weight, const void* txt_k_weight,
                  const void* img_q_weight, const void* img_k_weight, Angles cos, Angles sin,
                  Heads q, Heads k, Heads v, const HeadSizes& sizes, float eps,
                  const Context& context) {
    const Sizes tokens = {sizes.B, sizes.L, sizes.H * sizes.D, sizes.txt_len};
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams_heads<T>(sizes, sizes.txt_len ? txt_q : img_q, q) &&
                               streams_heads<T>(sizes, sizes.txt_len ? txt_k : img_k, k);
        const bool streaming_v = streams_heads<T>(sizes, {}, v);
        each_range(context, tokens, [&](int64_t begin, int64_t end) {
            const Buffer table(sizes.D);
            for (int64_t row = begin; row < end; ++row) {
                const Place at = place_of(row, tokens);
                const Rotation rotation = rotation_of(cos, sin, at.l, sizes.D, table.data);
                const int64_t l = at.txt ? at.l : at.l - sizes.txt_len;
                const auto rotate = [&](const Heads& in, const void* weight, const Heads& out) {
                    for (int64_t h = 0; h < sizes.H; ++h) {
                        const T* x = head_of<T>(in, at.b, l, h);
                        norm_rope<T>(x, static_cast<const T*>(weight), rotation,
                                     {head_of<T>(out, at.b, at.l, h), streaming}, sizes.D, eps,
                                     x + in.stride_l);
                    }
                };
                rotate(at.txt ? txt_q : img_q, at.txt ? txt_q_weight : img_q_weight, q);
                rotate(at.txt ? txt_k : img_k, at.txt ? txt_k_weight : img_k_weight, k);
                for (int64_t h = 0; v.data != nullptr && h < sizes.H; ++h) {
                    copy<T>(head_of<T>(at.txt ? txt_v : img_v, at.b, l, h),
                            {head_of<T>(v, at.b, at.l, h), streaming_v}, sizes.D);
                }
            }
        });
    });
}

namespace {

// dx = rstd (g - n mean(g n)), n = x rstd, g = dn weight, dn the gradient rotated back; sums dn n.
template <class T>
FLUXKERN_INLINE void norm_rope_backward(const T* dy, const T* x, const T* weight,
                                        const Rotation& rotation, float* dn, Out<T> dx,
                                        float* dweight, int64_t D, float eps, const T* next_dy,
                                        const T* next_x) {
    Sum squares, products;
    each_vec<T>(D, [&](int64_t i, int lane, auto part) {
        const Vec turned = vec_of(rotation.back(pairs_of(load(dy + i, part), T{}), i), T{});
        const Vec v = load(x + i, part);
        store(dn + i, turned);
        squares.add(lane, v * v);
        products.add(lane, turned * load(weight + i, part) * v);
        prefetch(next_dy + i);
        prefetch(next_x + i);
    });
    const float rstd = 1 / __builtin_sqrtf(squares.total() / float(D) + eps);
    const float mean = products.total() * rstd / float(D);
    each_vec<T>(D, [&](int64_t i, int, auto part) {
        const Vec n = load(x + i, part) * rstd, d = load(dn + i);
        dx.store(i, (d * load(weight + i, part) - n * mean) * rstd, part);
        store(dweight + i, load(dweight + i) + d * n);
    });
}

// The sums of a stream over the chunks of all batch elements, in order.
template <class T>
void add_weight_chunks(const float* sums, const Chunks& chunks, const HeadSizes& sizes, bool txt,
                       int which, void* dweight) {
    if (dweight == nullptr) return;
    const int64_t each = chunks.txt + chunks.img, D = padded(sizes.D);
    const int64_t first = txt ? 0 : chunks.txt, end = txt ? chunks.txt : each;
    const Out<T> out = {static_cast<T*>(dweight), false};
    each_vec<T>(sizes.D, [&](int64_t i, int, auto part) {
        Vec sum = {};
        for (int64_t b = 0; b < sizes.B; ++b) {
            for (int64_t c = first; c < end; ++c) {
                sum = sum + load(sums + ((b * each + c) * 2 + which) * D + i);
            }
        }
        out.store(i, sum, part);
    });
}

}  // namespace

void qk_norm_rope_backward(DType dtype, Heads dq_out, Heads dk_out, Heads txt_q, Heads txt_k,
                           Heads img_q, Heads img_k, const void* txt_q_weight,
                           const void* txt_k_weight, const void* img_q_weight,
                           const void* img_k_weight, Angles cos, Angles sin, Heads txt_dq,
                           Heads txt_dk, Heads img_dq, Heads img_dk, void* txt_dq_weight,
                           void* txt_dk_weight, void* img_dq_weight, void* img_dk_weight,
                           const HeadSizes& sizes, float eps, float* scratch,
                           const Context& context) {
    const Sizes sum_sizes = {sizes.B, sizes.L, sizes.D, sizes.txt_len};
    with_dtype(dtype, [&]<class T>(T) {
        const auto streams_both = [&](const Heads& dq, const Heads& dk) {
            return streams_heads<T>(sizes, {}, dq) && streams_heads<T>(sizes, {}, dk);
        };
        const bool streaming_txt = streams_both(txt_dq, txt_dk);
        const bool streaming_img = streams_both(img_dq, img_dk);
        const auto backward = [&](const Chunk& chunk, float* sums) {
            const Buffer table(sizes.D), head(sizes.D);
            const auto [b, first, txt] = chunk.first;
            for (int64_t at = first; at < chunk.end; ++at) {
                const Rotation rotation = rotation_of(cos, sin, at, sizes.D, table.data);
                const int64_t l = txt ? at : at - sizes.txt_len;
                const auto rotate_back = [&](const Heads& dy, const Heads& x, const void* weight,
                                             const Heads& dx, float* dweight) {
                    for (int64_t h = 0; h < sizes.H; ++h) {
                        const T* dy_head = head_of<T>(dy, b, at, h);
                        const T* x_head = head_of<T>(x, b, l, h);
                        const Out<T> out = {head_of<T>(dx, b, l, h),
                                            txt ? streaming_txt : streaming_img};
                        norm_rope_backward(dy_head, x_head, static_cast<const T*>(weight),
                                           rotation, head.data, out, dweight, sizes.D, eps,
                                           dy_head + dy.stride_l, x_head + x.stride_l);
                    }
                };
                rotate_back(dq_out, txt ? txt_q : img_q, txt ? txt_q_weight : img_q_weight,
                            txt ? txt_dq : img_dq, sums);
                rotate_back(dk_out, txt ? txt_k : img_k, txt ? txt_k_weight : img_k_weight,
                            txt ? txt_dk : img_dk, sums + padded(sizes.D));
            }
        };
        each_chunk<2>(context, sum_sizes, sizes.H * sizes.D, scratch, backward);
        const Chunks chunks = chunks_of(sum_sizes);
        add_weight_chunks<T>(scratch, chunks, sizes, true, 0, txt_dq_weight);
        add_weight_chunks<T>(scratch, chunks, sizes, true, 1, txt_dk_weight);
        add_weight_chunks<T>(scratch, chunks, sizes, false, 0, img_dq_weight);
        add_weight_chunks<T>(scratch, chunks, sizes, false, 1, img_dk_weight);
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
