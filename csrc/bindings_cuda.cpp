// The private torch ops of the CUDA kernels: device, stream and errors of a launch. With
// -DFLUXKERN_EMULATOR the same ops on CPU tensors, run by csrc/emulator, for tests.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda/kernels.h"

namespace fluxkern::bindings {
namespace {

namespace kernels = fluxkern::cuda;
using torch::stable::Tensor;

void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

#ifdef FLUXKERN_EMULATOR

constexpr int MULTIPROCESSORS = 3;  // few, so that small tests have strips of several rows
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

#include "bindings_attention.h"
#include "bindings_fp8.h"
#include "bindings_gelu_tanh.h"
#include "bindings_group_norm.h"
#include "bindings_modulation.h"

namespace fluxkern::bindings {
namespace {

// Those that sm_90a has a second kernel for, in a library of their own.
constexpr const auto& WGMMA_OPS = ATTENTION_OPS<kernels::attention_wgmma>;

void define_all(torch::stable::detail::StableLibrary& library) {
    define_ops(library);
    define_ops(library, HEAD_OPS);
    define_ops(library, ATTENTION_OPS<kernels::attention>);
    define_ops(library, GELU_OPS);
    define_ops(library, FP8_OPS);
    define_ops(library, GROUP_NORM_OPS);
    define_ops(library, MODULATION_OPS);
}

void implement_all(torch::stable::detail::StableLibrary& library) {
    implement_ops(library);
    implement_ops(library, HEAD_OPS);
    implement_ops(library, ATTENTION_OPS<kernels::attention>);
    implement_ops(library, GELU_OPS);
    implement_ops(library, FP8_OPS);
    implement_ops(library, GROUP_NORM_OPS);
    implement_ops(library, MODULATION_OPS);
}

}  // namespace
}  // namespace fluxkern::bindings

#ifdef FLUXKERN_EMULATOR

STABLE_TORCH_LIBRARY(fluxkern_cuda_emulator, library) {
    fluxkern::bindings::define_all(library);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda_emulator, CPU, library) {
    fluxkern::bindings::implement_all(library);
}

STABLE_TORCH_LIBRARY(fluxkern_cuda_wgmma_emulator, library) {
    fluxkern::bindings::define_ops(library, fluxkern::bindings::WGMMA_OPS);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda_wgmma_emulator, CPU, library) {
    fluxkern::bindings::implement_ops(library, fluxkern::bindings::WGMMA_OPS);
}

#else

STABLE_TORCH_LIBRARY(fluxkern_cuda, library) {
    fluxkern::bindings::define_all(library);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda, CUDA, library) {
    fluxkern::bindings::implement_all(library);
}

STABLE_TORCH_LIBRARY(fluxkern_cuda_wgmma, library) {
    fluxkern::bindings::define_ops(library, fluxkern::bindings::WGMMA_OPS);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda_wgmma, CUDA, library) {
    fluxkern::bindings::implement_ops(library, fluxkern::bindings::WGMMA_OPS);
}

#endif
