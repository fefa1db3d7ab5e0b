// The private torch ops of a backend, written once for all of them: schemas, checks before any
// launch, views. Included by bindings_<backend>.cpp after it has declared, in fluxkern::bindings,
//
//   namespace kernels = fluxkern::<backend>;
//   void run(const Tensor& x, Launch launch)   calls launch(const kernels::Context&) for the device
//                                              of x, and raises when the launch returns an error
//
// A kernel takes DType, then the arguments and outputs of its torch op as views, then Sizes, eps,
// scratch and Context. Single forms are joint ones with txt_len = 0.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "views.h"

namespace fluxkern::bindings {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& x) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
        "x must be float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
    if (type == ScalarType::Float) return DType::f32;
    return type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must be ",
                    torch::headeronly::toString(x.scalar_type()), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name,
                    " must be on the device of x");
    const int64_t last = t.dim() - 1;
    STD_TORCH_CHECK(last >= 0 && (t.size(last) <= 1 || t.stride(last) == 1), name,
                    " must be contiguous on its last axis");
}

Tensor scratch_floats(const Tensor& x, int64_t count) {
    return torch::stable::new_empty(x, {count}, ScalarType::Float);
}

// One call over a stream x [B, L, C].
struct Stream {
    const Tensor& x;
    const DType dtype;
    const Sizes sizes;

    Stream(const Tensor& x, int64_t txt_len)
        : x(x), dtype(dtype_of(x)), sizes(sizes_of(x, txt_len)) {}

    static Sizes sizes_of(const Tensor& x, int64_t txt_len) {
        STD_TORCH_CHECK(x.dim() == 3, "x must be [B, L, C], got ", x.dim(), " axes");
        const Sizes sizes = {x.size(0), x.size(1), x.size(2), txt_len};
        STD_TORCH_CHECK(txt_len >= 0 && txt_len <= sizes.L, "txt_len must be between 0 and ",
                        sizes.L, ", got ", txt_len);
        return sizes;
    }

    Tokens tokens(const char* name, const Tensor& t) const {
        STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == sizes.B && t.size(1) == sizes.L &&
                            t.size(2) == sizes.C,
                        name, " must have the shape of x");
        check_like(name, t, x);
        return {t.data_ptr(), t.stride(0), t.stride(1)};
    }

    Rows rows(const char* name, const Tensor& t) const {
        const bool flat = t.dim() == 2, deep = t.dim() == 3 && t.size(1) == 1;
        STD_TORCH_CHECK((flat || deep) && t.size(0) == sizes.B && t.size(t.dim() - 1) == sizes.C,
                        name, " must be [B, 1, C] or [B, C] of x");
        check_like(name, t, x);
        return {t.data_ptr(), t.stride(0)};
    }

    Rows gradient(const char* name, const Tensor& t) const {
        return t.defined() ? rows(name, t) : Rows{nullptr, 0};
    }
};

// norm_modulate

void joint_norm_modulate(const Tensor& x, const Tensor& txt_scale, const Tensor& txt_shift,
                         const Tensor& img_scale, const Tensor& img_shift, int64_t txt_len,
                         double eps, const Tensor& out) {
    const Stream s(x, txt_len);
    run(x, [&](const kernels::Context& context) {
        return kernels::norm_modulate(s.dtype, s.tokens("x", x), s.rows("scale", txt_scale),
                                      s.rows("shift", txt_shift), s.rows("scale", img_scale),
                                      s.rows("shift", img_shift), s.tokens("out", out), s.sizes,
                                      float(eps), context);
    });
}

void norm_modulate(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps,
                   const Tensor& out) {
    joint_norm_modulate(x, scale, shift, scale, shift, 0, eps, out);
}

void joint_norm_modulate_backward(const Tensor& dh, const Tensor& x, const Tensor& txt_scale,
                                  const Tensor& img_scale, int64_t txt_len, double eps,
                                  const Tensor& dx, const Tensor& txt_dscale,
                                  const Tensor& txt_dshift, const Tensor& img_dscale,
                                  const Tensor& img_dshift) {
    const Stream s(x, txt_len);
    run(x, [&](const kernels::Context& context) {
        const Tensor scratch =
            scratch_floats(x, kernels::norm_modulate_backward_scratch(s.sizes, context));
        return kernels::norm_modulate_backward(
            s.dtype, s.tokens("dh", dh), s.tokens("x", x), s.rows("scale", txt_scale),
            s.rows("scale", img_scale), s.tokens("dx", dx), s.gradient("dscale", txt_dscale),
            s.gradient("dshift", txt_dshift), s.gradient("dscale", img_dscale),
            s.gradient("dshift", img_dshift), s.sizes, float(eps),
            static_cast<float*>(scratch.data_ptr()), context);
    });
}

