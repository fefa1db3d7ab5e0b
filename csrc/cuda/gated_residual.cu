// x_new = x + gate * y, and its backward.
// Grid: forward a block a token; backward a block a span of tokens.
// Bytes: 3 B L C elements either way, and backward fp32 partial sums of about 1/20 of it.
// Accumulation: fp32, sums over tokens in a fixed order.
// Limits: B * L < 2^31.
#include "partials.cuh"

namespace fluxkern::cuda {
namespace {

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), VECTORS == 1 ? 3 : 2)
    gated_residual_kernel(Tokens x, Tokens y, Vectors gate, Tokens out, Sizes sizes) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Place at = place_of_block(sizes);
    const T* gate_row = row_of<const T>(gate, at.b, at.txt);
    share.each_tile([&](int tile) {
        Vec sum = share.load(row_of<const T>(x, at.b, at.l), tile);
        const Vec branch = share.load(row_of<const T>(y, at.b, at.l), tile);
        const Vec g = share.load(gate_row, tile);
        for (int i = 0; i < WIDTH; ++i) sum[i] += g[i] * branch[i];
        share.store(row_of<T>(out, at.b, at.l), tile, sum);
    });
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), 2)
    gated_residual_backward_kernel(Tokens dx_new, Tokens y, Vectors gate, Tokens dy, float* scratch,
                                   Partials partials, Sizes sizes) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Span span = span_of_block(partials, sizes);
    const T* gate_row = row_of<const T>(gate, span.b, span.txt);
    Sums<T, VECTORS, 1> sums(share, scratch);
    for (int l = span.first; l < span.end; ++l) {
        share.each_tile([&](int tile) {
            const Vec dx = share.load(row_of<const T>(dx_new, span.b, l), tile);
            const Vec branch = share.load(row_of<const T>(y, span.b, l), tile);
            const Vec g = share.load(gate_row, tile);
            Vec out, product;
            for (int i = 0; i < WIDTH; ++i) {
                out[i] = g[i] * dx[i];
                product[i] = dx[i] * branch[i];
            }
            share.store(row_of<T>(dy, span.b, l), tile, out);
            sums.add(share, 0, tile, product);
        });
    }
    sums.write(share);
}

}  // namespace

cudaError_t gated_residual(DType dtype, Tokens x, Tokens y, Vectors gate, Tokens out, Sizes sizes,
                           const Context& context) {
    const Plan plan = plan_of(sizes.C, aligned(dtype, x, y, gate, out));
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        return launch(context, gated_residual_kernel<T, VECTORS>, sizes.B * sizes.L, plan.threads,
                      0, x, y, gate, out, sizes);
    });
}

int64_t gated_residual_backward_scratch(Sizes sizes, const Context& context) {
    return partials_of(sizes, context).in_all(sizes.B) * sizes.C;
}

cudaError_t gated_residual_backward(DType dtype, Tokens dx_new, Tokens y, Vectors gate, Tokens dy,
                                    Vectors dgate, Sizes sizes, float* scratch,
                                    const Context& context) {
    const Plan plan = plan_of(sizes.C, aligned(dtype, dx_new, y, gate, dy));
    const Partials partials = partials_of(sizes, context);
    return with_types(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        const cudaError_t error =
            launch(context, gated_residual_backward_kernel<T, VECTORS>, partials.in_all(sizes.B),
                   plan.threads, 0, dx_new, y, gate, dy, scratch, partials, sizes);
        if (error != cudaSuccess) return error;
        return sum_partials<T>(context, scratch, partials, {dgate}, sizes);
    });
}

}  // namespace fluxkern::cuda
