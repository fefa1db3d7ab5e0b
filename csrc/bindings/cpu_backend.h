// The CPU kernels on torch's threads.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../cpu/machine.h"

namespace fluxkern::bindings {

namespace kernels = fluxkern::cpu;

inline void parallel_for(int64_t begin, int64_t end, int64_t grain,
                         void (*range)(int64_t, int64_t, void*), void* state) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, range, state));
}

inline kernels::Context context = kernels::this_machine(parallel_for);

template <class Launch>
void run(const torch::stable::Tensor&, const Launch& launch) {
    launch(context);
}

}  // namespace fluxkern::bindings
