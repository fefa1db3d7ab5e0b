// The private torch ops over queries and keys, as bindings.h has those over the stream; included
// after it. `kernels` declares qk_norm_rope, qk_norm_rope_backward and its scratch.
#pragma once

#include "bindings.h"
#include "heads.h"

namespace fluxkern::bindings {
namespace {

// One call over heads like q [B, L, H, D].
struct HeadCall {
    const Tensor& q;
    const DType dtype;
    const HeadSizes sizes;

    HeadCall(const Tensor& q, int64_t txt_len, int64_t img_len)
        : q(q), dtype(dtype_of(q)), sizes(sizes_of(q, txt_len, img_len)) {}

    static HeadSizes sizes_of(const Tensor& q, int64_t txt_len, int64_t img_len) {
        STD_TORCH_CHECK(q.dim() == 4, "q must be [B, L, H, D], got ", q.dim(), " axes");
        STD_TORCH_CHECK(txt_len >= 0 && img_len >= 0, "txt_len must be between 0 and L, got ",
                        txt_len);
        return {q.size(0), txt_len + img_len, q.size(2), q.size(3), txt_len};
    }

    Heads heads(const char* name, const Tensor& t, int64_t length) const {
        STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == sizes.B && t.size(1) == length &&
                            t.size(2) == sizes.H && t.size(3) == sizes.D,
                        name, " must be [B, L, H, D] = [", sizes.B, ", ", length, ", ", sizes.H,
                        ", ", sizes.D, "]");
        check_like(name, t, q);
        return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
    }

    Heads txt(const char* name, const Tensor& t) const {
        return heads(name, t, sizes.txt_len);
    }
    Heads img(const char* name, const Tensor& t) const {
        return heads(name, t, sizes.L - sizes.txt_len);
    }
    Heads all(const char* name, const Tensor& t) const {
        return heads(name, t, sizes.L);
    }

    void* weight(const char* name, const Tensor& t) const {
        STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == sizes.D, name, " must be [D] of q");
        check_like(name, t, q);
        return t.data_ptr();
    }

    Angles angles(const char* name, const Tensor& t) const {
        STD_TORCH_CHECK(sizes.D % 2 == 0, "D must be even, got ", sizes.D);
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == sizes.L && t.size(1) == sizes.D / 2, name,
                        " must be [L, D / 2] = [", sizes.L, ", ", sizes.D / 2, "]");
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
        STD_TORCH_CHECK(t.is_cpu() == q.is_cpu() && t.get_device_index() == q.get_device_index(),
                        name, " must be on the device of q");
        return {static_cast<const float*>(t.data_ptr()), t.stride(0), t.stride(1)};
    }
};

void qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                  const Tensor& cos, const Tensor& sin, double eps, const Tensor& q_out,
                  const Tensor& k_out) {
    const HeadCall c(q, 0, q.size(1));
    const Heads none = {};
    run(q, [&](const kernels::Context& context) {
        return kernels::qk_norm_rope(
            c.dtype, none, none, none, c.img("q", q), c.img("k", k), none,
            c.weight("q_weight", q_weight), c.weight("k_weight", k_weight),
            c.weight("q_weight", q_weight), c.weight("k_weight", k_weight), c.angles("cos", cos),
            c.angles("sin", sin), c.all("q_out", q_out), c.all("k_out", k_out), none, c.sizes,
            float(eps), context);
    });
}

void joint_qk_norm_rope(const Tensor& txt_q, const Tensor& txt_k, const Tensor& txt_v,
                        const Tensor& img_q, const Tensor& img_k, const Tensor& img_v,
                        const Tensor& txt_q_weight, const Tensor& txt_k_weight,
                        const Tensor& img_q_weight, const Tensor& img_k_weight, const Tensor& cos,
                        const Tensor& sin, double eps, const Tensor& q, const Tensor& k,
                        const Tensor& v) {
    const HeadCall c(img_q, txt_q.size(1), img_q.size(1));
    run(img_q, [&](const kernels::Context& context) {
        return kernels::qk_norm_rope(
            c.dtype, c.txt("txt_q", txt_q), c.txt("txt_k", txt_k), c.txt("txt_v", txt_v),
            c.img("img_q", img_q), c.img("img_k", img_k), c.img("img_v", img_v),
            c.weight("txt_q_weight", txt_q_weight), c.weight("txt_k_weight", txt_k_weight),
            c.weight("img_q_weight", img_q_weight), c.weight("img_k_weight", img_k_weight),
            c.angles("cos", cos), c.angles("sin", sin), c.all("q", q), c.all("k", k),
            c.all("v", v), c.sizes, float(eps), context);
    });
}

// The image's part of a joint view.
Heads behind(Heads joint, int64_t txt_len, const Tensor& t) {
    const int64_t bytes = txt_len * joint.stride_l * int64_t(t.element_size());
    return {static_cast<char*>(joint.data) + bytes, joint.stride_b, joint.stride_l, joint.stride_h};
}

void qk_norm_rope_(const Tensor& q, const Tensor& k, const Tensor& txt_q_weight,
                   const Tensor& txt_k_weight, const Tensor& img_q_weight,
                   const Tensor& img_k_weight, const Tensor& cos, const Tensor& sin,
                   int64_t txt_len, double eps) {
    const HeadCall c(q, txt_len, q.size(1) - txt_len);
    const Heads none = {}, all_q = c.all("q", q), all_k = c.all("k", k);
    run(q, [&](const kernels::Context& context) {
        return kernels::qk_norm_rope(
            c.dtype, all_q, all_k, none, behind(all_q, txt_len, q), behind(all_k, txt_len, k), none,
            c.weight("txt_q_weight", txt_q_weight), c.weight("txt_k_weight", txt_k_weight),
            c.weight("img_q_weight", img_q_weight), c.weight("img_k_weight", img_k_weight),
            c.angles("cos", cos), c.angles("sin", sin), all_q, all_k, none, c.sizes, float(eps),
            context);
    });
}

