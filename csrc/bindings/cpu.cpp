// The CPU kernels as private torch ops.
#include "activations.h"
#include "attention.h"
#include "bench.h"
#include "group_norm.h"
#include "heads.h"
#include "linear.h"
#include "modulation.h"
#include "norms.h"
#include "stored.h"

namespace fluxkern::bindings {
namespace {

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

}  // namespace
}  // namespace fluxkern::bindings

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cpu, CPU, library) {
    using namespace fluxkern::bindings;
    implement(library, NORMS, HEADS, ATTENTION<kernels::attention>, ACTIVATIONS, GROUP_NORM,
              MODULATION, LINEAR, STORED, BENCH);
}

STABLE_TORCH_LIBRARY_IMPL(fluxkern_cpu, CompositeExplicitAutograd, library) {
    library.impl("_set_isa", TORCH_BOX(&fluxkern::bindings::set_isa));
    library.impl("_isa", TORCH_BOX(&fluxkern::bindings::isa));
}
