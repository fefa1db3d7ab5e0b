// The private torch ops of linear layers, as bindings.h has those over the stream; included after
// bindings_gelu_tanh.h, whose `flattened` it uses. `kernels` declares linear and linear_int8.
#pragma once

#include "bindings.h"
#include "bindings_gelu_tanh.h"
#include "matrices.h"

namespace fluxkern::bindings {
namespace {

constexpr int64_t MOST_CHANNELS = 65536;  // sums of more products can leave int32

// x [..., K], out [..., N], bias [N] of one dtype
void check_linear(const Tensor& out, const Tensor& x, int64_t N, const std::optional<Tensor>& bias,
                  const std::optional<std::string>& activation) {
    STD_TORCH_CHECK(x.dim() >= 1, "x must have an axis");
    check_like("x", x, x);
    check_like("out", out, x);
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == N), "bias must be [N]");
    if (bias) check_like("bias", *bias, x);
    STD_TORCH_CHECK(!activation || *activation == "gelu_tanh", "activation must be gelu_tanh");
    bool same = out.dim() == x.dim() && out.size(out.dim() - 1) == N;
    for (int64_t d = 0; same && d < x.dim() - 1; ++d) same = out.size(d) == x.size(d);
    STD_TORCH_CHECK(same, "out must be [..., N] of x");
}

void linear_(const Tensor& out, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
             std::optional<std::string> activation, bool add) {
    STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && weight.size(1) == x.size(x.dim() - 1),
                    "weight must be [N, K] of x");
    STD_TORCH_CHECK(weight.size(1) >= 1, "x must have a channel");
    check_like("weight", weight, x);
    const int64_t N = weight.size(0);
    check_linear(out, x, N, bias, activation);
    if (out.numel() == 0) return;
    const auto flat = flattened({&x, &out});
    const MatrixSizes sizes = {flat.sizes.B, flat.sizes.L, N, flat.sizes.C};
    run(x, [&](const kernels::Context& context) {
        return kernels::linear(dtype_of(x), flat.tokens[0],
                               Rows{weight.data_ptr(), weight.stride(0)},
                               bias ? bias->data_ptr() : nullptr, activation.has_value(), add,
                               flat.tokens[1], sizes, context);
    });
}

const Op LINEAR_OPS[] = {
    {"linear_",
     "Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, str? activation, bool add",
     TORCH_BOX(&linear_)},
};

void check_int8_weight(const Tensor& x, const Tensor& weight, const Tensor& weight_scale) {
    const int64_t K = x.size(x.dim() - 1);
    STD_TORCH_CHECK(K >= 1 && K <= MOST_CHANNELS, "x must have 1 to ", MOST_CHANNELS,
                    " channels, got ", K);
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.dim() == 2 &&
                        weight.size(1) == K && (K == 1 || weight.stride(1) == 1),
                    "weight must be int8 [N, K] of x, contiguous on its last axis");
    STD_TORCH_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1 &&
                        weight_scale.size(0) == weight.size(0) && weight_scale.is_contiguous(),
                    "weight_scale must be contiguous float32 [N]");
    STD_TORCH_CHECK(weight.is_cpu() == x.is_cpu() && weight_scale.is_cpu() == x.is_cpu(),
                    "weight and weight_scale must be on the device of x");
}

void run_linear_int8(const Tensor& out, const Tensor& x, const Tensor& weight,
                     const Tensor& weight_scale, const std::optional<Tensor>& bias,
                     const std::optional<std::string>& activation, bool add,
                     int64_t rotation) {
    STD_TORCH_CHECK(x.dim() >= 1, "x must have an axis");
    check_int8_weight(x, weight, weight_scale);
    STD_TORCH_CHECK(is_rotation(rotation, x.size(x.dim() - 1)),
                    "rotation must be 0 or a power of 4 that divides K, got ", rotation);
    check_linear(out, x, weight.size(0), bias, activation);
    if (x.numel() == 0 || out.numel() == 0) return;
    const auto flat = flattened({&x, &out});
    const MatrixSizes sizes = {flat.sizes.B, flat.sizes.L, weight.size(0), flat.sizes.C};
    run(x, [&](const kernels::Context& context) {
        return kernels::linear_int8(dtype_of(x), flat.tokens[0],
                                    Rows{weight.data_ptr(), weight.stride(0)},
                                    static_cast<const float*>(weight_scale.data_ptr()),
                                    bias ? bias->data_ptr() : nullptr, activation.has_value(), add,
                                    rotation, flat.tokens[1], sizes, context);
    });
}

void linear_int8(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                 std::optional<Tensor> bias, std::optional<std::string> activation,
                 int64_t rotation, const Tensor& out) {
    run_linear_int8(out, x, weight, weight_scale, bias, activation, false, rotation);
}

void linear_int8_(const Tensor& out, const Tensor& x, const Tensor& weight,
                  const Tensor& weight_scale, std::optional<Tensor> bias,
                  std::optional<std::string> activation, bool add, int64_t rotation) {
    run_linear_int8(out, x, weight, weight_scale, bias, activation, add, rotation);
}

const Op LINEAR_INT8_OPS[] = {
    {"linear_int8",
     "Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, int rotation, "
     "Tensor(a!) out",
     TORCH_BOX(&linear_int8)},
    {"linear_int8_",
     "Tensor(a!) out, Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, "
     "str? activation, bool add, int rotation",
     TORCH_BOX(&linear_int8_)},
};

}  // namespace
}  // namespace fluxkern::bindings
