// fluxkern_cpu: the CPU kernels as private torch ops.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cpu/machine.h"

namespace fluxkern::bindings {
namespace {

namespace kernels = fluxkern::cpu;
using kernels::Isa;

struct Level {
    const char* name;
    Isa isa;
    bool vnni;
};

constexpr Level LEVELS[] = {
    {"baseline", Isa::baseline, false},
    {"avx2", Isa::avx2, false},
    {"avx512", Isa::avx512, false},
    {"avx512-vnni", Isa::avx512, true},
};

bool runs_here(const Level& level) {
    return kernels::has(level.isa) && (!level.vnni || kernels::has_vnni());
}

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  void (*range)(int64_t, int64_t, void*), void* state) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, range, state));
}

kernels::Context context = kernels::this_machine(parallel_for);

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
#include "bindings_linear.h"
#include "bindings_modulation.h"
#include "bindings_stored.h"

namespace fluxkern::bindings {
namespace {

void set_isa(std::string name) {
    for (const Level& level : LEVELS) {
        if (name != level.name) continue;
        STD_TORCH_CHECK(runs_here(level), "this machine has no ", name);
        context.isa = level.isa;
        context.vnni = level.vnni;
        return;
    }
    STD_TORCH_CHECK(false, "name must be baseline, avx2, avx512 or avx512-vnni, got ", name);
}

std::string isa() {
    for (const Level& level : LEVELS) {
        if (level.isa == context.isa && level.vnni == context.vnni) return level.name;
    }
    return "";
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
    define_ops(library, ATTENTION_OPS<kernels::attention>);
    define_ops(library, GELU_OPS);
    define_ops(library, GROUP_NORM_OPS);
    define_ops(library, MODULATION_OPS);
    define_ops(library, LINEAR_OPS);
    define_ops(library, LINEAR_INT8_OPS);
    define_ops(library, STORED_OPS);
    library.def("_stream_copy(Tensor source, Tensor(a!) target) -> ()");
    library.def("_set_isa(str name) -> ()");
    library.def("_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cpu, CPU, library) {
    using namespace fluxkern::bindings;
    implement_ops(library);
    implement_ops(library, HEAD_OPS);
    implement_ops(library, ATTENTION_OPS<kernels::attention>);
    implement_ops(library, GELU_OPS);
    implement_ops(library, GROUP_NORM_OPS);
    implement_ops(library, MODULATION_OPS);
    implement_ops(library, LINEAR_OPS);
    implement_ops(library, LINEAR_INT8_OPS);
    implement_ops(library, STORED_OPS);
    library.impl("_stream_copy", TORCH_BOX(&stream_copy));
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cpu, CompositeExplicitAutograd, library) {
    library.impl("_set_isa", TORCH_BOX(&fluxkern::bindings::set_isa));
    library.impl("_isa", TORCH_BOX(&fluxkern::bindings::isa));
}
