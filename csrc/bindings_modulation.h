// The private torch op of the modulation, as bindings.h has those over the stream; included after
// it. `kernels` declares modulation and its scratch.
#pragma once

#include "bindings.h"
#include "matrices.h"

namespace fluxkern::bindings {
namespace {

void modulation(const Tensor& vec, const Tensor& weight, std::optional<Tensor> bias,
                const Tensor& out) {
    const int64_t last = vec.dim() - 1;
    STD_TORCH_CHECK(last == 1 || last == 2, "vec must be [B, K] or [S, B, K]");
    const MatrixSizes sizes = {last == 2 ? vec.size(0) : 1, vec.size(last - 1),
                               weight.size(0), vec.size(last)};
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == sizes.K, "weight must be [N, K] of vec");
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == sizes.N), "bias must be [N]");
    STD_TORCH_CHECK(out.is_contiguous() && out.numel() == sizes.S * sizes.B * sizes.N,
                    "out must be contiguous [..., B, 1, N]");
    check_like("vec", vec, vec);
    check_like("weight", weight, vec);
    check_like("out", out, vec);
    if (bias) check_like("bias", *bias, vec);
    const Tokens rows = {vec.data_ptr(), last == 2 ? vec.stride(0) : 0, vec.stride(last - 1)};
    run(vec, [&](const kernels::Context& context) {
        const Tensor scratch = scratch_floats(vec, kernels::modulation_scratch(sizes, context));
        return kernels::modulation(dtype_of(vec), rows, Rows{weight.data_ptr(), weight.stride(0)},
                                   bias ? bias->data_ptr() : nullptr,
                                   Rows{out.data_ptr(), sizes.N}, sizes,
                                   static_cast<float*>(scratch.data_ptr()), context);
    });
}

const Op MODULATION_OPS[] = {
    {"modulation", "Tensor vec, Tensor weight, Tensor? bias, Tensor(a!) out",
     TORCH_BOX(&modulation)},
};

}  // namespace
}  // namespace fluxkern::bindings
