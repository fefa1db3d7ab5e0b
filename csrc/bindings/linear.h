// Linear layers over [..., K]: out = activation(x weight^T + bias), or out + x weight^T.
#pragma once

#include <optional>

#include "../matrices.h"
#include "backend.h"
#include "rows.h"

namespace fluxkern::bindings {
namespace {

constexpr int64_t MOST_CHANNELS = 65536;  // sums of more products can leave int32

// x [..., K], out [..., N], weight [N, K] and bias [N]
struct LinearCall {
    const View x, out, weight;
    const DType dtype;
    const int64_t N, K;
    const void* const bias;

    LinearCall(const Tensor& x, const Tensor& out, const Tensor& weight,
               const std::optional<Tensor>& bias, const std::optional<std::string>& activation)
        : x("x", x),
          out(output("out", out)),
          weight("weight", weight),
          dtype(dtype_of(this->x.rows())),
          N(this->weight.dim() == 2 ? this->weight.sizes[0] : 0),
          K(this->x.sizes.back()),
          bias(bias ? vector_of({"bias", *bias}, N, this->x) : nullptr) {
        std::vector<int64_t> shape(this->x.sizes.begin(), this->x.sizes.end());
        shape.back() = N;
        this->weight.beside(this->x).has({N, K}).rows();
        this->out.like(this->x).has(Numbers(shape));
        this->out.apart_from(this->x).apart_from(this->weight);
        if (bias) this->out.apart_from({"bias", *bias});
        STD_TORCH_CHECK(K >= 1, "x must have a channel");
        STD_TORCH_CHECK(!activation || *activation == "gelu_tanh",
                        "activation must be gelu_tanh, got ", *activation);
    }

    // Calls launch(x, weight, out, sizes, context) for all rows.
    template <class Launch>
    void each(const Tensor& t, const Launch& launch) const {
        if (out.numel == 0) return;
        each_rows<2>({&x, &out}, [&](auto& tokens, const Sizes& rows, int64_t) {
            const MatrixSizes sizes = {rows.B, rows.L, N, K};
            run(t, [&](const kernels::Context& context) {
                return launch(tokens[0], Rows{weight.data, weight.strides[0]}, tokens[1], sizes,
                              context);
            });
        });
    }
};

void linear_(const Tensor& out, const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
             std::optional<std::string> activation, bool add) {
    const LinearCall c(x, out, weight, bias, activation);
    c.weight.is(c.x.dtype);
    c.each(x, [&](const Tokens& from, const Rows& rows, const Tokens& to, const MatrixSizes& sizes,
                  const kernels::Context& context) {
        return kernels::linear(c.dtype, from, rows, c.bias, activation.has_value(), add, to, sizes,
                               context);
    });
}

void linear_int8_(const Tensor& out, const Tensor& x, const Tensor& weight,
                  const Tensor& weight_scale, std::optional<Tensor> bias,
                  std::optional<std::string> activation, bool add, int64_t rotation) {
    const LinearCall c(x, out, weight, bias, activation);
    const View scale("weight_scale", weight_scale);
    STD_TORCH_CHECK(c.K <= MOST_CHANNELS, "x must have at most ", MOST_CHANNELS, " channels, got ",
                    c.K);
    STD_TORCH_CHECK(rotation != 1 && is_rotation(rotation, c.K),
                    "rotation must be 0 or a power of 4 that divides K, got ", rotation);
    c.weight.is(ScalarType::Char);
    scale.is(ScalarType::Float).beside(c.x).has({c.N}).rows();
    c.out.apart_from(scale);
    c.each(x, [&](const Tokens& from, const Rows& rows, const Tokens& to, const MatrixSizes& sizes,
                  const kernels::Context& context) {
        return kernels::linear_int8(c.dtype, from, rows, static_cast<const float*>(scale.data),
                                    c.bias, activation.has_value(), add, rotation, to, sizes,
                                    context);
    });
}

void linear_int8(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                 std::optional<Tensor> bias, std::optional<std::string> activation,
                 int64_t rotation, const Tensor& out) {
    linear_int8_(out, x, weight, weight_scale, bias, activation, false, rotation);
}

const Op LINEAR[] = {
    {"linear_", TORCH_BOX(&linear_)},
    {"linear_int8", TORCH_BOX(&linear_int8)},
    {"linear_int8_", TORCH_BOX(&linear_int8_)},
};

}  // namespace
}  // namespace fluxkern::bindings
