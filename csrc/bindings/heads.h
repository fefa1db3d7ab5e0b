// The ops over queries and keys [B, L, H, D]: their norm and rotation.
#pragma once

#include "../heads.h"
#include "backend.h"
#include "common.h"

namespace fluxkern::bindings {
namespace {

// One call over heads like q, of text and image together.
struct HeadCall {
    const View q;
    const DType dtype;
    const HeadSizes sizes;

    HeadCall(const View& q, int64_t txt_len, int64_t img_len)
        : q(q), dtype(dtype_of(q)), sizes(sizes_of(q, txt_len, img_len)) {}

    static HeadSizes sizes_of(const View& q, int64_t txt_len, int64_t img_len) {
        STD_TORCH_CHECK(q.dim() == 4 && q.sizes[3] >= 1, q.name, " must be [B, L, H, D], got ",
                        text_of(q.sizes));
        STD_TORCH_CHECK(txt_len >= 0 && img_len >= 0, "txt_len must be between 0 and L, got ",
                        txt_len);
        return {q.sizes[0], txt_len + img_len, q.sizes[2], q.sizes[3], txt_len};
    }

    Heads heads(const View& v, int64_t length) const {
        v.like(q).has({sizes.B, length, sizes.H, sizes.D});
        return {v.data, v.strides[0], v.strides[1], v.strides[2]};
    }
    Heads txt(const View& v) const {
        return heads(v, sizes.txt_len);
    }
    Heads img(const View& v) const {
        return heads(v, sizes.L - sizes.txt_len);
    }
    Heads all(const View& v) const {
        return heads(v, sizes.L);
    }
    void* weight(const View& v) const {
        return vector_of(v, sizes.D, q);
    }
    Angles angles(const View& v) const {
        STD_TORCH_CHECK(sizes.D % 2 == 0, "D must be even, got ", sizes.D);
        v.is(ScalarType::Float).beside(q).has({sizes.L, sizes.D / 2});
        return {static_cast<const float*>(v.data), v.strides[0], v.strides[1]};
    }
};

// L of heads, which may turn out to have another shape.
inline int64_t length_of(const Tensor& t) {
    return t.dim() == 4 ? t.size(1) : 0;
}

void qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                  const Tensor& cos, const Tensor& sin, double eps, const Tensor& q_out,
                  const Tensor& k_out) {
    const HeadCall c({"q", q}, 0, length_of(q));
    const Heads none = {};
    const void* const q_scale = c.weight({"q_weight", q_weight});
    const void* const k_scale = c.weight({"k_weight", k_weight});
    run(q, [&](const kernels::Context& context) {
        return kernels::qk_norm_rope(c.dtype, none, none, none, c.img({"q", q}), c.img({"k", k}),
                                     none, q_scale, k_scale, q_scale, k_scale,
                                     c.angles({"cos", cos}), c.angles({"sin", sin}),
                                     c.all(output("q_out", q_out)), c.all(output("k_out", k_out)),
                                     none, c.sizes, float(eps), context);
    });
}

void joint_qk_norm_rope(const Tensor& txt_q, const Tensor& txt_k, const Tensor& txt_v,
                        const Tensor& img_q, const Tensor& img_k, const Tensor& img_v,
                        const Tensor& txt_q_weight, const Tensor& txt_k_weight,
                        const Tensor& img_q_weight, const Tensor& img_k_weight, const Tensor& cos,
                        const Tensor& sin, double eps, const Tensor& q_out, const Tensor& k_out,
                        const Tensor& v_out) {
    const HeadCall c({"img_q", img_q}, length_of(txt_q), length_of(img_q));
    run(img_q, [&](const kernels::Context& context) {
        return kernels::qk_norm_rope(
            c.dtype, c.txt({"txt_q", txt_q}), c.txt({"txt_k", txt_k}), c.txt({"txt_v", txt_v}),
            c.img({"img_q", img_q}), c.img({"img_k", img_k}), c.img({"img_v", img_v}),
            c.weight({"txt_q_weight", txt_q_weight}), c.weight({"txt_k_weight", txt_k_weight}),
            c.weight({"img_q_weight", img_q_weight}), c.weight({"img_k_weight", img_k_weight}),
            c.angles({"cos", cos}), c.angles({"sin", sin}), c.all(output("q_out", q_out)),
            c.all(output("k_out", k_out)), c.all(output("v_out", v_out)), c.sizes, float(eps),
            context);
    });
}

// The image's part of a joint view.
Heads behind(Heads joint, int64_t txt_len, const View& v) {
    const int64_t bytes = txt_len * joint.stride_l * v.element;
    return {static_cast<char*>(joint.data) + bytes, joint.stride_b, joint.stride_l, joint.stride_h};
}

void qk_norm_rope_(const Tensor& q, const Tensor& k, const Tensor& txt_q_weight,
                   const Tensor& txt_k_weight, const Tensor& img_q_weight,
                   const Tensor& img_k_weight, const Tensor& cos, const Tensor& sin,
                   int64_t txt_len, double eps) {
    const View q_view = output("q", q), k_view = output("k", k);
    k_view.apart_from(q_view);
    for (const View& out : {q_view, k_view}) {
        out.apart_from({"txt_q_weight", txt_q_weight}).apart_from({"txt_k_weight", txt_k_weight});
        out.apart_from({"img_q_weight", img_q_weight}).apart_from({"img_k_weight", img_k_weight});
        out.apart_from({"cos", cos}).apart_from({"sin", sin});
    }
    const HeadCall c(q_view, txt_len, length_of(q) - txt_len);
    const Heads none = {}, all_q = c.all(q_view), all_k = c.all(k_view);
    run(q, [&](const kernels::Context& context) {
        return kernels::qk_norm_rope(
            c.dtype, all_q, all_k, none, behind(all_q, txt_len, q_view),
            behind(all_k, txt_len, k_view), none, c.weight({"txt_q_weight", txt_q_weight}),
            c.weight({"txt_k_weight", txt_k_weight}), c.weight({"img_q_weight", img_q_weight}),
            c.weight({"img_k_weight", img_k_weight}), c.angles({"cos", cos}),
            c.angles({"sin", sin}), all_q, all_k, none, c.sizes, float(eps), context);
    });
}

void joint_qk_norm_rope_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& txt_q,
                                 const Tensor& txt_k, const Tensor& img_q, const Tensor& img_k,
                                 const Tensor& txt_q_weight, const Tensor& txt_k_weight,
                                 const Tensor& img_q_weight, const Tensor& img_k_weight,
                                 const Tensor& cos, const Tensor& sin, double eps,
                                 const Tensor& dtxt_q, const Tensor& dtxt_k, const Tensor& dimg_q,
                                 const Tensor& dimg_k, const Tensor& dtxt_q_weight,
                                 const Tensor& dtxt_k_weight, const Tensor& dimg_q_weight,
                                 const Tensor& dimg_k_weight) {
    const HeadCall c({"img_q", img_q}, length_of(txt_q), length_of(img_q));
    run(img_q, [&](const kernels::Context& context) {
        const Scratch scratch(img_q, kernels::qk_norm_rope_backward_scratch(c.sizes, context));
        return kernels::qk_norm_rope_backward(
            c.dtype, c.all({"dq_out", dq_out}), c.all({"dk_out", dk_out}), c.txt({"txt_q", txt_q}),
            c.txt({"txt_k", txt_k}), c.img({"img_q", img_q}), c.img({"img_k", img_k}),
            c.weight({"txt_q_weight", txt_q_weight}), c.weight({"txt_k_weight", txt_k_weight}),
            c.weight({"img_q_weight", img_q_weight}), c.weight({"img_k_weight", img_k_weight}),
            c.angles({"cos", cos}), c.angles({"sin", sin}), c.txt(output("dtxt_q", dtxt_q)),
            c.txt(output("dtxt_k", dtxt_k)), c.img(output("dimg_q", dimg_q)),
            c.img(output("dimg_k", dimg_k)), c.weight(output("dtxt_q_weight", dtxt_q_weight)),
            c.weight(output("dtxt_k_weight", dtxt_k_weight)),
            c.weight(output("dimg_q_weight", dimg_q_weight)),
            c.weight(output("dimg_k_weight", dimg_k_weight)), c.sizes, float(eps), scratch.floats(),
            context);
    });
}

