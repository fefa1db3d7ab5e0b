// h = layer_norm(x) * (1 + scale) + shift, and its backward.
// Parallel: forward over tokens; backward over chunks of tokens of one stream.
// Bytes: forward 2 B L C elements; backward 3 B L C, and fp32 partial sums of a row a chunk.
// Accumulation: fp32; mean first, then squares about it; sums over tokens in a fixed order.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include "norm.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void norm_modulate(DType dtype, Tokens x, Rows txt_scale, Rows txt_shift, Rows img_scale,
                   Rows img_shift, Tokens out, const Sizes& sizes, float eps,
                   const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, out);
        each_range(context, sizes, [&](int64_t begin, int64_t end) {
            const T *before = nullptr, *scale = nullptr, *shift = nullptr;
            Out<T> h = {};
            Statistics s = {};
            for (int64_t row = begin; row <= end; ++row) {
                const Place at = place_of(row < end ? row : end - 1, sizes);
                const T* now = row_of<T>(x, at);
                const auto read = [&](int64_t i, const auto& part) { return load(now + i, part); };
                Sum sum;
                const auto start = [&](int64_t i, int lane, auto part) {
                    sum.add(lane, read(i, part));
                    prefetch(now + x.stride_l + i);
                };
                const auto finish = [&](int64_t i, auto part) {
                    const Vec m = load(scale + i, part), a = load(shift + i, part);
                    h.store(i, modulated(load(before + i, part), s, m, a), part);
                };
                overlapped<T>(sizes.C, row < end, row > begin, start, finish);
                before = now;
                scale = row_of<T>(at.txt ? txt_scale : img_scale, at.b);
                shift = row_of<T>(at.txt ? txt_shift : img_shift, at.b);
                h = out_of<T>(out, at, streaming);
                s = statistics_of<T>(sum.total() / float(sizes.C), sizes.C, eps, read);
            }
        });
    });
}

void norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Rows txt_scale, Rows img_scale,
                            Tokens dx, Rows txt_dscale, Rows txt_dshift, Rows img_dscale,
                            Rows img_dshift, const Sizes& sizes, float eps, float* scratch,
                            const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, dx);
        const auto group = [&]<int R>(Group<R>, const Place& at, float* dscale) {
            const T *x_row = row_of<T>(x, at), *dh_row = row_of<T>(dh, at);
            const T* scale = row_of<T>(at.txt ? txt_scale : img_scale, at.b);
            const Out<T> out = out_of<T>(dx, at, streaming);
            float* dshift = dscale + padded(sizes.C);
            NormGradient gradients[R];
            gradients_of(gradients, x_row, x.stride_l, dh_row, dh.stride_l, scale, sizes.C, eps,
                         [](int, int64_t) {});
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec m = load(scale + i, part);
                Vec scale_sum = load(dscale + i), shift_sum = load(dshift + i);
                for (int r = 0; r < R; ++r) {
                    const T* x_now = x_row + r * x.stride_l + i;
                    const T* dh_now = dh_row + r * dh.stride_l + i;
                    const Vec n = gradients[r].normed(load(x_now, part)), g = load(dh_now, part);
                    out.store(r * dx.stride_l + i, gradients[r].dx(n, scaled(g, m)), part);
                    scale_sum = scale_sum + g * n;
                    shift_sum = shift_sum + g;
                    prefetch(x_now + R * x.stride_l);
                    prefetch(dh_now + R * dh.stride_l);
                }
                store(dscale + i, scale_sum);
                store(dshift + i, shift_sum);
            });
        };
        each_group<2>(context, sizes, scratch, group);
        add_chunks<T, 2>(context, sizes, scratch, {txt_dscale, txt_dshift},
                         {img_dscale, img_dshift});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
