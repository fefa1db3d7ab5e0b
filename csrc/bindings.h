// The private ops of a compiled backend, over the stable ABI of LibTorch: schema, checks, views.
// Included by bindings_cpu.cpp and bindings_cuda.cpp, which say before it what differs:
//
//   namespace kernels = ...           fluxkern::cpu or fluxkern::cuda, with equal declarations
//   void check_device(const Tensor&, const char* name)
//   struct Call { explicit Call(const Tensor&); kernels::Context context; }   device, stream
//   void launched(int code)           raises when a launch failed
//
// An op takes what the public op takes and, after it, the outputs that it writes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>

#include "views.h"

namespace fluxkern::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
    if (t.scalar_type() == ScalarType::Float) return DType::f32;
    if (t.scalar_type() == ScalarType::BFloat16) return DType::bf16;
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, name,
                    " must be float32, bfloat16 or float16");
    return DType::f16;
}

// What the tensors of one call share, read from the first of them.
struct Like {
    DType dtype;
    Sizes sizes;

    Like(const Tensor& x, const char* name, int64_t txt_len) : dtype(dtype_of(x, name)), sizes{} {
        STD_TORCH_CHECK(x.dim() == 3, name, " must be [B, L, C], got ", x.dim(), " axes");
        sizes = {x.size(0), x.size(1), x.size(2), txt_len};
        STD_TORCH_CHECK(txt_len >= 0 && txt_len <= sizes.L, "txt_len must be between 0 and ",
                        sizes.L, ", got ", txt_len);
    }

    void check(const Tensor& t, const char* name) const {
        check_device(t, name);
        STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, " must have the dtype of the others");
        const int64_t last = t.dim() - 1;
        STD_TORCH_CHECK(t.size(last) == sizes.C, name, " must have ", sizes.C,
                        " on its last axis, got ", t.size(last));
        STD_TORCH_CHECK(sizes.C <= 1 || t.stride(last) == 1, name,
                        " must be contiguous on its last axis, got stride ", t.stride(last));
    }

    Tokens tokens(const Tensor& t, const char* name) const {
        check(t, name);
        STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == sizes.B && t.size(1) == sizes.L, name,
                        " must be [B, L, C] = [", sizes.B, ", ", sizes.L, ", ", sizes.C, "]");
        return {t.data_ptr(), t.stride(0), t.stride(1)};
    }

    Rows rows(const Tensor& t, const char* name) const {
        check(t, name);
        const bool flat = t.dim() == 2 || (t.dim() == 3 && t.size(1) == 1);
        STD_TORCH_CHECK(flat && t.size(0) == sizes.B, name, " must be [B, 1, C] or [B, C], B = ",
                        sizes.B);
        return {t.data_ptr(), t.stride(0)};
    }
};

inline Tensor scratch_like(const Tensor& t, int64_t floats) {
    const std::array<int64_t, 1> size{floats};
    return torch::stable::new_empty(t, {size.data(), size.size()}, ScalarType::Float);
}

inline float* floats_of(const Tensor& scratch) { return static_cast<float*>(scratch.data_ptr()); }

// norm_modulate

inline void joint_norm_modulate(Tensor x, Tensor txt_scale, Tensor txt_shift, Tensor img_scale,
                                Tensor img_shift, int64_t txt_len, double eps, Tensor out) {
    const Like like(x, "x", txt_len);
    const Call call(x);
    launched(kernels::norm_modulate(
        like.dtype, like.sizes, like.tokens(x, "x"), like.rows(txt_scale, "txt_scale"),
        like.rows(txt_shift, "txt_shift"), like.rows(img_scale, "img_scale"),
        like.rows(img_shift, "img_shift"), float(eps), like.tokens(out, "out"), call.context));
}

inline void norm_modulate(Tensor x, Tensor scale, Tensor shift, double eps, Tensor out) {
    joint_norm_modulate(x, scale, shift, scale, shift, 0, eps, out);
}

