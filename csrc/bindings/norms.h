// The ops over a stream [B, L, C] with vectors [B, S, C]: norm_modulate, gated_residual and both.
#pragma once

#include "backend.h"
#include "common.h"

namespace fluxkern::bindings {
namespace {

// One call over a stream; all its vectors have the S of the one that it is made of.
struct Stream {
    const View x;
    const DType dtype;
    const int64_t S;
    const Sizes sizes;

    Stream(const View& x, const Tensor& vector, int64_t txt_len)
        : x(x), dtype(dtype_of(x)), S(streams_of(vector)), sizes(sizes_of(x, S, txt_len)) {}

    static int64_t streams_of(const Tensor& vector) {
        const int64_t S = vector.dim() == 3 ? vector.size(1) : 0;
        STD_TORCH_CHECK(S == 1 || S == 2, "vectors must be [B, S, C] of 1 or 2 streams");
        return S;
    }
    static Sizes sizes_of(const View& x, int64_t S, int64_t txt_len) {
        STD_TORCH_CHECK(x.dim() == 3, x.name, " must be [B, L, C], got ", text_of(x.sizes));
        STD_TORCH_CHECK(x.sizes[0] * x.sizes[1] <= kernels::MOST_TOKENS, x.name,
                        " must have at most ", kernels::MOST_TOKENS, " tokens, got ",
                        text_of(x.sizes));
        const int64_t most = S == 1 ? 0 : x.sizes[1];
        STD_TORCH_CHECK(txt_len >= 0 && txt_len <= most, "txt_len must be between 0 and ", most,
                        " with ", S, " streams, got ", txt_len);
        return {x.sizes[0], x.sizes[1], x.sizes[2], txt_len};
    }

    Tokens tokens(const View& t) const {
        t.like(x).has(x.sizes);
        return {t.data, t.strides[0], t.strides[1]};
    }
    Vectors vectors(const View& v) const {
        v.like(x).has({sizes.B, S, sizes.C});
        return {v.data, v.strides[0], S == 2 ? v.strides[1] : 0};
    }
    Vectors gradient(const View& v) const {
        return vectors(v.contiguous());
    }
};

void norm_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t txt_len,
                   double eps, const Tensor& h) {
    const Stream s({"x", x}, scale, txt_len);
    run(x, [&](const kernels::Context& context) {
        return kernels::norm_modulate(s.dtype, s.tokens(s.x), s.vectors({"scale", scale}),
                                      s.vectors({"shift", shift}), s.tokens(output("h", h)),
                                      s.sizes, float(eps), context);
    });
}

void norm_modulate_backward(const Tensor& dh, const Tensor& x, const Tensor& scale, int64_t txt_len,
                            double eps, const Tensor& dx, const Tensor& dscale,
                            const Tensor& dshift) {
    const Stream s({"x", x}, scale, txt_len);
    run(x, [&](const kernels::Context& context) {
        const Scratch scratch(x, kernels::norm_modulate_backward_scratch(s.sizes, context));
        return kernels::norm_modulate_backward(
            s.dtype, s.tokens({"dh", dh}), s.tokens(s.x), s.vectors({"scale", scale}),
            s.tokens(output("dx", dx)), s.gradient({"dscale", dscale}),
            s.gradient({"dshift", dshift}), s.sizes, float(eps), scratch.floats(), context);
    });
}

void gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, int64_t txt_len,
                    const Tensor& x_new) {
    const Stream s({"x", x}, gate, txt_len);
    run(x, [&](const kernels::Context& context) {
        return kernels::gated_residual(s.dtype, s.tokens(s.x), s.tokens({"y", y}),
                                       s.vectors({"gate", gate}), s.tokens(output("x_new", x_new)),
                                       s.sizes, context);
    });
}

void gated_residual_backward(const Tensor& dx_new, const Tensor& y, const Tensor& gate,
                             int64_t txt_len, const Tensor& dy, const Tensor& dgate) {
    const Stream s({"y", y}, gate, txt_len);
    run(y, [&](const kernels::Context& context) {
        const Scratch scratch(y, kernels::gated_residual_backward_scratch(s.sizes, context));
        return kernels::gated_residual_backward(
            s.dtype, s.tokens({"dx_new", dx_new}), s.tokens(s.x), s.vectors({"gate", gate}),
            s.tokens(output("dy", dy)), s.gradient({"dgate", dgate}), s.sizes, scratch.floats(),
            context);
    });
}

void gated_residual_norm_modulate(const Tensor& x, const Tensor& y, const Tensor& gate,
                                  const Tensor& scale, const Tensor& shift, int64_t txt_len,
                                  double eps, const Tensor& x_new, const Tensor& h) {
    const Stream s({"x", x}, gate, txt_len);
    run(x, [&](const kernels::Context& context) {
        return kernels::gated_residual_norm_modulate(
            s.dtype, s.tokens(s.x), s.tokens({"y", y}), s.vectors({"gate", gate}),
            s.vectors({"scale", scale}), s.vectors({"shift", shift}),
            s.tokens(output("x_new", x_new)), s.tokens(output("h", h)), s.sizes, float(eps),
            context);
    });
}

void gated_residual_norm_modulate_backward(const Tensor& dx_new, const Tensor& dh,
                                           const Tensor& x_new, const Tensor& y, const Tensor& gate,
                                           const Tensor& scale, int64_t txt_len, double eps,
                                           const Tensor& dx, const Tensor& dy, const Tensor& dgate,
                                           const Tensor& dscale, const Tensor& dshift) {
    const Stream s({"x_new", x_new}, gate, txt_len);
    run(x_new, [&](const kernels::Context& context) {
        const Scratch scratch(
            x_new, kernels::gated_residual_norm_modulate_backward_scratch(s.sizes, context));
        return kernels::gated_residual_norm_modulate_backward(
            s.dtype, s.tokens({"dx_new", dx_new}), s.tokens({"dh", dh}), s.tokens(s.x),
            s.tokens({"y", y}), s.vectors({"gate", gate}), s.vectors({"scale", scale}),
            s.tokens(output("dx", dx)), s.tokens(output("dy", dy)), s.gradient({"dgate", dgate}),
            s.gradient({"dscale", dscale}), s.gradient({"dshift", dshift}), s.sizes, float(eps),
            scratch.floats(), context);
    });
}

const Op NORMS[] = {
    {"norm_modulate", TORCH_BOX(&norm_modulate)},
    {"norm_modulate_backward", TORCH_BOX(&norm_modulate_backward)},
    {"gated_residual", TORCH_BOX(&gated_residual)},
    {"gated_residual_backward", TORCH_BOX(&gated_residual_backward)},
    {"gated_residual_norm_modulate", TORCH_BOX(&gated_residual_norm_modulate)},
    {"gated_residual_norm_modulate_backward", TORCH_BOX(&gated_residual_norm_modulate_backward)},
};

}  // namespace
}  // namespace fluxkern::bindings
