// x_new = x + gate * y; h = layer_norm(x_new) * (1 + scale) + shift; and the backward of both.
// Parallel: forward over tokens; backward over chunks of tokens of one stream.
// Bytes: forward 4 B L C elements; backward 6 B L C, and fp32 partial sums of a row a chunk.
// Accumulation: fp32; x_new is rounded to its dtype before the norm; sums in a fixed order.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include <cstdlib>

#include "norm.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

struct Buffer {  // fp32 [C], of one thread
    float* const data;

    explicit Buffer(int64_t C)
        : data(static_cast<float*>(std::aligned_alloc(64, (C * sizeof(float) + 63) / 64 * 64))) {}
    ~Buffer() {
        std::free(data);
    }
};

}  // namespace

void gated_residual_norm_modulate(DType dtype, Tokens x, Tokens y, Rows txt_gate, Rows txt_scale,
                                  Rows txt_shift, Rows img_gate, Rows img_scale, Rows img_shift,
                                  Tokens x_new, Tokens h, const Sizes& sizes, float eps,
                                  const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(context, sizes, x_new) && streams<T>(context, sizes, h);
        each_row(context, sizes, [&](const Place& at) {
            const Buffer kept(sizes.C);
            const T *x_row = row_of<T>(x, at), *y_row = row_of<T>(y, at);
            const T* gate = row_of<T>(at.txt ? txt_gate : img_gate, at.b);
            const Out<T> out = out_of<T>(x_new, at, streaming);
            Sum sum;
            each_vec(sizes.C, [&](int64_t i, int lane, auto part) {
                const Vec branch = load(gate + i, part) * load(y_row + i, part);
                const Vec v = rounded<T>(load(x_row + i, part) + branch);
                out.store(i, v, part);
                store(kept.data + i, v, part);
                sum.add(lane, v);
            });
            const Statistics s = statistics_of(kept.data, sum.total(), sizes.C, eps);
            write_norm_modulate(kept.data, row_of<T>(at.txt ? txt_scale : img_scale, at.b),
                                row_of<T>(at.txt ? txt_shift : img_shift, at.b),
                                out_of<T>(h, at, streaming), sizes.C, s);
        });
    });
}

void gated_residual_norm_modulate_backward(DType dtype, Tokens dx_new, Tokens dh, Tokens x_new,
                                           Tokens y, Rows txt_gate, Rows txt_scale, Rows img_gate,
                                           Rows img_scale, Tokens dx, Tokens dy, Rows txt_dgate,
                                           Rows txt_dscale, Rows txt_dshift, Rows img_dgate,
                                           Rows img_dscale, Rows img_dshift, const Sizes& sizes,
                                           float eps, float* scratch, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(context, sizes, dx) && streams<T>(context, sizes, dy);
        each_row_of_chunks<3>(context, sizes, scratch, [&](const Place& at, float* dgate) {
            const T *dx_new_row = row_of<T>(dx_new, at), *dh_row = row_of<T>(dh, at);
            const T *x_row = row_of<T>(x_new, at), *y_row = row_of<T>(y, at);
            const T* gate = row_of<T>(at.txt ? txt_gate : img_gate, at.b);
            const T* scale = row_of<T>(at.txt ? txt_scale : img_scale, at.b);
            const Out<T> dx_out = out_of<T>(dx, at, streaming), dy_out = out_of<T>(dy, at, streaming);
            float *dscale = dgate + sizes.C, *dshift = dscale + sizes.C;
            const NormGradient gradient = gradient_of(x_row, dh_row, scale, sizes.C, eps);
            each_vec(sizes.C, [&](int64_t i, int, auto part) {
                const Vec n = gradient.normed(load(x_row + i, part)), g = load(dh_row + i, part);
                const Vec through_norm = gradient.dx(n, scaled(g, load(scale + i, part)));
                const Vec total = load(dx_new_row + i, part) + through_norm;
                dx_out.store(i, total, part);
                dy_out.store(i, load(gate + i, part) * total, part);
                store(dgate + i, load(dgate + i, part) + total * load(y_row + i, part), part);
                store(dscale + i, load(dscale + i, part) + g * n, part);
                store(dshift + i, load(dshift + i, part) + g, part);
            });
        });
        add_chunks<T, 3>(context, sizes, scratch, {txt_dgate, txt_dscale, txt_dshift},
                         {img_dgate, img_dscale, img_dshift});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
