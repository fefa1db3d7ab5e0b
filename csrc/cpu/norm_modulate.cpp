// h = layer_norm(x) * (1 + scale) + shift, and its backward.
// Parallel: forward over tokens; backward over spans of tokens of one stream.
// Bytes: forward 2 B L C elements; backward 3 B L C, and fp32 partials of a row a span.
// Accumulation: fp32; mean first, then squares about it; sums over tokens in a fixed order.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include "norm.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void norm_modulate(DType dtype, Tokens x, Vectors scale, Vectors shift, Tokens out,
                   const Sizes& sizes, float eps, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, out);
        each_range(context, sizes, [&](int64_t begin, int64_t end) {
            const T *before = nullptr, *scale_row = nullptr, *shift_row = nullptr;
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
                    const Vec m = load(scale_row + i, part), a = load(shift_row + i, part);
                    h.store(i, modulated(load(before + i, part), s, m, a), part);
                };
                overlapped<T>(sizes.C, row < end, row > begin, start, finish);
                before = now;
                scale_row = row_of<T>(scale, at);
                shift_row = row_of<T>(shift, at);
                h = out_of<T>(out, at, streaming);
                s = statistics_of<T>(sum.total() / float(sizes.C), sizes.C, eps, read);
            }
        });
    });
}

void norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Vectors scale, Tokens dx,
                            Vectors dscale, Vectors dshift, const Sizes& sizes, float eps,
                            float* scratch, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, dx);
        const auto group = [&]<int R>(Group<R>, const Place& at, float* scale_sums) {
            const T *x_row = row_of<T>(x, at), *dh_row = row_of<T>(dh, at);
            const T* scale_row = row_of<T>(scale, at);
            const Out<T> out = out_of<T>(dx, at, streaming);
            float* shift_sums = scale_sums + padded(sizes.C);
            NormGradient gradients[R];
            gradients_of(gradients, x_row, x.stride_l, dh_row, dh.stride_l, scale_row, sizes.C,
                         eps, [](int, int64_t) {});
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec m = load(scale_row + i, part);
                Vec scale_sum = load(scale_sums + i), shift_sum = load(shift_sums + i);
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
                store(scale_sums + i, scale_sum);
                store(shift_sums + i, shift_sum);
            });
        };
        each_group<2>(context, sizes, scratch, group);
        sum_partials<T>(context, sizes, scratch, {dscale, dshift});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
