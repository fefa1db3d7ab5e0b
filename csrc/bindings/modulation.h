// silu(vec) weight^T + bias.
#pragma once

#include <optional>

#include "../matrices.h"
#include "backend.h"
#include "common.h"

namespace fluxkern::bindings {
namespace {

void modulation(const Tensor& vec, const Tensor& weight, std::optional<Tensor> bias,
                const Tensor& out) {
    const View v("vec", vec), w("weight", weight), to = output("out", out);
    STD_TORCH_CHECK(v.dim() == 2 || v.dim() == 3, "vec must be [B, K] or [S, B, K], got ",
                    text_of(v.sizes));
    STD_TORCH_CHECK(w.dim() == 2, "weight must be [N, K], got ", text_of(w.sizes));
    const bool flat = v.dim() == 2;
    const int64_t S = flat ? 1 : v.sizes[0], B = v.sizes[flat ? 0 : 1], N = w.sizes[0];
    const MatrixSizes sizes = {S, B, N, v.sizes.back()};
    const DType dtype = dtype_of(v.rows());
    w.like(v).has({N, sizes.K});
    to.like(v).contiguous();
    if (flat) to.has({B, 1, N});
    if (!flat) to.has({S, B, 1, N});
    const void* const shift = bias ? vector_of({"bias", *bias}, N, v) : nullptr;
    const Tokens rows = {v.data, flat ? 0 : v.strides[0], v.strides[flat ? 0 : 1]};
    run(vec, [&](const kernels::Context& context) {
        const Scratch scratch(vec, kernels::modulation_scratch(sizes, context));
        return kernels::modulation(dtype, rows, Rows{w.data, w.strides[0]}, shift, Rows{to.data, N},
                                   sizes, scratch.floats(), context);
    });
}

const Op MODULATION[] = {{"modulation", TORCH_BOX(&modulation)}};

}  // namespace
}  // namespace fluxkern::bindings
