// GroupNorm and SiLU over pictures [B, C, H, W].
#pragma once

#include "../images.h"
#include "backend.h"
#include "common.h"

namespace fluxkern::bindings {
namespace {

// One call over pictures, all of them contiguous or all channels-last.
struct ImageCall {
    const View x;
    const DType dtype;
    const ImageSizes sizes;

    ImageCall(const View& x, int64_t groups)
        : x(x), dtype(dtype_of(x)), sizes(sizes_of(x, groups)) {}

    static bool dense(const View& x, const int (&order)[4]) {  // axes from the outer to the inner
        int64_t stride = 1;
        for (int i = 3; i >= 0; --i) {
            if (x.sizes[order[i]] != 1 && x.strides[order[i]] != stride) return false;
            stride *= x.sizes[order[i]];
        }
        return true;
    }

    static ImageSizes sizes_of(const View& x, int64_t groups) {
        STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W], got ", text_of(x.sizes));
        STD_TORCH_CHECK(groups > 0 && x.sizes[1] % groups == 0,
                        "num_groups must divide C = ", x.sizes[1], ", got ", groups);
        const bool planes = x.numel == 0 || dense(x, {0, 1, 2, 3});
        STD_TORCH_CHECK(planes || dense(x, {0, 2, 3, 1}), "x must be contiguous or channels-last");
        return {x.sizes[0], x.sizes[1], x.sizes[2] * x.sizes[3], groups, !planes};
    }

    Images images(const View& v) const {
        v.is(x.dtype).beside(x).has(x.sizes);
        STD_TORCH_CHECK(
            v.numel == 0 || (sizes.channels_last ? dense(v, {0, 2, 3, 1}) : dense(v, {0, 1, 2, 3})),
            v.name, " must have the memory format of x");
        const int64_t C = sizes.C, P = sizes.P;
        return {v.data, C * P, sizes.channels_last ? 1 : P, sizes.channels_last ? C : 1};
    }

    void* channels(const View& v) const {
        return vector_of(v, sizes.C, x);
    }
};

void group_norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups,
                     double eps, const Tensor& y) {
    const ImageCall c({"x", x}, num_groups);
    run(x, [&](const kernels::Context& context) {
        const Scratch scratch(x, kernels::group_norm_silu_scratch(c.sizes, context));
        return kernels::group_norm_silu(c.dtype, c.images(c.x), c.channels({"weight", weight}),
                                        c.channels({"bias", bias}), c.images(output("y", y)),
                                        c.sizes, float(eps), scratch.floats(), context);
    });
}

void group_norm_silu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                              const Tensor& bias, int64_t num_groups, double eps, const Tensor& dx,
                              const Tensor& dweight, const Tensor& dbias) {
    const ImageCall c({"x", x}, num_groups);
    run(x, [&](const kernels::Context& context) {
        const Scratch scratch(x, kernels::group_norm_silu_backward_scratch(c.sizes, context));
        return kernels::group_norm_silu_backward(
            c.dtype, c.images({"dy", dy}), c.images(c.x), c.channels({"weight", weight}),
            c.channels({"bias", bias}), c.images(output("dx", dx)),
            c.channels(output("dweight", dweight)), c.channels(output("dbias", dbias)), c.sizes,
            float(eps), scratch.floats(), context);
    });
}

const Op GROUP_NORM[] = {
    {"group_norm_silu", TORCH_BOX(&group_norm_silu)},
    {"group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward)},
};

}  // namespace
}  // namespace fluxkern::bindings
