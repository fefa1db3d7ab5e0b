// h = layer_norm(x) * (1 + scale) + shift, and its backward.
// Grid: forward a block a token, the row in registers; backward a block a strip of tokens.
// Bytes: forward 2 B L C elements; backward 3 B L C, and fp32 partial sums of about 1/20 of it.
// Accumulation: fp32; mean first, then squares about it; sums over tokens in a fixed order.
// Limits: B * L < 2^31; rows beyond C = 8192, of odd C or misaligned are read again, not kept.
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
    for (int64_t l = strip.first; l < strip.end; ++l) {
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

}  // namespace fluxkern::cuda
