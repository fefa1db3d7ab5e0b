// Scratch memory of one thread.
#pragma once

#include <cstdlib>

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

struct Buffer {  // fp32 [padded(C)]
    float* const data;

    explicit Buffer(int64_t C)
        : data(static_cast<float*>(std::aligned_alloc(64, padded(C) * sizeof(float)))) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        std::free(data);
    }
};

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
