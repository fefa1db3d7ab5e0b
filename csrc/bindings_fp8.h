// The private torch ops that write rows in e4m3 with a scale each, as bindings.h has those over the
// stream; included after bindings_gelu_tanh.h.
#pragma once

#include "bindings_gelu_tanh.h"

namespace fluxkern::bindings {
namespace {

// out: the shape of x; row_scale: [..., 1] of it, contiguous
float* check_fp8(const Tensor& x, const Tensor& out, const Tensor& row_scale) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x must have a channel");
    bool same = out.dim() == x.dim() && row_scale.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) {
        same = out.size(d) == x.size(d) && row_scale.size(d) == (d < x.dim() - 1 ? x.size(d) : 1);
    }
    STD_TORCH_CHECK(same, "out must have the shape of x, and row_scale with one channel");
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float8_e4m3fn, "out must be float8_e4m3fn");
    STD_TORCH_CHECK(row_scale.scalar_type() == ScalarType::Float && row_scale.is_contiguous(),
                    "row_scale must be float32 and contiguous");
    for (const Tensor* t : {&out, &row_scale}) {
        STD_TORCH_CHECK(t->is_cpu() == x.is_cpu() && t->get_device_index() == x.get_device_index(),
                        "out and row_scale must be on the device of x");
    }
    STD_TORCH_CHECK(out.size(out.dim() - 1) <= 1 || out.stride(out.dim() - 1) == 1,
                    "out must be contiguous on its last axis");
    return static_cast<float*>(row_scale.data_ptr());
}

void norm_modulate_fp8(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps,
                       const Tensor& out, const Tensor& row_scale) {
    const Stream s(x, 0);
    float* const scales = check_fp8(x, out, row_scale);
    const Tokens bytes = {out.data_ptr(), out.stride(0), out.stride(1)};
    run(x, [&](const kernels::Context& context) {
        return kernels::norm_modulate_fp8(s.dtype, s.tokens("x", x), s.rows("scale", scale),
                                          s.rows("shift", shift), bytes, scales, s.sizes,
                                          float(eps), context);
    });
}

void gelu_tanh_fp8(const Tensor& x, const Tensor& out, const Tensor& row_scale) {
    check_shape("x", x, x);
    float* const scales = check_fp8(x, out, row_scale);
    const auto flat = flattened({&x, &out});
    run(x, [&](const kernels::Context& context) {
        return kernels::gelu_tanh_fp8(dtype_of(x), flat.tokens[0], flat.tokens[1], scales,
                                      flat.sizes, context);
    });
}

const Op FP8_OPS[] = {
    {"norm_modulate_fp8",
     "Tensor x, Tensor scale, Tensor shift, float eps, Tensor(a!) out, Tensor(b!) row_scale",
     TORCH_BOX(&norm_modulate_fp8)},
    {"gelu_tanh_fp8", "Tensor x, Tensor(a!) out, Tensor(b!) row_scale", TORCH_BOX(&gelu_tanh_fp8)},
};

}  // namespace
}  // namespace fluxkern::bindings