void norm_modulate_backward(const Tensor& dh, const Tensor& x, const Tensor& scale, double eps,
                            const Tensor& dx, const Tensor& dscale, const Tensor& dshift) {
    const Tensor none;
    joint_norm_modulate_backward(dh, x, scale, scale, 0, eps, dx, none, none, dscale, dshift);
}

// gated_residual

void joint_gated_residual(const Tensor& x, const Tensor& y, const Tensor& txt_gate,
                          const Tensor& img_gate, int64_t txt_len, const Tensor& x_new) {
    const Stream s(x, txt_len);
    run(x, [&](const kernels::Context& context) {
        return kernels::gated_residual(s.dtype, s.tokens("x", x), s.tokens("y", y),
                                       s.rows("gate", txt_gate), s.rows("gate", img_gate),
                                       s.tokens("x_new", x_new), s.sizes, context);
    });
}

void gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& x_new) {
    joint_gated_residual(x, y, gate, gate, 0, x_new);
}

void joint_gated_residual_backward(const Tensor& dx_new, const Tensor& y, const Tensor& txt_gate,
                                   const Tensor& img_gate, int64_t txt_len, const Tensor& dy,
                                   const Tensor& txt_dgate, const Tensor& img_dgate) {
    const Stream s(y, txt_len);
    run(y, [&](const kernels::Context& context) {
        const Tensor scratch =
            scratch_floats(y, kernels::gated_residual_backward_scratch(s.sizes, context));
        return kernels::gated_residual_backward(
            s.dtype, s.tokens("dx_new", dx_new), s.tokens("y", y), s.rows("gate", txt_gate),
            s.rows("gate", img_gate), s.tokens("dy", dy), s.gradient("dgate", txt_dgate),
            s.gradient("dgate", img_dgate), s.sizes, static_cast<float*>(scratch.data_ptr()),
            context);
    });
}

void gated_residual_backward(const Tensor& dx_new, const Tensor& y, const Tensor& gate,
                             const Tensor& dy, const Tensor& dgate) {
    joint_gated_residual_backward(dx_new, y, gate, gate, 0, dy, Tensor(), dgate);
}

// gated_residual_norm_modulate

void joint_gated_residual_norm_modulate(const Tensor& x, const Tensor& y, const Tensor& txt_gate,
                                        const Tensor& txt_scale, const Tensor& txt_shift,
                                        const Tensor& img_gate, const Tensor& img_scale,
                                        const Tensor& img_shift, int64_t txt_len, double eps,
                                        const Tensor& x_new, const Tensor& h) {
    const Stream s(x, txt_len);
    run(x, [&](const kernels::Context& context) {
        return kernels::gated_residual_norm_modulate(
            s.dtype, s.tokens("x", x), s.tokens("y", y), s.rows("gate", txt_gate),
            s.rows("scale", txt_scale), s.rows("shift", txt_shift), s.rows("gate", img_gate),
            s.rows("scale", img_scale), s.rows("shift", img_shift), s.tokens("x_new", x_new),
            s.tokens("h", h), s.sizes, float(eps), context);
    });
}

void gated_residual_norm_modulate(const Tensor& x, const Tensor& y, const Tensor& gate,
                                  const Tensor& scale, const Tensor& shift, double eps,
                                  const Tensor& x_new, const Tensor& h) {
    joint_gated_residual_norm_modulate(x, y, gate, scale, shift, gate, scale, shift, 0, eps, x_new,
                                       h);
}

void joint_gated_residual_norm_modulate_backward(
    const Tensor& dx_new, const Tensor& dh, const Tensor& x_new, const Tensor& y,
    const Tensor& txt_gate, const Tensor& txt_scale, const Tensor& img_gate,
    const Tensor& img_scale, int64_t txt_len, double eps, const Tensor& dx, const Tensor& dy,
    const Tensor& txt_dgate, const Tensor& txt_dscale, const Tensor& txt_dshift,
    const Tensor& img_dgate, const Tensor& img_dscale, const Tensor& img_dshift) {
    const Stream s(x_new, txt_len);
    run(x_new, [&](const kernels::Context& context) {
        const Tensor scratch = scratch_floats(
            x_new, kernels::gated_residual_norm_modulate_backward_scratch(s.sizes, context));
        return kernels::gated_residual_norm_modulate_backward(
            s.dtype, s.tokens("dx_new", dx_new), s.tokens("dh", dh), s.tokens("x_new", x_new),
            s.tokens("y", y), s.rows("gate", txt_gate), s.rows("scale", txt_scale),
            s.rows("gate", img_gate), s.rows("scale", img_scale), s.tokens("dx", dx),
            s.tokens("dy", dy), s.gradient("dgate", txt_dgate), s.gradient("dscale", txt_dscale),
            s.gradient("dshift", txt_dshift), s.gradient("dgate", img_dgate),
            s.gradient("dscale", img_dscale), s.gradient("dshift", img_dshift), s.sizes, float(eps),
            static_cast<float*>(scratch.data_ptr()), context);
    });
}

