// What benchmarks measure beside the kernels; compiled as they are.
#pragma once

#include "../cpu/kernels.h"

namespace fluxkern::cpu {

FLUXKERN_KERNEL(stream_copy, const void* source, void* target, int64_t bytes, const Context&)

}  // namespace fluxkern::cpu
