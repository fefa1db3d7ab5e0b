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
        const bool streaming = streams<T>(context, sizes, out);
        each_row(context, sizes, [&](const Place& at) {
            const T* row = row_of<T>(x, at);
            const Statistics s = statistics_of(row, sum_of(row, sizes.C), sizes.C, eps);
            write_norm_modulate(row, row_of<T>(at.txt ? txt_scale : img_scale, at.b),
                                row_of<T>(at.txt ? txt_shift : img_shift, at.b),
                                out_of<T>(out, at, streaming), sizes.C, s);
        });
    });
}

void norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Rows txt_scale, Rows img_scale,
                            Tokens dx, Rows txt_dscale, Rows txt_dshift, Rows img_dscale,
                            Rows img_dshift, const Sizes& sizes, float eps, float* scratch,
                            const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(context, sizes, dx);
        each_row_of_chunks<2>(context, sizes, scratch, [&](const Place& at, float* dscale) {
            const T *x_row = row_of<T>(x, at), *dh_row = row_of<T>(dh, at);
            const T* scale = row_of<T>(at.txt ? txt_scale : img_scale, at.b);
            const Out<T> out = out_of<T>(dx, at, streaming);
            float* dshift = dscale + sizes.C;
            const NormGradient gradient = gradient_of(x_row, dh_row, scale, sizes.C, eps);
            each_vec(sizes.C, [&](int64_t i, int, auto part) {
                const Vec n = gradient.normed(load(x_row + i, part)), g = load(dh_row + i, part);
                out.store(i, gradient.dx(n, scaled(g, load(scale + i, part))), part);
                store(dscale + i, load(dscale + i, part) + g * n, part);
                store(dshift + i, load(dshift + i, part) + g, part);
            });
        });
        add_chunks<T, 2>(context, sizes, scratch, {txt_dscale, txt_dshift},
                         {img_dscale, img_dshift});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
