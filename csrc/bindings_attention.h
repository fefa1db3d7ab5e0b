// The private torch ops of attention, as bindings.h has those over the stream; included after
// bindings_heads.h. `kernels` declares attention, which may come in more than one form, and the
// scratch of rope_attention.
#pragma once

#include "bindings_heads.h"

namespace fluxkern::bindings {
namespace {

// q [B, L, H, D] against k and v [B, M, H, D].
struct AttentionCall : HeadCall {
    const AttentionSizes all_sizes;

    AttentionCall(const Tensor& q, const Tensor& k)
        : HeadCall(q, 0, q.size(1)),
          all_sizes{sizes.B, sizes.L, k.dim() == 4 ? k.size(1) : 0, sizes.H, sizes.D} {}

    Heads keys(const char* name, const Tensor& t) const {
        return heads(name, t, all_sizes.M);
    }

    float* lse(const Tensor& t) const {
        STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Float &&
                            t.numel() == sizes.B * sizes.L * sizes.H,
                        "lse must be contiguous float32 [B, L, H]");
        return static_cast<float*>(t.data_ptr());
    }
};

template <auto& ATTENTION>
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
            const Tensor* lse) {
    const AttentionCall c(q, k);
    const Angles none = {};
    float* const sums = lse ? c.lse(*lse) : nullptr;
    run(q, [&](const kernels::Context& context) {
        return ATTENTION(c.dtype, c.all("q", q), c.keys("k", k), c.keys("v", v), nullptr, nullptr,
                         none, none, c.all("out", out), sums, c.all_sizes, 0.0f, nullptr, context);
    });
}

template <auto& ATTENTION>
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out) {
    attend<ATTENTION>(q, k, v, out, nullptr);
}

template <auto& ATTENTION>
void attention_lse(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                   const Tensor& lse) {
    attend<ATTENTION>(q, k, v, out, &lse);
}

template <auto& ATTENTION>
void rope_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_weight,
                    const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps,
                    const Tensor& out) {
    const AttentionCall c(q, q);
    run(q, [&](const kernels::Context& context) {
        const Tensor scratch = scratch_floats(
            q, kernels::rope_attention_scratch(c.dtype, c.all_sizes, context));
        return ATTENTION(c.dtype, c.all("q", q), c.keys("k", k), c.keys("v", v),
                         c.weight("q_weight", q_weight), c.weight("k_weight", k_weight),
                         c.angles("cos", cos), c.angles("sin", sin), c.all("out", out), nullptr,
                         c.all_sizes, float(eps), static_cast<float*>(scratch.data_ptr()), context);
    });
}

template <auto& ATTENTION>
const Op ATTENTION_OPS[] = {
    {"attention", "Tensor q, Tensor k, Tensor v, Tensor(a!) out",
     TORCH_BOX(&attention<ATTENTION>)},
    {"attention_lse", "Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse",
     TORCH_BOX(&attention_lse<ATTENTION>)},
    {"rope_attention",
     "Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
     "float eps, Tensor(a!) out",
     TORCH_BOX(&rope_attention<ATTENTION>)},
};

}  // namespace
}  // namespace fluxkern::bindings
