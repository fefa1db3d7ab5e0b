// RMSNorm of q and k over the head dim, pairs (2i, 2i+1) rotated, v copied beside them; backward.
// Parallel: forward over tokens; backward over spans of tokens of one stream.
// Bytes: forward 4 B L H D elements, 6 with v; backward 6 B L H D; the table once a token.
// Accumulation: fp32, rounded once; gradients of the weights summed in a fixed order.
// Limits: D even; heads that are no multiple of a vector or misaligned go through the caches.
#include "buffer.h"
#include "rotation.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

// The rotation of a token with the weight in it: n -> n * own + swapped(n) * other. Both are
// [padded(D)] in the order of T; of a pair with weights (w, v) own is (c w, c v) and other
// (-s v, s w).
template <class T>
struct Turn {
    float* own;

    FLUXKERN_INLINE float* other(int64_t D) const {
        return own + padded(D);
    }
    FLUXKERN_INLINE void set(const Rotation& rotation, const float* weights, int64_t D) const {
        for (int64_t i = 0; i < padded(D); i += WIDTH) {
            const Reg c = half(rotation.cos + i / 2), s = half(rotation.sin + i / 2);
            const Vec pairs = load(weights + i);
            store(own + i, vec_of({c * pairs.a, c * pairs.b}, T{}));
            store(other(D) + i, vec_of({-s * pairs.b, s * pairs.a}, T{}));
        }
    }
};

// weight in pairs; [padded(D)]
template <class T>
void pair_weight(const T* weight, int64_t D, float* table) {
    each_vec<T>(D, [&](int64_t i, int, auto part) {
        store(table + i, pairs_of(load(weight + i, part), T{}));
    });
}

template <int R, class T>
FLUXKERN_INLINE void norms(const T* x, int64_t stride, int64_t D, float eps, float* rstd) {
    Sum squares[R];
    each_vec<T>(D, [&](int64_t i, int lane, auto part) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec v = load(x + r * stride + i, part);
            squares[r].add(lane, v * v);
        }
    });
    rstds_of(squares, D, eps, rstd);
}

// The same heads of the next token are fetched before, in one go: fetches between stores slow both.
template <int R, class T>
FLUXKERN_INLINE void turn_heads(const T* x, int64_t stride, const float* rstd, const Turn<T>& turn,
                                Out<T> out, int64_t out_stride, int64_t D, const T* next) {
    for (int r = 0; r < R; ++r) {
        for (int64_t i = 0; i < D; i += WIDTH) prefetch(next + r * stride + i);
    }
    each_vec<T>(D, [&](int64_t i, int, auto part) {
        const Vec own = load(turn.own + i), other = load(turn.other(D) + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec n = load(x + r * stride + i, part) * rstd[r];
            out.store(r * out_stride + i, n * own + swapped(n, T{}) * other, part);
        }
    });
}

// body(Group<R>, first head) for R heads at a time
template <int R, class Body>
FLUXKERN_INLINE void each_group_of_heads(int64_t H, const Body& body) {
    int64_t h = 0;
    for (; h + R <= H; h += R) body(Group<R>{}, h);
    for (; h < H; ++h) body(Group<1>{}, h);
}

// All heads of one token.
template <class T>
void norm_rope(const T* x, int64_t stride, const Turn<T>& turn, Out<T> out, int64_t out_stride,
               int64_t H, int64_t D, float eps, float* rstd, const T* next) {
    each_group_of_heads<4>(H, [&]<int R>(Group<R>, int64_t h) {
        norms<R>(x + h * stride, stride, D, eps, rstd + h);
    });
    each_group_of_heads<8 / sizeof(T)>(H, [&]<int R>(Group<R>, int64_t h) {
        const Out<T> heads = {out.row + h * out_stride, out.streaming};
        turn_heads<R>(x + h * stride, stride, rstd + h, turn, heads, out_stride, D,
                      next + h * stride);
    });
}

template <class T>
FLUXKERN_INLINE void copy(const T* x, Out<T> out, int64_t D, const T* next) {
    for (int64_t i = 0; i < D; i += WIDTH) prefetch(next + i);
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
            const int64_t D = sizes.D;
            const Buffer table(D), turns(2 * padded(D)), weights(4 * padded(D)), rstd(sizes.H);
            const void* const all_weights[] = {txt_q_weight, txt_k_weight, img_q_weight,
                                               img_k_weight};
            for (int i = 0; i < 4; ++i) {
                const T* weight = static_cast<const T*>(all_weights[i]);
                if (weight != nullptr) pair_weight(weight, D, weights.data + i * padded(D));
            }
            for (int64_t row = begin; row < end; ++row) {
                const Place at = place_of(row, tokens);
                const Rotation rotation = rotation_of(cos, sin, at.l, D, table.data);
                const int64_t l = at.txt ? at.l : at.l - sizes.txt_len;
                const Turn<T> turn = {turns.data};
                const auto rotate = [&](const Heads& in, int which, const Heads& out) {
                    turn.set(rotation, weights.data + (at.txt ? which : 2 + which) * padded(D), D);
                    const T* x = head_of<T>(in, at.b, l, 0);
                    norm_rope<T>(x, in.stride_h, turn,
                                 {head_of<T>(out, at.b, at.l, 0), streaming}, out.stride_h,
                                 sizes.H, D, eps, rstd.data, x + in.stride_l);
                };
                rotate(at.txt ? txt_q : img_q, 0, q);
                rotate(at.txt ? txt_k : img_k, 1, k);
                const Heads& in = at.txt ? txt_v : img_v;
                for (int64_t h = 0; v.data != nullptr && h < sizes.H; ++h) {
                    const T* x = head_of<T>(in, at.b, l, h);
                    copy<T>(x, {head_of<T>(v, at.b, at.l, h), streaming_v}, D, x + in.stride_l);
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

// The partials of a stream of all batch elements, in order.
template <class T>
void sum_weight_partials(const float* sums, const Partials& partials, const HeadSizes& sizes,
                         bool txt, int which, void* dweight) {
    if (dweight == nullptr) return;
    const int64_t each = partials.txt + partials.img, D = padded(sizes.D);
    const int64_t first = txt ? 0 : partials.txt, end = txt ? partials.txt : each;
    const Out<T> out = {static_cast<T*>(dweight), false};
    each_vec<T>(sizes.D, [&](int64_t i, int, auto part) {
        Vec sum = {};
        for (int64_t b = 0; b < sizes.B; ++b) {
            for (int64_t p = first; p < end; ++p) {
                sum = sum + load(sums + ((b * each + p) * 2 + which) * D + i);
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
        const auto backward = [&](const Span& span, float* sums) {
            const Buffer table(sizes.D), head(sizes.D);
            const auto [b, first, txt] = span.first;
            for (int64_t at = first; at < span.end; ++at) {
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
        each_partial<2>(context, sum_sizes, sizes.H * sizes.D, scratch, backward);
        const Partials partials = partials_of(sum_sizes);
        sum_weight_partials<T>(scratch, partials, sizes, true, 0, txt_dq_weight);
        sum_weight_partials<T>(scratch, partials, sizes, true, 1, txt_dk_weight);
        sum_weight_partials<T>(scratch, partials, sizes, false, 0, img_dq_weight);
        sum_weight_partials<T>(scratch, partials, sizes, false, 1, img_dk_weight);
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
