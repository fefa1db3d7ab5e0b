// h = layer_norm(x) * (1 + scale) + shift, and its backward.
// Grid: forward a block a token, the row in registers; backward a block a strip of tokens.
// Bytes: forward 2 B L C elements; backward 3 B L C, and fp32 partial sums of about 1/20 of it.
// Accumulation: fp32; mean first, then squares about it; sums over tokens in a fixed order.
// Limits: B * L < 2^31; rows beyond C = 6144, of odd C or misaligned are read again, not kept.
#include "norm.cuh"
#include "strips.cuh"

namespace fluxkern::cuda {
namespace {

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), VECTORS == 1 ? 3 : 2)
    norm_modulate_kernel(Tokens x, Rows txt_scale, Rows txt_shift, Rows img_scale, Rows img_shift,
                         Tokens out, Sizes sizes, float eps) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Place at = place_of_block(sizes);
    const auto row = read_row(share, row_of<const T>(x, at.b, at.l));
    write_norm_modulate(share, row, row_of<const T>(at.txt ? txt_scale : img_scale, at.b),
                        row_of<const T>(at.txt ? txt_shift : img_shift, at.b),
                        row_of<T>(out, at.b, at.l), eps);
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), VECTORS == 1 ? 2 : 1)
    norm_modulate_backward_kernel(Tokens dh, Tokens x, Rows txt_scale, Rows img_scale, Tokens dx,
                                  float* scratch, Strips strips, Sizes sizes, float eps) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Strip strip = strip_of_block(strips, sizes);
    const T* scale = row_of<const T>(strip.txt ? txt_scale : img_scale, strip.b);
    Sums<T, VECTORS, 2> sums(share, scratch);
    for (int l = strip.first; l < strip.end; ++l) {
        const auto x_row = read_row(share, row_of<const T>(x, strip.b, l));
        const auto dh_row = read_row(share, row_of<const T>(dh, strip.b, l));
        const NormGradient gradient = gradient_of(share, x_row, dh_row, scale, eps);
        share.each_tile([&](int tile) {
            const Vec row = x_row.at(share, tile), g = dh_row.at(share, tile);
            const Vec m = share.load(scale, tile);
            Vec out, scaled;
            for (int i = 0; i < WIDTH; ++i) {
                out[i] = gradient.dx(row[i], g[i] * (1 + m[i]));
                scaled[i] = g[i] * gradient.normed(row[i]);
            }
            share.store(row_of<T>(dx, strip.b, l), tile, out);
            sums.add(share, 0, tile, scaled);
            sums.add(share, 1, tile, g);
        });
    }
    sums.write(share);
}

}  // namespace

cudaError_t norm_modulate(DType dtype, Tokens x, Rows txt_scale, Rows txt_shift, Rows img_scale,
                          Rows img_shift, Tokens out, Sizes sizes, float eps,
                          const Context& context) {
    const bool vectors = aligned(dtype, x, txt_scale, txt_shift, img_scale, img_shift, out);
    const Plan plan = plan_of(sizes.C, vectors);
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        return launch(context, norm_modulate_kernel<T, VECTORS>, sizes.B * sizes.L, plan.threads,
                      sizeof(NormStorage), x, txt_scale, txt_shift, img_scale, img_shift, out,
                      sizes, eps);
    });
}

int64_t norm_modulate_backward_scratch(Sizes sizes, const Context& context) {
    return strips_of(sizes, context).in_all(sizes.B) * 2 * sizes.C;
}

cudaError_t norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Rows txt_scale, Rows img_scale,
                                   Tokens dx, Rows txt_dscale, Rows txt_dshift, Rows img_dscale,
                                   Rows img_dshift, Sizes sizes, float eps, float* scratch,
                                   const Context& context) {
    const Plan plan = plan_of(sizes.C, aligned(dtype, dh, x, txt_scale, img_scale, dx));
    const Strips strips = strips_of(sizes, context);
    const StreamGradients<2> gradients = {{txt_dscale, txt_dshift}, {img_dscale, img_dshift}};
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        const cudaError_t error =
            launch(context, norm_modulate_backward_kernel<T, VECTORS>, strips.in_all(sizes.B),
                   plan.threads, sizeof(NormStorage), dh, x, txt_scale, img_scale, dx, scratch,
                   strips, sizes, eps);
        if (error != cudaSuccess) return error;
        return sum_strips<T>(context, scratch, strips, gradients, sizes.B, sizes.B, sizes.C);
    });
}

}  // namespace fluxkern::cuda