// Gradients of a stream that nobody asked for have no data.
inline void norm_modulate_backward_of(const Like& like, const Tensor& dh, const Tensor& x,
                                      Rows txt_scale, Rows img_scale, double eps, const Tensor& dx,
                                      std::array<Rows, 4> gradients) {
    const Call call(x);
    const Tensor scratch =
        scratch_like(x, kernels::norm_modulate_backward_scratch(like.sizes, call.context));
    launched(kernels::norm_modulate_backward(
        like.dtype, like.sizes, like.tokens(dh, "dh"), like.tokens(x, "x"), txt_scale, img_scale,
        float(eps), like.tokens(dx, "dx"), gradients[0], gradients[1], gradients[2], gradients[3],
        floats_of(scratch), call.context));
}

inline void norm_modulate_backward(Tensor dh, Tensor x, Tensor scale, double eps, Tensor dx,
                                   Tensor dscale, Tensor dshift) {
    const Like like(x, "x", 0);
    const Rows s = like.rows(scale, "scale");
    norm_modulate_backward_of(
        like, dh, x, s, s, eps, dx,
        {Rows{}, Rows{}, like.rows(dscale, "dscale"), like.rows(dshift, "dshift")});
}

inline void joint_norm_modulate_backward(Tensor dh, Tensor x, Tensor txt_scale, Tensor img_scale,
                                         int64_t txt_len, double eps, Tensor dx, Tensor txt_dscale,
                                         Tensor txt_dshift, Tensor img_dscale,
                                         Tensor img_dshift) {
    const Like like(x, "x", txt_len);
    norm_modulate_backward_of(
        like, dh, x, like.rows(txt_scale, "txt_scale"), like.rows(img_scale, "img_scale"), eps, dx,
        {like.rows(txt_dscale, "txt_dscale"), like.rows(txt_dshift, "txt_dshift"),
         like.rows(img_dscale, "img_dscale"), like.rows(img_dshift, "img_dshift")});
}

// gated_residual

inline void joint_gated_residual(Tensor x, Tensor y, Tensor txt_gate, Tensor img_gate,
                                 int64_t txt_len, Tensor out) {
    const Like like(x, "x", txt_len);
    const Call call(x);
    launched(kernels::gated_residual(like.dtype, like.sizes, like.tokens(x, "x"),
                                     like.tokens(y, "y"), like.rows(txt_gate, "txt_gate"),
                                     like.rows(img_gate, "img_gate"), like.tokens(out, "out"),
                                     call.context));
}

inline void gated_residual(Tensor x, Tensor y, Tensor gate, Tensor out) {
    joint_gated_residual(x, y, gate, gate, 0, out);
}

inline void gated_residual_backward_of(const Like& like, const Tensor& dx_new, const Tensor& y,
                                       Rows txt_gate, Rows img_gate, const Tensor& dy,
                                       std::array<Rows, 2> gradients) {
    const Call call(y);
    const Tensor scratch =
        scratch_like(y, kernels::gated_residual_backward_scratch(like.sizes, call.context));
    launched(kernels::gated_residual_backward(
        like.dtype, like.sizes, like.tokens(dx_new, "dx_new"), like.tokens(y, "y"), txt_gate,
        img_gate, like.tokens(dy, "dy"), gradients[0], gradients[1], floats_of(scratch),
        call.context));
}

inline void gated_residual_backward(Tensor dx_new, Tensor y, Tensor gate, Tensor dy,
                                    Tensor dgate) {
    const Like like(y, "y", 0);
    const Rows g = like.rows(gate, "gate");
    gated_residual_backward_of(like, dx_new, y, g, g, dy, {Rows{}, like.rows(dgate, "dgate")});
}

