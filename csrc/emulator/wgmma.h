// What csrc/cuda/wgmma.cuh finds instead of the instructions of sm_90a. Copies are done when no
// thread can go on, products when they are waited for, each as late as a GPU may do it; what they
// write holds NaN from their start.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <array>

#include "device.h"

namespace fluxkern::emulator {

struct Product {  // 64 x 16 by 16 x N, by four warps
    float* c;
    int count;           // N / 2, of a thread
    const uint32_t* a;   // registers; none: in shared memory
    uint64_t a_at, b_at;  // descriptors
    bool b_transposed, add;
    float2 (*widen)(uint32_t);
};

unsigned shared_address(const void* p);

void start_barrier(void* barrier, int arrivals);
void arrive(void* barrier, int bytes);
void wait_for_phase(const void* barrier, unsigned parity, Site site);
void named_barrier(int id, int threads, bool waits, Site site);

void load_box(void* to, const CUtensorMap& map, const std::array<int, 4>& first, void* barrier);

void start_product(const Product& product);
void begin_products();
void end_products();
void wait_for_products(int left, Site site);

}  // namespace fluxkern::emulator
