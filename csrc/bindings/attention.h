// attention and rope_attention; `kernels` has attention in more than one form.
#pragma once

#include "heads.h"

namespace fluxkern::bindings {
namespace {

// q [B, L, H, D] against k and v [B, M, H, D].
struct AttentionCall : HeadCall {
    const AttentionSizes all_sizes;

    AttentionCall(const View& q, int64_t M)
        : HeadCall(q, 0, q.dim() == 4 ? q.sizes[1] : 0),
          all_sizes{sizes.B, sizes.L, M, sizes.H, sizes.D} {}

    Heads keys(const View& v) const {
        return heads(v, all_sizes.M);
    }
    float* lse(const View& v) const {
        v.is(ScalarType::Float).beside(q).has({sizes.B, sizes.L, sizes.H}).contiguous();
        return static_cast<float*>(v.data);
    }
};

template <auto& KERNEL>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
            const Tensor* lse) {
    const AttentionCall c({"q", q}, length_of(k));
    const Angles none = {};
    float* const sums = lse ? c.lse({"lse", *lse}) : nullptr;
    run(q, [&](const kernels::Context& context) {
        return KERNEL(c.dtype, c.all(c.q), c.keys({"k", k}), c.keys({"v", v}), nullptr, nullptr,
                      none, none, c.all(output("out", out)), sums, c.all_sizes, 0.0f, nullptr,
                      context);
    });
}

template <auto& KERNEL>
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
    attend<KERNEL>(q, k, v, out, nullptr);
}

template <auto& KERNEL>
void attention_lse(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse) {
    attend<KERNEL>(q, k, v, out, &lse);
}

template <auto& KERNEL>
void rope_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_weight,
                    const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                    const Tensor& out) {
    const AttentionCall c({"q", q}, length_of(q));
    run(q, [&](const kernels::Context& context) {
        const Scratch scratch(q, kernels::rope_attention_scratch(c.dtype, c.all_sizes, context));
        return KERNEL(c.dtype, c.all(c.q), c.keys({"k", k}), c.keys({"v", v}),
                      c.weight({"q_weight", q_weight}), c.weight({"k_weight", k_weight}),
                      c.angles({"cos", cos}), c.angles({"sin", sin}), c.all(output("out", out)),
                      nullptr, c.all_sizes, float(eps), scratch.floats(), context);
    });
}

template <auto& KERNEL>
const Op ATTENTION[] = {
    {"attention", TORCH_BOX(&attention<KERNEL>)},
    {"attention_lse", TORCH_BOX(&attention_lse<KERNEL>)},
    {"rope_attention", TORCH_BOX(&rope_attention<KERNEL>)},
};

}  // namespace
}  // namespace fluxkern::bindings
