// The CPU kernels without torch: pointers, sizes, strides and a parallel_for.
//
// csrc/cpu/*.cpp are compiled once per instruction set, each time with -DFLUXKERN_ISA=<name>:
//
//   baseline  no flag of the instruction set
//   avx2      -mavx2 -mfma -mf16c
//   avx512    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
#pragma once

#include <cstdint>

#include "../views.h"

namespace fluxkern::cpu {

using Range = void (*)(int64_t begin, int64_t end, void* state);

struct Context {
    // Calls range on parts of [begin, end), none smaller than grain, on the threads of torch.
    void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Range range, void* state);
};

}  // namespace fluxkern::cpu
