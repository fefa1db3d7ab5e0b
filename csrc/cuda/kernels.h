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

}  // namespace fluxkern::cuda
