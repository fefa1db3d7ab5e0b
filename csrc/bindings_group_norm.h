// The private torch ops of GroupNorm and SiLU, as bindings.h has those over the stream; included
// after it. `kernels` declares group_norm_silu, group_norm_silu_backward and their scratch.
#pragma once

#include "bindings.h"
#include "images.h"

namespace fluxkern::bindings {
namespace {

// One call over pictures x [B, C, H, W], contiguous or channels-last.
struct ImageCall {
    const Tensor& x;
    const DType dtype;
    const ImageSizes sizes;

    ImageCall(const Tensor& x, int64_t groups)
        : x(x), dtype(dtype_of(x)), sizes(sizes_of(x, groups)) {}

    static bool dense(const Tensor& x, const int (&order)[4]) {  // axes from the outer to the inner
        int64_t stride = 1;
        for (int i = 3; i >= 0; --i) {
            if (x.size(order[i]) != 1 && x.stride(order[i]) != stride) return false;
            stride *= x.size(order[i]);
        }
        return true;
    }

    static ImageSizes sizes_of(const Tensor& x, int64_t groups) {
        STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W], got ", x.dim(), " axes");
        STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "num_groups must divide C = ",
                        x.size(1), ", got ", groups);
        const bool planes = x.numel() == 0 || dense(x, {0, 1, 2, 3});
        STD_TORCH_CHECK(planes || dense(x, {0, 2, 3, 1}), "x must be contiguous or channels-last");
        return {x.size(0), x.size(1), x.size(2) * x.size(3), groups, !planes};
    }

    Images images(const char* name, const Tensor& t) const {
        bool same = t.dim() == 4;
        for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == x.size(d);
        STD_TORCH_CHECK(same, name, " must have the shape of x");
        STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
        STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(),
                        name, " must be on the device of x");
        STD_TORCH_CHECK(t.numel() == 0 || (sizes.channels_last ? dense(t, {0, 2, 3, 1})
                                                               : dense(t, {0, 1, 2, 3})),
                        name, " must have the memory format of x");
        const int64_t C = sizes.C, P = sizes.P;
        return {t.data_ptr(), C * P, sizes.channels_last ? 1 : P, sizes.channels_last ? C : 1};
    }

    void* channels(const char* name, const Tensor& t) const {
        STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == sizes.C, name, " must be [C] of x");
        check_like(name, t, x);
        return t.data_ptr();
    }
};

void group_norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups,
                     double eps, const Tensor& out) {
    const ImageCall c(x, num_groups);
    run(x, [&](const kernels::Context& context) {
        const Tensor scratch =
            scratch_floats(x, kernels::group_norm_silu_scratch(c.sizes, context));
        return kernels::group_norm_silu(c.dtype, c.images("x", x), c.channels("weight", weight),
                                        c.channels("bias", bias), c.images("out", out), c.sizes,
                                        float(eps), static_cast<float*>(scratch.data_ptr()),
                                        context);
    });
}

void group_norm_silu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                              const Tensor& bias, int64_t num_groups, double eps, const Tensor& dx,
                              const Tensor& dweight, const Tensor& dbias) {
    const ImageCall c(x, num_groups);
    run(x, [&](const kernels::Context& context) {
        const Tensor scratch =
            scratch_floats(x, kernels::group_norm_silu_backward_scratch(c.sizes, context));
        return kernels::group_norm_silu_backward(
            c.dtype, c.images("dy", dy), c.images("x", x), c.channels("weight", weight),
            c.channels("bias", bias), c.images("dx", dx), c.channels("dweight", dweight),
            c.channels("dbias", dbias), c.sizes, float(eps),
            static_cast<float*>(scratch.data_ptr()), context);
    });
}

const Op GROUP_NORM_OPS[] = {
    {"group_norm_silu",
     "Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor(a!) out",
     TORCH_BOX(&group_norm_silu)},
    {"group_norm_silu_backward",
     "Tensor dy, Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor(a!) dx, "
     "Tensor(b!) dweight, Tensor(c!) dbias",
     TORCH_BOX(&group_norm_silu_backward)},
};

}  // namespace
}  // namespace fluxkern::bindings
