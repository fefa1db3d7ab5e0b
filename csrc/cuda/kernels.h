// The CUDA kernels without torch: pointers, sizes, strides and a stream; each returns the launch's
// error. Compile csrc/cuda/*.cu with
//
//   nvcc -std=c++20 -O3 -Xcompiler=-fPIC -gencode=arch=compute_80,code=sm_80 ... -c
//
// and link with cudart; for g++ and a CPU see csrc/host/cuda_runtime.h.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "../views.h"

namespace fluxkern::cuda {

struct Context {
    cudaStream_t stream;
    int multiprocessors;  // of the current device
};

// Streams: tokens before txt_len take the vectors txt_*, the others img_*. A gradient of a stream
// without data is not asked for. `scratch`: as many floats as <op>_scratch says.

cudaError_t norm_modulate(DType dtype, Tokens x, Rows txt_scale, Rows txt_shift, Rows img_scale,
                          Rows img_shift, Tokens out, Sizes sizes, float eps,
                          const Context& context);

int64_t norm_modulate_backward_scratch(Sizes sizes, const Context& context);

cudaError_t norm_modulate_backward(DType dtype, Tokens dh, Tokens x, Rows txt_scale, Rows img_scale,
                                   Tokens dx, Rows txt_dscale, Rows txt_dshift, Rows img_dscale,
                                   Rows img_dshift, Sizes sizes, float eps, float* scratch,
                                   const Context& context);

cudaError_t gated_residual(DType dtype, Tokens x, Tokens y, Rows txt_gate, Rows img_gate,
                           Tokens out, Sizes sizes, const Context& context);

int64_t gated_residual_backward_scratch(Sizes sizes, const Context& context);

cudaError_t gated_residual_backward(DType dtype, Tokens dx_new, Tokens y, Rows txt_gate,
                                    Rows img_gate, Tokens dy, Rows txt_dgate, Rows img_dgate,
                                    Sizes sizes, float* scratch, const Context& context);

cudaError_t gated_residual_norm_modulate(DType dtype, Tokens x, Tokens y, Rows txt_gate,
                                         Rows txt_scale, Rows txt_shift, Rows img_gate,
                                         Rows img_scale, Rows img_shift, Tokens x_new, Tokens h,
                                         Sizes sizes, float eps, const Context& context);

int64_t gated_residual_norm_modulate_backward_scratch(Sizes sizes, const Context& context);

cudaError_t gated_residual_norm_modulate_backward(DType dtype, Tokens dx_new, Tokens dh,
                                                  Tokens x_new, Tokens y, Rows txt_gate,
                                                  Rows txt_scale, Rows img_gate, Rows img_scale,
                                                  Tokens dx, Tokens dy, Rows txt_dgate,
                                                  Rows txt_dscale, Rows txt_dshift, Rows img_dgate,
                                                  Rows img_dscale, Rows img_dshift, Sizes sizes,
                                                  float eps, float* scratch,
                                                  const Context& context);

}  // namespace fluxkern::cuda