void joint_qk_norm_rope_backward(
    const Tensor& dq_out, const Tensor& dk_out, const Tensor& txt_q, const Tensor& txt_k,
    const Tensor& img_q, const Tensor& img_k, const Tensor& txt_q_weight,
    const Tensor& txt_k_weight, const Tensor& img_q_weight, const Tensor& img_k_weight,
    const Tensor& cos, const Tensor& sin, double eps, const Tensor& txt_dq, const Tensor& txt_dk,
    const Tensor& img_dq, const Tensor& img_dk, const Tensor& txt_dq_weight,
    const Tensor& txt_dk_weight, const Tensor& img_dq_weight, const Tensor& img_dk_weight) {
    const HeadCall c(img_q, txt_q.size(1), img_q.size(1));
    run(img_q, [&](const kernels::Context& context) {
        const Tensor scratch =
            scratch_floats(img_q, kernels::qk_norm_rope_backward_scratch(c.sizes, context));
        return kernels::qk_norm_rope_backward(
            c.dtype, c.all("dq_out", dq_out), c.all("dk_out", dk_out), c.txt("txt_q", txt_q),
            c.txt("txt_k", txt_k), c.img("img_q", img_q), c.img("img_k", img_k),
            c.weight("txt_q_weight", txt_q_weight), c.weight("txt_k_weight", txt_k_weight),
            c.weight("img_q_weight", img_q_weight), c.weight("img_k_weight", img_k_weight),
            c.angles("cos", cos), c.angles("sin", sin), c.txt("txt_dq", txt_dq),
            c.txt("txt_dk", txt_dk), c.img("img_dq", img_dq), c.img("img_dk", img_dk),
            c.weight("txt_dq_weight", txt_dq_weight), c.weight("txt_dk_weight", txt_dk_weight),
            c.weight("img_dq_weight", img_dq_weight), c.weight("img_dk_weight", img_dk_weight),
            c.sizes, float(eps), static_cast<float*>(scratch.data_ptr()), context);
    });
}

void qk_norm_rope_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q,
                           const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                           const Tensor& cos, const Tensor& sin, double eps, const Tensor& dq,
                           const Tensor& dk, const Tensor& dq_weight, const Tensor& dk_weight) {
    const HeadCall c(q, 0, q.size(1));
    const Heads none = {};
    run(q, [&](const kernels::Context& context) {
        const Tensor scratch =
            scratch_floats(q, kernels::qk_norm_rope_backward_scratch(c.sizes, context));
        return kernels::qk_norm_rope_backward(
            c.dtype, c.all("dq_out", dq_out), c.all("dk_out", dk_out), none, none, c.img("q", q),
            c.img("k", k), c.weight("q_weight", q_weight), c.weight("k_weight", k_weight),
            c.weight("q_weight", q_weight), c.weight("k_weight", k_weight), c.angles("cos", cos),
            c.angles("sin", sin), none, none, c.img("dq", dq), c.img("dk", dk), nullptr, nullptr,
            c.weight("dq_weight", dq_weight), c.weight("dk_weight", dk_weight), c.sizes,
            float(eps), static_cast<float*>(scratch.data_ptr()), context);
    });
}

const Op HEAD_OPS[] = {
    {"qk_norm_rope",
     "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, "
     "Tensor(a!) q_out, Tensor(b!) k_out",
     TORCH_BOX(&qk_norm_rope)},
    {"joint_qk_norm_rope",
     "Tensor txt_q, Tensor txt_k, Tensor txt_v, Tensor img_q, Tensor img_k, Tensor img_v, "
     "Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight, Tensor img_k_weight, "
     "Tensor cos, Tensor sin, float eps, Tensor(a!) q, Tensor(b!) k, Tensor(c!) v",
     TORCH_BOX(&joint_qk_norm_rope)},
    {"qk_norm_rope_",
     "Tensor(a!) q, Tensor(b!) k, Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight, "
     "Tensor img_k_weight, Tensor cos, Tensor sin, int txt_len, float eps",
     TORCH_BOX(&qk_norm_rope_)},
    {"qk_norm_rope_backward",
     "Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, "
     "Tensor cos, Tensor sin, float eps, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dq_weight, "
     "Tensor(d!) dk_weight",
     TORCH_BOX(&qk_norm_rope_backward)},
    {"joint_qk_norm_rope_backward",
     "Tensor dq_out, Tensor dk_out, Tensor txt_q, Tensor txt_k, Tensor img_q, Tensor img_k, "
     "Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight, Tensor img_k_weight, "
     "Tensor cos, Tensor sin, float eps, Tensor(a!) txt_dq, Tensor(b!) txt_dk, Tensor(c!) img_dq, "
     "Tensor(d!) img_dk, Tensor(e!) txt_dq_weight, Tensor(f!) txt_dk_weight, "
     "Tensor(g!) img_dq_weight, Tensor(h!) img_dk_weight",
     TORCH_BOX(&joint_qk_norm_rope_backward)},
};

template <size_t N>
void define_ops(torch::stable::detail::StableLibrary& library, const Op (&ops)[N]) {
    for (const Op& op : ops) {
        library.def((std::string(op.name) + "(" + op.arguments + ") -> ()").c_str());
    }
}

template <size_t N>
void implement_ops(torch::stable::detail::StableLibrary& library, const Op (&ops)[N]) {
    for (const Op& op : ops) library.impl(op.name, op.run);
}

}  // namespace
}  // namespace fluxkern::bindings
