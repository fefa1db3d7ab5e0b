// x_new = x + gate * y; h = layer_norm(x_new) * (1 + scale) + shift; and the backward of both.
// Grid: forward a block a token, the row in registers; backward a block a span of tokens.
// Bytes: forward 4 B L C elements; backward 6 B L C, and fp32 partial sums of about 1/20 of it.
// Accumulation: fp32; x_new is rounded to its dtype before the norm; sums in a fixed order.
// Limits: B * L < 2^31; rows beyond C = 6144, of odd C or misaligned are read again, not kept.
#include "norm.cuh"
#include "partials.cuh"

namespace fluxkern::cuda {
namespace {

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), VECTORS == 1 ? 3 : 2)
    gated_residual_norm_modulate_kernel(Tokens x, Tokens y, Vectors gate, Vectors scale,
                                        Vectors shift, Tokens x_new, Tokens h, Sizes sizes,
                                        float eps) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Place at = place_of_block(sizes);
    const T* gate_row = row_of<const T>(gate, at.b, at.txt);
    T* const stream = row_of<T>(x_new, at.b, at.l);
    Kept<T, VECTORS> row = {stream, {}};
    share.each_tile([&](int tile) {
        Vec sum = share.load(row_of<const T>(x, at.b, at.l), tile);
        const Vec branch = share.load(row_of<const T>(y, at.b, at.l), tile);
        const Vec g = share.load(gate_row, tile);
        for (int i = 0; i < WIDTH; ++i) sum[i] += g[i] * branch[i];
        share.store(stream, tile, sum);
        row.keep(tile, pack<T>(sum));
    });
    write_norm_modulate(share, row, row_of<const T>(scale, at.b, at.txt),
                        row_of<const T>(shift, at.b, at.txt), row_of<T>(h, at.b, at.l), eps);
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), sizeof(T) == 2 && VECTORS == 1 ? 2 : 1)
    gated_residual_norm_modulate_backward_kernel(Tokens dx_new, Tokens dh, Tokens x_new, Tokens y,
                                                 Vectors gate, Vectors scale, Tokens dx, Tokens dy,
                                                 float* scratch, Partials partials, Sizes sizes,
                                                 float eps) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Span span = span_of_block(partials, sizes);
    Sums<T, VECTORS, 3> sums(share, scratch);
    for (int l = span.first; l < span.end; ++l) {
        const int64_t b = not_hoisted(span.b);
        const T* gate_row = row_of<const T>(gate, b, span.txt);
        const T* scale_row = row_of<const T>(scale, b, span.txt);
        const auto x_row = read_row(share, row_of<const T>(x_new, b, l));
        const auto dh_row = read_row(share, row_of<const T>(dh, b, l));
        const NormGradient gradient = gradient_of(share, x_row, dh_row, scale_row, eps);
        share.each_tile([&](int tile) {
            const Vec row = x_row.at(share, tile), g = dh_row.at(share, tile);
            const Vec m = share.load(scale_row, tile);
            Vec out = share.load(row_of<const T>(dx_new, b, l), tile), scaled;
            for (int i = 0; i < WIDTH; ++i) {
                out[i] += gradient.dx(row[i], g[i] * (1 + m[i]));
                scaled[i] = g[i] * gradient.normed(row[i]);
            }
            share.store(row_of<T>(dx, b, l), tile, out);
            sums.add(share, 1, tile, scaled);
            sums.add(share, 2, tile, g);
            const Vec branch = share.load(row_of<const T>(y, b, l), tile);
            const Vec gates = share.load(gate_row, tile);
            Vec branch_out, product;
            for (int i = 0; i < WIDTH; ++i) {
                branch_out[i] = gates[i] * out[i];
                product[i] = out[i] * branch[i];
            }
            share.store(row_of<T>(dy, b, l), tile, branch_out);
            sums.add(share, 0, tile, product);
        });
    }
    sums.write(share);
}

}  // namespace

cudaError_t gated_residual_norm_modulate(DType dtype, Tokens x, Tokens y, Vectors gate,
                                         Vectors scale, Vectors shift, Tokens x_new, Tokens h,
                                         Sizes sizes, float eps, const Context& context) {
    const bool vectors = aligned(dtype, x, y, gate, scale, shift, x_new, h);
    const Plan plan = plan_of(sizes.C, vectors);
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        return launch(context, gated_residual_norm_modulate_kernel<T, VECTORS>, sizes.B * sizes.L,
                      plan.threads, sizeof(NormStorage), x, y, gate, scale, shift, x_new, h, sizes,
                      eps);
    });
}

int64_t gated_residual_norm_modulate_backward_scratch(Sizes sizes, const Context& context) {
    return partials_of(sizes, context).in_all(sizes.B) * 3 * sizes.C;
}

cudaError_t gated_residual_norm_modulate_backward(DType dtype, Tokens dx_new, Tokens dh,
                                                  Tokens x_new, Tokens y, Vectors gate,
                                                  Vectors scale, Tokens dx, Tokens dy,
                                                  Vectors dgate, Vectors dscale, Vectors dshift,
                                                  Sizes sizes, float eps, float* scratch,
                                                  const Context& context) {
    const bool vectors = aligned(dtype, dx_new, dh, x_new, y, gate, scale, dx, dy);
    const Plan plan = plan_of(sizes.C, vectors);
    const Partials partials = partials_of(sizes, context);
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        const cudaError_t error =
            launch(context, gated_residual_norm_modulate_backward_kernel<T, VECTORS>,
                   partials.in_all(sizes.B), plan.threads, sizeof(NormStorage), dx_new, dh, x_new,
                   y, gate, scale, dx, dy, scratch, partials, sizes, eps);
        if (error != cudaSuccess) return error;
        return sum_partials<T>(context, scratch, partials, {dgate, dscale, dshift}, sizes);
    });
}

}  // namespace fluxkern::cuda
