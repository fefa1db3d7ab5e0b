// gelu_tanh over [..., C].
#pragma once

#include "backend.h"
#include "rows.h"

namespace fluxkern::bindings {
namespace {

void gelu_tanh(const Tensor& x, const Tensor& y) {
    const View from("x", x), to = output("y", y);
    const DType dtype = dtype_of(from.rows());
    to.like(from).has(from.sizes);
    each_rows<2>({&from, &to}, [&](auto& tokens, const Sizes& sizes, int64_t) {
        run(x, [&](const kernels::Context& context) {
            return kernels::gelu_tanh(dtype, tokens[0], tokens[1], sizes, context);
        });
    });
}

void gelu_tanh_backward(const Tensor& dy, const Tensor& x, const Tensor& dx) {
    const View from("x", x), gradient("dy", dy), to = output("dx", dx);
    const DType dtype = dtype_of(from.rows());
    gradient.like(from).has(from.sizes);
    to.like(from).has(from.sizes);
    each_rows<3>({&from, &gradient, &to}, [&](auto& tokens, const Sizes& sizes, int64_t) {
        run(x, [&](const kernels::Context& context) {
            return kernels::gelu_tanh_backward(dtype, tokens[1], tokens[0], tokens[2], sizes,
                                               context);
        });
    });
}

const Op ACTIVATIONS[] = {
    {"gelu_tanh", TORCH_BOX(&gelu_tanh)},
    {"gelu_tanh_backward", TORCH_BOX(&gelu_tanh_backward)},
};

}  // namespace
}  // namespace fluxkern::bindings