void qk_norm_rope_backward(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q,
                           const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
                           const Tensor& cos, const Tensor& sin, double eps, const Tensor& dq,
                           const Tensor& dk, const Tensor& dq_weight, const Tensor& dk_weight) {
    const HeadCall c({"q", q}, 0, length_of(q));
    const Heads none = {};
    const void* const q_scale = c.weight({"q_weight", q_weight});
    const void* const k_scale = c.weight({"k_weight", k_weight});
    run(q, [&](const kernels::Context& context) {
        const Scratch scratch(q, kernels::qk_norm_rope_backward_scratch(c.sizes, context));
        return kernels::qk_norm_rope_backward(
            c.dtype, c.all({"dq_out", dq_out}), c.all({"dk_out", dk_out}), none, none,
            c.img({"q", q}), c.img({"k", k}), q_scale, k_scale, q_scale, k_scale,
            c.angles({"cos", cos}), c.angles({"sin", sin}), none, none, c.img(output("dq", dq)),
            c.img(output("dk", dk)), nullptr, nullptr, c.weight(output("dq_weight", dq_weight)),
            c.weight(output("dk_weight", dk_weight)), c.sizes, float(eps), scratch.floats(),
            context);
    });
}

const Op HEADS[] = {
    {"qk_norm_rope", TORCH_BOX(&qk_norm_rope)},
    {"joint_qk_norm_rope", TORCH_BOX(&joint_qk_norm_rope)},
    {"qk_norm_rope_", TORCH_BOX(&qk_norm_rope_)},
    {"qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward)},
    {"joint_qk_norm_rope_backward", TORCH_BOX(&joint_qk_norm_rope_backward)},
};

}  // namespace
}  // namespace fluxkern::bindings
