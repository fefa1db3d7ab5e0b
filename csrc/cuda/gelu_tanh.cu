// GELU in its tanh form, as x * sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3); its backward.
// Grid: a block 2048 elements of a row, 8 a thread.
// Bytes: 2 B L C elements; backward 3 B L C.
// Accumulation: fp32, one rounding.
// Limits: B * L * C < 2^42.
#include "gelu.cuh"

namespace fluxkern::cuda {
namespace {

constexpr int THREADS = 256;

__device__ inline float slope_of(float x) {
    const Gate gate = gate_of(x);
    const float bend = 2 * gate.open * gate.shut;  // zero far out, where x * du is infinite
    return gate.open + (bend == 0 ? 0 : bend * x * ROOT * (1 + 3 * CUBIC * x * x));
}

struct Piece {  // of a block
    int64_t b, l;
    int tile;
};

__device__ inline Piece piece_of_block(const Sizes& sizes, unsigned tiles) {
    const unsigned row = blockIdx.x / tiles, length = unsigned(sizes.L);
    return {row / length, row % length, int(blockIdx.x % tiles)};
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(THREADS, 4)
    gelu_tanh_kernel(Tokens x, Tokens out, Sizes sizes, unsigned tiles) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Piece at = piece_of_block(sizes, tiles);
    Vec v = share.load(row_of<const T>(x, at.b, at.l), at.tile);
    for (int i = 0; i < WIDTH; ++i) v[i] *= gate_of(v[i]).open;
    share.store(row_of<T>(out, at.b, at.l), at.tile, v);
}

template <class T, int VECTORS>
__global__ void __launch_bounds__(THREADS, 4)
    gelu_tanh_backward_kernel(Tokens dy, Tokens x, Tokens dx, Sizes sizes, unsigned tiles) {
    const Share<T, VECTORS> share = {int(sizes.C)};
    const Piece at = piece_of_block(sizes, tiles);
    const Vec v = share.load(row_of<const T>(x, at.b, at.l), at.tile);
    Vec g = share.load(row_of<const T>(dy, at.b, at.l), at.tile);
    for (int i = 0; i < WIDTH; ++i) g[i] *= slope_of(v[i]);
    share.store(row_of<T>(dx, at.b, at.l), at.tile, g);
}

template <class Launch>
cudaError_t over_pieces(DType dtype, const Sizes& sizes, bool vectors, Launch launch) {
    const int64_t tiles = (sizes.C + THREADS * WIDTH - 1) / (THREADS * WIDTH);
    const int one = vectors && sizes.C % WIDTH == 0 ? 1 : 0;
    return with_types(dtype, one, [&]<class T, int VECTORS>() {
        if constexpr (VECTORS == 2) return cudaErrorInvalidValue;
        if constexpr (VECTORS < 2) {
            return launch.template operator()<T, VECTORS>(sizes.B * sizes.L * tiles,
                                                          unsigned(tiles));
        }
    });
}

}  // namespace

cudaError_t gelu_tanh(DType dtype, Tokens x, Tokens out, Sizes sizes, const Context& context) {
    return over_pieces(dtype, sizes, aligned(dtype, x, out),
                       [&]<class T, int VECTORS>(int64_t blocks, unsigned tiles) {
                           return launch(context, gelu_tanh_kernel<T, VECTORS>, blocks, THREADS, 0,
                                         x, out, sizes, tiles);
                       });
}

cudaError_t gelu_tanh_backward(DType dtype, Tokens dy, Tokens x, Tokens dx, Sizes sizes,
                               const Context& context) {
    return over_pieces(dtype, sizes, aligned(dtype, dy, x, dx),
                       [&]<class T, int VECTORS>(int64_t blocks, unsigned tiles) {
                           return launch(context, gelu_tanh_backward_kernel<T, VECTORS>, blocks,
                                         THREADS, 0, dy, x, dx, sizes, tiles);
                       });
}

}  // namespace fluxkern::cuda
