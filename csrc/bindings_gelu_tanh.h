// The private torch ops of GELU, as bindings.h has those over the stream; included after it. Shapes
// [..., C] whose axes before the last are two strided ones at most.
#pragma once

#include "bindings.h"

namespace fluxkern::bindings {
namespace {

template <size_t N>
struct Flat {  // N tensors of one shape [..., C] as [B, L, C]
    Tokens tokens[N];
    Sizes sizes;
};

// Adjacent axes that lie behind each other in every tensor become one.
template <size_t N>
Flat<N> flattened(const Tensor* const (&all)[N]) {
    const Tensor& x = *all[0];
    STD_TORCH_CHECK(x.dim() >= 1, "x must have an axis");
    const int64_t last = x.dim() - 1;
    int64_t size[2] = {1, 1}, stride[2][N] = {};  // from the inner axis
    int axis = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
        if (x.size(d) == 1) continue;
        bool behind = true;
        for (size_t i = 0; i < N; ++i) {
            behind &= all[i]->stride(d) == stride[axis][i] * size[axis];
        }
        if (size[axis] != 1 && !behind && ++axis == 2) break;
        for (size_t i = 0; i < N && size[axis] == 1; ++i) stride[axis][i] = all[i]->stride(d);
        size[axis] *= x.size(d);
    }
    STD_TORCH_CHECK(axis < 2 || x.numel() == 0, "x must have two strided axes at most");
    Flat<N> flat = {{}, {size[1], x.numel() ? size[0] : 0, x.size(last), 0}};
    for (size_t i = 0; i < N; ++i) {
        flat.tokens[i] = {all[i]->data_ptr(), stride[1][i], stride[0][i]};
    }
    return flat;
}

void check_shape(const char* name, const Tensor& t, const Tensor& x) {
    bool same = t.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
    STD_TORCH_CHECK(same, name, " must have the shape of x");
    check_like(name, t, x);
}

void gelu_tanh(const Tensor& x, const Tensor& out) {
    check_shape("x", x, x);
    check_shape("out", out, x);
    const auto flat = flattened({&x, &out});
    run(x, [&](const kernels::Context& context) {
        return kernels::gelu_tanh(dtype_of(x), flat.tokens[0], flat.tokens[1], flat.sizes, context);
    });
}

void gelu_tanh_backward(const Tensor& dy, const Tensor& x, const Tensor& dx) {
    check_shape("dy", dy, x);
    check_shape("x", x, x);
    check_shape("dx", dx, x);
    const auto flat = flattened({&dy, &x, &dx});
    run(x, [&](const kernels::Context& context) {
        return kernels::gelu_tanh_backward(dtype_of(x), flat.tokens[0], flat.tokens[1],
                                           flat.tokens[2], flat.sizes, context);
    });
}

const Op GELU_OPS[] = {
    {"gelu_tanh", "Tensor x, Tensor(a!) out", TORCH_BOX(&gelu_tanh)},
    {"gelu_tanh_backward", "Tensor dy, Tensor x, Tensor(a!) dx", TORCH_BOX(&gelu_tanh_backward)},
};

}  // namespace
}  // namespace fluxkern::bindings
