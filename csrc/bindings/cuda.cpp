// The CUDA kernels as private torch ops; with -DFLUXKERN_EMULATOR on CPU tensors, for tests.
#include "activations.h"
#include "attention.h"
#include "fp8.h"
#include "group_norm.h"
#include "heads.h"
#include "modulation.h"
#include "norms.h"

namespace fluxkern::bindings {
namespace {

void implement_all(torch::stable::detail::StableLibrary& library) {
    implement(library, NORMS, HEADS, ATTENTION<kernels::attention>, ACTIVATIONS, FP8, GROUP_NORM,
              MODULATION);
}

// Those that sm_90a has a second kernel for, in a library of their own.
void implement_wgmma(torch::stable::detail::StableLibrary& library) {
    implement(library, ATTENTION<kernels::attention_wgmma>);
}

}  // namespace
}  // namespace fluxkern::bindings

#ifdef FLUXKERN_EMULATOR

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda_emulator, CPU, library) {
    fluxkern::bindings::implement_all(library);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda_wgmma_emulator, CPU, library) {
    fluxkern::bindings::implement_wgmma(library);
}

#else

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda, CUDA, library) {
    fluxkern::bindings::implement_all(library);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cuda_wgmma, CUDA, library) {
    fluxkern::bindings::implement_wgmma(library);
}

#endif
