// The CUDA kernels without torch: pointers, sizes, strides and a stream; each returns the launch's
// error. Compile csrc/cuda/*.cu with
//
//   nvcc -std=c++20 -O3 -Xcompiler=-fPIC -gencode=arch=compute_80,code=sm_80 ... -c
//
// and link with cudart; for g++ and a CPU see csrc/emulator/cuda_runtime.h.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "../heads.h"
#include "../images.h"
#include "../matrices.h"
#include "../views.h"

namespace fluxkern::cuda {

struct Context {
    cudaStream_t stream;
    int multiprocessors;         // of the current device
    int shared_memory = 100 << 10;  // bytes of one of them
};

constexpr int64_t MOST_TOKENS = INT32_MAX;  // of all batch elements of a stream

// `scratch`: as many floats as <op>_scratch says.

cudaError_t norm_modulate(DType dtype, Tokens x, Vectors scale, Vectors shift, Tokens out,
                          Sizes sizes, float eps, const Context& context);

int64_t norm_modulate_backward_scratch(Sizes sizes, const Context& context);

cudaError_t norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Vectors scale, Tokens dx,
                                   Vectors dscale, Vectors dshift, Sizes sizes, float eps,
                                   float* scratch, const Context& context);

cudaError_t gated_residual(DType dtype, Tokens x, Tokens y, Vectors gate, Tokens out, Sizes sizes,
                           const Context& context);

int64_t gated_residual_backward_scratch(Sizes sizes, const Context& context);

cudaError_t gated_residual_backward(DType dtype, Tokens dx_new, Tokens y, Vectors gate, Tokens dy,
                                    Vectors dgate, Sizes sizes, float* scratch,
                                    const Context& context);

cudaError_t gated_residual_norm_modulate(DType dtype, Tokens x, Tokens y, Vectors gate,
                                         Vectors scale, Vectors shift, Tokens x_new, Tokens h,
                                         Sizes sizes, float eps, const Context& context);

int64_t gated_residual_norm_modulate_backward_scratch(Sizes sizes, const Context& context);

cudaError_t gated_residual_norm_modulate_backward(DType dtype, Tokens dx_new, Tokens dh,
                                                  Tokens x_new, Tokens y, Vectors gate,
                                                  Vectors scale, Tokens dx, Tokens dy,
                                                  Vectors dgate, Vectors dscale, Vectors dshift,
                                                  Sizes sizes, float eps, float* scratch,
                                                  const Context& context);

// Text and image of q and k, and v copied beside them unless it has no data; k alone where the new
// q has none. q, k may be the inputs themselves. Weights: [D] of the dtype.
cudaError_t qk_norm_rope(DType dtype, Heads txt_q, Heads txt_k, Heads txt_v, Heads img_q,
                         Heads img_k, Heads img_v, const void* txt_q_weight,
                         const void* txt_k_weight, const void* img_q_weight,
                         const void* img_k_weight, Angles cos, Angles sin, Heads q, Heads k,
                         Heads v, HeadSizes sizes, float eps, const Context& context);

int64_t qk_norm_rope_backward_scratch(HeadSizes sizes, const Context& context);

cudaError_t qk_norm_rope_backward(DType dtype, Heads dq_out, Heads dk_out, Heads txt_q, Heads txt_k,
                                  Heads img_q, Heads img_k, const void* txt_q_weight,
                                  const void* txt_k_weight, const void* img_q_weight,
                                  const void* img_k_weight, Angles cos, Angles sin, Heads txt_dq,
                                  Heads txt_dk, Heads img_dq, Heads img_dk, void* txt_dq_weight,
                                  void* txt_dk_weight, void* img_dq_weight, void* img_dk_weight,
                                  HeadSizes sizes, float eps, float* scratch,
                                  const Context& context);

inline int64_t rope_attention_scratch(DType dtype, const AttentionSizes& s, const Context&) {
    const int64_t both = 2 * s.B * s.L * s.H * s.D;
    return dtype == DType::f32 ? both : both / 2;
}

// lse: [B, L, H], or none. With weights, [D] of the dtype, q and k are normed and rotated first,
// which takes scratch.
cudaError_t attention(DType dtype, Heads q, Heads k, Heads v, const void* q_weight,
                      const void* k_weight, Angles cos, Angles sin, Heads out, float* lse,
                      const AttentionSizes& sizes, float eps, float* scratch,
                      const Context& context);

// The same by wgmma and TMA, on sm_90a alone; cudaErrorNotSupported where it does not take them.
cudaError_t attention_wgmma(DType dtype, Heads q, Heads k, Heads v, const void* q_weight,
                            const void* k_weight, Angles cos, Angles sin, Heads out, float* lse,
                            const AttentionSizes& sizes, float eps, float* scratch,
                            const Context& context);

inline int64_t modulation_scratch(const MatrixSizes&, const Context&) {
    return 0;
}

// vec [S, B, K], weight [N, K], bias [N] or none, out [S B, N].
cudaError_t modulation(DType dtype, Tokens vec, Rows weight, const void* bias, Rows out,
                       const MatrixSizes& sizes, float* scratch, const Context& context);

cudaError_t gelu_tanh(DType dtype, Tokens x, Tokens out, Sizes sizes, const Context& context);

cudaError_t gelu_tanh_backward(DType dtype, Tokens dy, Tokens x, Tokens dx, Sizes sizes,
                               const Context& context);

// Rows in e4m3: out [B, L, C] bytes and row_scale [B, L], out * row_scale is the result.

cudaError_t norm_modulate_fp8(DType dtype, Tokens x, Vectors scale, Vectors shift, Tokens out,
                              float* row_scale, Sizes sizes, float eps, const Context& context);

cudaError_t gelu_tanh_fp8(DType dtype, Tokens x, Tokens out, float* row_scale, Sizes sizes,
                          const Context& context);

int64_t group_norm_silu_scratch(const ImageSizes& sizes, const Context& context);

// All pictures in one of the two layouts; weight, bias [C] of the dtype.
cudaError_t group_norm_silu(DType dtype, Images x, const void* weight, const void* bias, Images out,
                            const ImageSizes& sizes, float eps, float* scratch,
                            const Context& context);

int64_t group_norm_silu_backward_scratch(const ImageSizes& sizes, const Context& context);

cudaError_t group_norm_silu_backward(DType dtype, Images dy, Images x, const void* weight,
                                     const void* bias, Images dx, void* dweight, void* dbias,
                                     const ImageSizes& sizes, float eps, float* scratch,
                                     const Context& context);

}  // namespace fluxkern::cuda
