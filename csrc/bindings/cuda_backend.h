// Device, stream and errors of a launch of the CUDA kernels; with -DFLUXKERN_EMULATOR they take CPU
// tensors, run by csrc/emulator, for tests.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../cuda/kernels.h"

namespace fluxkern::bindings {
namespace {

namespace kernels = fluxkern::cuda;
using torch::stable::Tensor;

void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

#ifdef FLUXKERN_EMULATOR

constexpr int MULTIPROCESSORS = 3;  // few, so that small tests have partials of several rows
constexpr int SHARED_MEMORY = 164 << 10;

template <class Launch>
void run(const Tensor& x, Launch launch) {
    STD_TORCH_CHECK(x.is_cpu(), "the emulator takes CPU tensors");
    check(launch(kernels::Context{nullptr, MULTIPROCESSORS, SHARED_MEMORY}));
}

#else

// In libtorch_cuda, which a torch for CPUs does not have: looked for when a kernel first runs.
void* in_torch_cuda(const char* name) {
    void* loaded = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);  // not in the global scope
    return loaded == nullptr ? nullptr : dlsym(loaded, name);
}

cudaStream_t current_stream(int32_t device) {
    using Find = AOTITorchError (*)(int32_t device, void** stream);
    static const auto find =
        reinterpret_cast<Find>(in_torch_cuda("aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(find != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(find(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

template <class Launch>
void run(const Tensor& x, Launch launch) {
    STD_TORCH_CHECK(x.is_cuda(), "the CUDA kernels take tensors on a GPU, got one on a CPU");
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    kernels::Context context = {current_stream(device), 0};
    check(cudaDeviceGetAttribute(&context.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check(cudaDeviceGetAttribute(&context.shared_memory,
                                 cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    check(launch(context));
}

#endif

}  // namespace
}  // namespace fluxkern::bindings
