// h = layer_norm(x) * (1 + scale) + shift, in e4m3 with a scale a row.
// Grid: a block a token, the row in registers.
// Bytes: reads B L C elements, writes as many bytes and B L floats.
// Accumulation: fp32; mean first, then squares about it; one rounding, to e4m3.
// Limits: B * L < 2^31; rows beyond C = 6144, no multiple of 16 or misaligned are read again.
#include "fp8.cuh"
#include "norm.cuh"

namespace fluxkern::cuda {
namespace {

struct Storage {
    NormStorage norm;
    uint32_t top[WARP];
};

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), 2)
    norm_modulate_fp8_kernel(Tokens x, Vectors scale, Vectors shift, Tokens out,
                             float* row_scale, Sizes sizes, float eps) {
    const Fp8Share<T, VECTORS> share = {int(sizes.C)};
    const Place at = place_of_block(sizes);
    Storage& storage = shared<Storage>();
    const auto row = read_row(share, row_of<const T>(x, at.b, at.l));
    const Statistics s = statistics_of(share, row, eps, storage.norm);
    const T *m = row_of<const T>(scale, at.b, at.txt), *a = row_of<const T>(shift, at.b, at.txt);
    write_fp8_row(share, row_of<uint8_t>(out, at.b, at.l), row_scale + blockIdx.x, storage.top,
                  [&](int tile) { return modulated(share, row, s, m, a, tile); });
}

}  // namespace

cudaError_t norm_modulate_fp8(DType dtype, Tokens x, Vectors scale, Vectors shift, Tokens out,
                              float* row_scale, Sizes sizes, float eps, const Context& context) {
    const bool vectors = aligned(dtype, x, scale, shift) && fp8_aligned(out);
    const Plan plan = fp8_plan_of(sizes.C, vectors, 2);
    return with_fp8_plan<2>(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        return launch(context, norm_modulate_fp8_kernel<T, VECTORS>, sizes.B * sizes.L,
                      plan.threads, sizeof(Storage), x, scale, shift, out, row_scale, sizes, eps);
    });
}

}  // namespace fluxkern::cuda