inline void joint_gated_residual_backward(Tensor dx_new, Tensor y, Tensor txt_gate,
                                          Tensor img_gate, int64_t txt_len, Tensor dy,
                                          Tensor txt_dgate, Tensor img_dgate) {
    const Like like(y, "y", txt_len);
    gated_residual_backward_of(
        like, dx_new, y, like.rows(txt_gate, "txt_gate"), like.rows(img_gate, "img_gate"), dy,
        {like.rows(txt_dgate, "txt_dgate"), like.rows(img_dgate, "img_dgate")});
}

// gated_residual_norm_modulate

inline void joint_gated_residual_norm_modulate(Tensor x, Tensor y, Tensor txt_gate,
                                               Tensor txt_scale, Tensor txt_shift, Tensor img_gate,
                                               Tensor img_scale, Tensor img_shift,
                                               int64_t txt_len, double eps, Tensor x_new,
                                               Tensor h) {
    const Like like(x, "x", txt_len);
    const Call call(x);
    launched(kernels::gated_residual_norm_modulate(
        like.dtype, like.sizes, like.tokens(x, "x"), like.tokens(y, "y"),
        like.rows(txt_gate, "txt_gate"), like.rows(txt_scale, "txt_scale"),
        like.rows(txt_shift, "txt_shift"), like.rows(img_gate, "img_gate"),
        like.rows(img_scale, "img_scale"), like.rows(img_shift, "img_shift"), float(eps),
        like.tokens(x_new, "x_new"), like.tokens(h, "h"), call.context));
}

inline void gated_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor scale,
                                         Tensor shift, double eps, Tensor x_new, Tensor h) {
    joint_gated_residual_norm_modulate(x, y, gate, scale, shift, gate, scale, shift, 0, eps, x_new,
                                       h);
}

inline void gated_residual_norm_modulate_backward_of(const Like& like, const Tensor& dx_new,
                                                     const Tensor& dh, const Tensor& x_new,
                                                     const Tensor& y, std::array<Rows, 4> vectors,
                                                     double eps, const Tensor& dx,
                                                     const Tensor& dy,
                                                     std::array<Rows, 6> gradients) {
    const Call call(y);
    const Tensor scratch = scratch_like(
        y, kernels::gated_residual_norm_modulate_backward_scratch(like.sizes, call.context));
    launched(kernels::gated_residual_norm_modulate_backward(
        like.dtype, like.sizes, like.tokens(dx_new, "dx_new"), like.tokens(dh, "dh"),
        like.tokens(x_new, "x_new"), like.tokens(y, "y"), vectors[0], vectors[1], vectors[2],
        vectors[3], float(eps), like.tokens(dx, "dx"), like.tokens(dy, "dy"), gradients[0],
        gradients[1], gradients[2], gradients[3], gradients[4], gradients[5], floats_of(scratch),
        call.context));
}

inline void gated_residual_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y,
                                                  Tensor gate, Tensor scale, double eps, Tensor dx,
                                                  Tensor dy, Tensor dgate, Tensor dscale,
                                                  Tensor dshift) {
    const Like like(y, "y", 0);
    const Rows g = like.rows(gate, "gate"), s = like.rows(scale, "scale");
    gated_residual_norm_modulate_backward_of(
        like, dx_new, dh, x_new, y, {g, s, g, s}, eps, dx, dy,
        {Rows{}, Rows{}, Rows{}, like.rows(dgate, "dgate"), like.rows(dscale, "dscale"),
         like.rows(dshift, "dshift")});
}

inline void joint_gated_residual_norm_modulate_backward(
    Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor txt_gate, Tensor txt_scale,
    Tensor img_gate, Tensor img_scale, int64_t txt_len, double eps, Tensor dx, Tensor dy,
    Tensor txt_dgate, Tensor txt_dscale, Tensor txt_dshift, Tensor img_dgate, Tensor img_dscale,
    Tensor img_dshift) {
    const Like like(y, "y", txt_len);
    gated_residual_norm_modulate_backward_of(
        like, dx_new, dh, x_new, y,
        {like.rows(txt_gate, "txt_gate"), like.rows(txt_scale, "txt_scale"),
         like.rows(img_gate, "img_gate"), like.rows(img_scale, "img_scale")},
        eps, dx, dy,
        {like.rows(txt_dgate, "txt_dgate"), like.rows(txt_dscale, "txt_dscale"),
         like.rows(txt_dshift, "txt_dshift"), like.rows(img_dgate, "img_dgate"),
         like.rows(img_dscale, "img_dscale"), like.rows(img_dshift, "img_dshift")});
}

