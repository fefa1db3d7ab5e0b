// The ops that write rows [..., C] in e4m3, with a scale [..., 1] each.
#pragma once

#include "norms.h"
#include "rows.h"

namespace fluxkern::bindings {
namespace {

View fp8_out(const View& v, const View& x) {
    v.is(ScalarType::Float8_e4m3fn).beside(x).has(x.sizes).rows();
    return v;
}

float* fp8_scales(const Tensor& row_scale, const View& x) {
    STD_TORCH_CHECK(x.dim() >= 1 && x.sizes.back() > 0, x.name, " must have a channel");
    std::vector<int64_t> shape(x.sizes.begin(), x.sizes.end());
    shape.back() = 1;
    const View v("row_scale", row_scale);
    v.is(ScalarType::Float).beside(x).has(Numbers(shape)).contiguous();
    return static_cast<float*>(v.data);
}

void norm_modulate_fp8(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t txt_len,
                       double eps, const Tensor& h, const Tensor& row_scale) {
    const Stream s({"x", x}, scale, txt_len);
    float* const scales = fp8_scales(row_scale, s.x);
    const View to = fp8_out(output("h", h), s.x);
    const Tokens rows = {to.data, to.strides[0], to.strides[1]};
    run(x, [&](const kernels::Context& context) {
        return kernels::norm_modulate_fp8(s.dtype, s.tokens(s.x), s.vectors({"scale", scale}),
                                          s.vectors({"shift", shift}), rows, scales, s.sizes,
                                          float(eps), context);
    });
}

void gelu_tanh_fp8(const Tensor& x, const Tensor& y, const Tensor& row_scale) {
    const View from("x", x);
    const DType dtype = dtype_of(from.rows());
    float* const scales = fp8_scales(row_scale, from);
    const View to = fp8_out(output("y", y), from);
    each_rows<2>({&from, &to}, [&](auto& tokens, const Sizes& sizes, int64_t before) {
        run(x, [&](const kernels::Context& context) {
            return kernels::gelu_tanh_fp8(dtype, tokens[0], tokens[1], scales + before, sizes,
                                          context);
        });
    });
}

const Op FP8[] = {
    {"norm_modulate_fp8", TORCH_BOX(&norm_modulate_fp8)},
    {"gelu_tanh_fp8", TORCH_BOX(&gelu_tanh_fp8)},
};

}  // namespace
}  // namespace fluxkern::bindings