void gated_residual_norm_modulate_backward(const Tensor& dx_new, const Tensor& dh,
                                           const Tensor& x_new, const Tensor& y,
                                           const Tensor& gate, const Tensor& scale, double eps,
                                           const Tensor& dx, const Tensor& dy, const Tensor& dgate,
                                           const Tensor& dscale, const Tensor& dshift) {
    const Tensor none;
    joint_gated_residual_norm_modulate_backward(dx_new, dh, x_new, y, gate, scale, gate, scale, 0,
                                                eps, dx, dy, none, none, none, dgate, dscale,
                                                dshift);
}

// registration

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

struct Op {
    const char *name, *arguments;
    Boxed run;
};

const Op OPS[] = {
    {"norm_modulate", "Tensor x, Tensor scale, Tensor shift, float eps, Tensor(a!) out",
     TORCH_BOX(&norm_modulate)},
    {"joint_norm_modulate",
     "Tensor x, Tensor txt_scale, Tensor txt_shift, Tensor img_scale, Tensor img_shift, "
     "int txt_len, float eps, Tensor(a!) out",
     TORCH_BOX(&joint_norm_modulate)},
    {"norm_modulate_backward",
     "Tensor dh, Tensor x, Tensor scale, float eps, Tensor(a!) dx, Tensor(b!) dscale, "
     "Tensor(c!) dshift",
     TORCH_BOX(&norm_modulate_backward)},
    {"joint_norm_modulate_backward",
     "Tensor dh, Tensor x, Tensor txt_scale, Tensor img_scale, int txt_len, float eps, "
     "Tensor(a!) dx, Tensor(b!) txt_dscale, Tensor(c!) txt_dshift, Tensor(d!) img_dscale, "
     "Tensor(e!) img_dshift",
     TORCH_BOX(&joint_norm_modulate_backward)},
    {"gated_residual", "Tensor x, Tensor y, Tensor gate, Tensor(a!) x_new",
     TORCH_BOX(&gated_residual)},
    {"joint_gated_residual",
     "Tensor x, Tensor y, Tensor txt_gate, Tensor img_gate, int txt_len, Tensor(a!) x_new",
     TORCH_BOX(&joint_gated_residual)},
    {"gated_residual_backward",
     "Tensor dx_new, Tensor y, Tensor gate, Tensor(a!) dy, Tensor(b!) dgate",
     TORCH_BOX(&gated_residual_backward)},
    {"joint_gated_residual_backward",
     "Tensor dx_new, Tensor y, Tensor txt_gate, Tensor img_gate, int txt_len, Tensor(a!) dy, "
     "Tensor(b!) txt_dgate, Tensor(c!) img_dgate",
     TORCH_BOX(&joint_gated_residual_backward)},
    {"gated_residual_norm_modulate",
     "Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps, Tensor(a!) x_new, "
     "Tensor(b!) h",
     TORCH_BOX(&gated_residual_norm_modulate)},
    {"joint_gated_residual_norm_modulate",
     "Tensor x, Tensor y, Tensor txt_gate, Tensor txt_scale, Tensor txt_shift, Tensor img_gate, "
     "Tensor img_scale, Tensor img_shift, int txt_len, float eps, Tensor(a!) x_new, Tensor(b!) h",
     TORCH_BOX(&joint_gated_residual_norm_modulate)},
    {"gated_residual_norm_modulate_backward",
     "Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor gate, Tensor scale, float eps, "
     "Tensor(a!) dx, Tensor(b!) dy, Tensor(c!) dgate, Tensor(d!) dscale, Tensor(e!) dshift",
     TORCH_BOX(&gated_residual_norm_modulate_backward)},
    {"joint_gated_residual_norm_modulate_backward",
     "Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor txt_gate, Tensor txt_scale, "
     "Tensor img_gate, Tensor img_scale, int txt_len, float eps, Tensor(a!) dx, Tensor(b!) dy, "
     "Tensor(c!) txt_dgate, Tensor(d!) txt_dscale, Tensor(e!) txt_dshift, Tensor(f!) img_dgate, "
     "Tensor(g!) img_dscale, Tensor(h!) img_dshift",
     TORCH_BOX(&joint_gated_residual_norm_modulate_backward)},
};

void define_ops(torch::stable::detail::StableLibrary& library) {
    for (const Op& op : OPS) {
        library.def((std::string(op.name) + "(" + op.arguments + ") -> ()").c_str());
    }
}

void implement_ops(torch::stable::detail::StableLibrary& library) {
    for (const Op& op : OPS) library.impl(op.name, op.run);
}

}  // namespace
}  // namespace fluxkern::bindings
