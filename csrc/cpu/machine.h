// The Context of the machine that runs a program, without torch.
#pragma once

#include "kernels.h"

namespace fluxkern::cpu {

static inline bool has(Isa isa) {
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

static inline bool has_vnni() {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

// A parallel_for of one thread, the caller's.
static inline void in_this_thread(int64_t begin, int64_t end, int64_t,
                                  void (*range)(int64_t, int64_t, void*), void* state) {
    if (begin < end) range(begin, end, state);
}

// The widest instruction set here.
static inline Context this_machine(decltype(Context::parallel_for) parallel_for = in_this_thread) {
    const Isa isa = has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::baseline;
    return {isa, isa == Isa::avx512 && has_vnni(), parallel_for};
}

}  // namespace fluxkern::cpu
