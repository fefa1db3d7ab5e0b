// x_new = x + gate * y; h = layer_norm(x_new) * (1 + scale) + shift; and the backward of both.
// Parallel: forward over tokens; backward over spans of tokens of one stream.
// Bytes: forward 4 B L C elements; backward 6 B L C, and fp32 partials of a row a span.
// Accumulation: fp32; x_new is rounded to its dtype before the norm; sums in a fixed order.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include "buffer.h"
#include "norm.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void gated_residual_norm_modulate(DType dtype, Tokens x, Tokens y, Vectors gate, Vectors scale,
                                  Vectors shift, Tokens x_new, Tokens h, const Sizes& sizes,
                                  float eps, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, x_new) && streams<T>(sizes, h);
        each_range(context, sizes, [&](int64_t begin, int64_t end) {
            const Buffer kept(sizes.C);
            const T *scale_row = nullptr, *shift_row = nullptr;
            Out<T> h_row = {};
            Statistics s = {};
            for (int64_t row = begin; row <= end; ++row) {
                const Place at = place_of(row < end ? row : end - 1, sizes);
                const T *x_row = row_of<T>(x, at), *y_row = row_of<T>(y, at);
                const T* gate_row = row_of<T>(gate, at);
                const Out<T> x_new_row = out_of<T>(x_new, at, streaming);
                const auto read = [&](int64_t i, const auto&) { return load(kept.data + i); };
                Sum sum;
                const auto start = [&](int64_t i, int lane, auto part) {
                    const Vec branch = load(gate_row + i, part) * load(y_row + i, part);
                    const Vec v = rounded(load(x_row + i, part) + branch, T{});
                    x_new_row.store_rounded(i, v, part);
                    store(kept.data + i, v);
                    sum.add(lane, v);
                    prefetch(x_row + x.stride_l + i);
                    prefetch(y_row + y.stride_l + i);
                };
                const auto finish = [&](int64_t i, auto part) {
                    const Vec m = load(scale_row + i, part), a = load(shift_row + i, part);
                    h_row.store(i, modulated(read(i, part), s, m, a), part);
                };
                overlapped<T>(sizes.C, row < end, row > begin, start, finish);
                scale_row = row_of<T>(scale, at);
                shift_row = row_of<T>(shift, at);
                h_row = out_of<T>(h, at, streaming);
                s = statistics_of<T>(sum.total() / float(sizes.C), sizes.C, eps, read);
            }
        });
    });
}

void gated_residual_norm_modulate_backward(DType dtype, Tokens dx_new, Tokens dh, Tokens x_new,
                                           Tokens y, Vectors gate, Vectors scale, Tokens dx,
                                           Tokens dy, Vectors dgate, Vectors dscale,
                                           Vectors dshift, const Sizes& sizes, float eps,
                                           float* scratch, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, dx) && streams<T>(sizes, dy);
        const auto group = [&]<int R>(Group<R>, const Place& at, float* gate_sums) {
            const T *dx_new_row = row_of<T>(dx_new, at), *dh_row = row_of<T>(dh, at);
            const T *x_row = row_of<T>(x_new, at), *y_row = row_of<T>(y, at);
            const T* gate_row = row_of<T>(gate, at);
            const T* scale_row = row_of<T>(scale, at);
            const Out<T> dx_row = out_of<T>(dx, at, streaming);
            const Out<T> dy_row = out_of<T>(dy, at, streaming);
            float* const scale_sums = gate_sums + padded(sizes.C);
            float* const shift_sums = scale_sums + padded(sizes.C);
            NormGradient gradients[R];
            const auto ahead = [&](int r, int64_t i) {
                prefetch(dx_new_row + r * dx_new.stride_l + i);
                prefetch(y_row + r * y.stride_l + i);
            };
            gradients_of(gradients, x_row, x_new.stride_l, dh_row, dh.stride_l, scale_row, sizes.C,
                         eps, ahead);
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec m = load(scale_row + i, part), gates = load(gate_row + i, part);
                Vec gate_sum = load(gate_sums + i), scale_sum = load(scale_sums + i);
                Vec shift_sum = load(shift_sums + i);
                for (int r = 0; r < R; ++r) {
                    const T* x_now = x_row + r * x_new.stride_l + i;
                    const T* dh_now = dh_row + r * dh.stride_l + i;
                    const Vec n = gradients[r].normed(load(x_now, part)), g = load(dh_now, part);
                    const Vec total = load(dx_new_row + r * dx_new.stride_l + i, part) +
                                      gradients[r].dx(n, scaled(g, m));
                    dx_row.store(r * dx.stride_l + i, total, part);
                    dy_row.store(r * dy.stride_l + i, gates * total, part);
                    gate_sum = gate_sum + total * load(y_row + r * y.stride_l + i, part);
                    scale_sum = scale_sum + g * n;
                    shift_sum = shift_sum + g;
                    prefetch(x_now + R * x_new.stride_l);
                    prefetch(dh_now + R * dh.stride_l);
                }
                store(gate_sums + i, gate_sum);
                store(scale_sums + i, scale_sum);
                store(shift_sums + i, shift_sum);
            });
        };
        each_group<3>(context, sizes, scratch, group);
        sum_partials<T>(context, sizes, scratch, {dgate, dscale, dshift});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