// the ops

struct Op {
    const char* name;
    const char* schema;
    void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

#define FLUXKERN_OP(name, schema) {#name, #name schema, TORCH_BOX(&name)}

inline const Op OPS[] = {
    FLUXKERN_OP(norm_modulate,
                "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor(a!) out) -> ()"),
    FLUXKERN_OP(joint_norm_modulate,
                "(Tensor x, Tensor txt_scale, Tensor txt_shift, Tensor img_scale, Tensor img_shift,"
                " int txt_len, float eps, Tensor(a!) out) -> ()"),
    FLUXKERN_OP(norm_modulate_backward,
                "(Tensor dh, Tensor x, Tensor scale, float eps, Tensor(a!) dx, Tensor(b!) dscale,"
                " Tensor(c!) dshift) -> ()"),
    FLUXKERN_OP(joint_norm_modulate_backward,
                "(Tensor dh, Tensor x, Tensor txt_scale, Tensor img_scale, int txt_len, float eps,"
                " Tensor(a!) dx, Tensor(b!) txt_dscale, Tensor(c!) txt_dshift,"
                " Tensor(d!) img_dscale, Tensor(e!) img_dshift) -> ()"),
    FLUXKERN_OP(gated_residual, "(Tensor x, Tensor y, Tensor gate, Tensor(a!) out) -> ()"),
    FLUXKERN_OP(joint_gated_residual,
                "(Tensor x, Tensor y, Tensor txt_gate, Tensor img_gate, int txt_len,"
                " Tensor(a!) out) -> ()"),
    FLUXKERN_OP(gated_residual_backward,
                "(Tensor dx_new, Tensor y, Tensor gate, Tensor(a!) dy, Tensor(b!) dgate) -> ()"),
    FLUXKERN_OP(joint_gated_residual_backward,
                "(Tensor dx_new, Tensor y, Tensor txt_gate, Tensor img_gate, int txt_len,"
                " Tensor(a!) dy, Tensor(b!) txt_dgate, Tensor(c!) img_dgate) -> ()"),
    FLUXKERN_OP(gated_residual_norm_modulate,
                "(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps,"
                " Tensor(a!) x_new, Tensor(b!) h) -> ()"),
    FLUXKERN_OP(joint_gated_residual_norm_modulate,
                "(Tensor x, Tensor y, Tensor txt_gate, Tensor txt_scale, Tensor txt_shift,"
                " Tensor img_gate, Tensor img_scale, Tensor img_shift, int txt_len, float eps,"
                " Tensor(a!) x_new, Tensor(b!) h) -> ()"),
    FLUXKERN_OP(gated_residual_norm_modulate_backward,
                "(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor gate, Tensor scale,"
                " float eps, Tensor(a!) dx, Tensor(b!) dy, Tensor(c!) dgate, Tensor(d!) dscale,"
                " Tensor(e!) dshift) -> ()"),
    FLUXKERN_OP(joint_gated_residual_norm_modulate_backward,
                "(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor txt_gate,"
                " Tensor txt_scale, Tensor img_gate, Tensor img_scale, int txt_len, float eps,"
                " Tensor(a!) dx, Tensor(b!) dy, Tensor(c!) txt_dgate, Tensor(d!) txt_dscale,"
                " Tensor(e!) txt_dshift, Tensor(f!) img_dgate, Tensor(g!) img_dscale,"
                " Tensor(h!) img_dshift) -> ()"),
};

}  // namespace fluxkern::bindings
