// h = layer_norm(x) * (1 + scale) + shift, and its backward.
// Grid: forward a block a token, the row in registers; backward a block a span of tokens.
// Bytes: forward 2 B L C elements; backward 3 B L C, and fp32 partial sums of about 1/20 of it.
// Accumulation: fp32; mean first, then squares about it; sums over tokens in a fixed order.
// Limits: B * L < 2^31; rows beyond C = 6144, of odd C or misaligned are read again, not kept.
#include "norm.cuh"
#include "partials.cuh"

namespace fluxkern::cuda {
namespace {

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), VECTORS == 1 ? 3 : 2)
    norm_modulate_kernel(Tokens x, Vectors scale, Vectors shift, Tokens out, Sizes sizes,
                         float eps) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Place at = place_of_block(sizes);
    const auto row = read_row(share, row_of<const T>(x, at.b, at.l));
    write_norm_modulate(share, row, row_of<const T>(scale, at.b, at.txt),
                        row_of<const T>(shift, at.b, at.txt), row_of<T>(out, at.b, at.l), eps);
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), VECTORS == 1 ? 2 : 1)
    norm_modulate_backward_kernel(Tokens dh, Tokens x, Vectors scale, Tokens dx, float* scratch,
                                  Partials partials, Sizes sizes, float eps) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Span span = span_of_block(partials, sizes);
    const T* scale_row = row_of<const T>(scale, span.b, span.txt);
    Sums<T, VECTORS, 2> sums(share, scratch);
    for (int l = span.first; l < span.end; ++l) {
        const auto x_row = read_row(share, row_of<const T>(x, span.b, l));
        const auto dh_row = read_row(share, row_of<const T>(dh, span.b, l));
        const NormGradient gradient = gradient_of(share, x_row, dh_row, scale_row, eps);
        share.each_tile([&](int tile) {
            const Vec row = x_row.at(share, tile), g = dh_row.at(share, tile);
            const Vec m = share.load(scale_row, tile);
            Vec out, scaled;
            for (int i = 0; i < WIDTH; ++i) {
                out[i] = gradient.dx(row[i], g[i] * (1 + m[i]));
                scaled[i] = g[i] * gradient.normed(row[i]);
            }
            share.store(row_of<T>(dx, span.b, l), tile, out);
            sums.add(share, 0, tile, scaled);
            sums.add(share, 1, tile, g);
        });
    }
    sums.write(share);
}

}  // namespace

cudaError_t norm_modulate(DType dtype, Tokens x, Vectors scale, Vectors shift, Tokens out,
                          Sizes sizes, float eps, const Context& context) {
    const Plan plan = plan_of(sizes.C, aligned(dtype, x, scale, shift, out));
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        return launch(context, norm_modulate_kernel<T, VECTORS>, sizes.B * sizes.L, plan.threads,
                      sizeof(NormStorage), x, scale, shift, out, sizes, eps);
    });
}

int64_t norm_modulate_backward_scratch(Sizes sizes, const Context& context) {
    return partials_of(sizes, context).in_all(sizes.B) * 2 * sizes.C;
}

cudaError_t norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Vectors scale, Tokens dx,
                                   Vectors dscale, Vectors dshift, Sizes sizes, float eps,
                                   float* scratch, const Context& context) {
    const Plan plan = plan_of(sizes.C, aligned(dtype, dh, x, scale, dx));
    const Partials partials = partials_of(sizes, context);
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        const cudaError_t error =
            launch(context, norm_modulate_backward_kernel<T, VECTORS>, partials.in_all(sizes.B),
                   plan.threads, sizeof(NormStorage), dh, x, scale, dx, scratch, partials,
                   sizes, eps);
        if (error != cudaSuccess) return error;
        return sum_partials<T>(context, scratch, partials, {dscale, dshift}, sizes);
    });
}

}  // namespace fluxkern::cuda
