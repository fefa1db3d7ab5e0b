// fluxkern_cpu: the CPU kernels as private torch ops; chooses the instruction set.
#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"

namespace fluxkern::bindings {
namespace {

namespace kernels = fluxkern::cpu;
using kernels::Isa;

constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512"};

bool runs_here(Isa isa) {
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return isa == Isa::baseline;
}

Isa best_isa() {
    return runs_here(Isa::avx512) ? Isa::avx512 : runs_here(Isa::avx2) ? Isa::avx2 : Isa::baseline;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  void (*range)(int64_t, int64_t, void*), void* state) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, range, state));
}

kernels::Context context = {best_isa(), parallel_for};

template <class Launch>
void run(const torch::stable::Tensor&, const Launch& launch) {
    launch(context);
}

}  // namespace
}  // namespace fluxkern::bindings

#include "bindings_gelu_tanh.h"
#include "bindings_group_norm.h"
#include "bindings_heads.h"
#include "bindings_attention.h"
#include "bindings_modulation.h"

namespace fluxkern::bindings {
namespace {

void set_isa(std::string name) {
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
        if (name != ISA_NAMES[int(isa)]) continue;
        STD_TORCH_CHECK(runs_here(isa), "this machine has no ", name);
        context.isa = isa;
        return;
    }
    STD_TORCH_CHECK(false, "name must be baseline, avx2 or avx512, got ", name);
}

std::string isa() {
    return ISA_NAMES[int(context.isa)];
}

void stream_copy(const Tensor& source, const Tensor& target) {
    const int64_t bytes = source.numel() * int64_t(source.element_size());
    STD_TORCH_CHECK(source.is_contiguous() && target.is_contiguous() && bytes % 128 == 0 &&
                        target.numel() * int64_t(target.element_size()) == bytes,
                    "source and target must be contiguous, of one size, a multiple of 128 bytes");
    const auto place = uint64_t(source.data_ptr()) | uint64_t(target.data_ptr());
    STD_TORCH_CHECK(place % 64 == 0, "source and target must be aligned to 64 bytes");
    kernels::stream_copy(source.data_ptr(), target.data_ptr(), bytes, context);
}

}  // namespace
}  // namespace fluxkern::bindings

STABLE_TORCH_LIBRARY(fluxkern_cpu, library) {
    using namespace fluxkern::bindings;
    define_ops(library);
    define_ops(library, HEAD_OPS);
    define_ops(library, ATTENTION_OPS);
    define_ops(library, GELU_OPS);
    define_ops(library, GROUP_NORM_OPS);
    define_ops(library, MODULATION_OPS);
    library.def("_stream_copy(Tensor source, Tensor(a!) target) -> ()");
    library.def("_set_isa(str name) -> ()");
    library.def("_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cpu, CPU, library) {
    using namespace fluxkern::bindings;
    implement_ops(library);
    implement_ops(library, HEAD_OPS);
    implement_ops(library, ATTENTION_OPS);
    implement_ops(library, GELU_OPS);
    implement_ops(library, GROUP_NORM_OPS);
    implement_ops(library, MODULATION_OPS);
    library.impl("_stream_copy", TORCH_BOX(&stream_copy));
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cpu, CompositeExplicitAutograd, library) {
    library.impl("_set_isa", TORCH_BOX(&fluxkern::bindings::set_isa));
    library.impl("_isa", TORCH_BOX(&fluxkern::bindings::isa));
}
