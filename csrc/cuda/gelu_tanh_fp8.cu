// y = x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), in e4m3 with a scale a row.
// Grid: a block a row, which stays in registers.
// Bytes: reads B L C elements, writes as many bytes and B L floats.
// Accumulation: fp32, one rounding, to e4m3.
// Limits: B * L < 2^31; rows beyond C = 12288, no multiple of 16 or misaligned are read twice.
#include "fp8.cuh"
#include "gelu.cuh"

namespace fluxkern::cuda {
namespace {

struct Storage {
    uint32_t top[WARP];
};

template <class T, int VECTORS>
__global__ void __launch_bounds__(threads_of(VECTORS), 2)
    gelu_tanh_fp8_kernel(Tokens x, Tokens out, float* row_scale, Sizes sizes) {
    const Fp8Share<T, VECTORS> share = {int(sizes.C)};
    const Place at = place_of_block(sizes);
    const T* row = row_of<const T>(x, at.b, at.l);
    write_fp8_row(share, row_of<uint8_t>(out, at.b, at.l), row_scale + blockIdx.x,
                  shared<Storage>().top, [&](int tile) {
                      Vec v = share.load(row, tile);
                      for (int i = 0; i < WIDTH; ++i) v[i] *= gate_of(v[i]).open;
                      return v;
                  });
}

}  // namespace

cudaError_t gelu_tanh_fp8(DType dtype, Tokens x, Tokens out, float* row_scale, Sizes sizes,
                          const Context& context) {
    const Plan plan = fp8_plan_of(sizes.C, aligned(dtype, x) && fp8_aligned(out), 4);
    return with_fp8_plan<4>(dtype, plan.vectors, [&]<class T, int VECTORS>() {
        return launch(context, gelu_tanh_fp8_kernel<T, VECTORS>, sizes.B * sizes.L, plan.threads,
                      sizeof(Storage), x, out, row_scale, sizes);
    });
}

}  // namespace fluxkern::cuda
