// Tensor cores from sm_80 on, by what a warp does together: rows are copied to shared memory while
// it works, read from there as fragments and multiplied. Lane 4 g + t holds, two to a register,
//
//   a [16, 16]  rows g, g + 8, g, g + 8 at columns 2 t, 2 t, 2 t + 8, 2 t + 8 (and the next)
//   b [16, 8]   column g at rows 2 t, 2 t + 8 (and the next)
//   c [16, 8]   fp32: rows g, g, g + 8, g + 8 at columns 2 t, 2 t + 1, 2 t, 2 t + 1
//
// (PTX ISA, mma.m16n8k16). For g++ and a CPU the same comes from csrc/emulator/warp.h.
#pragma once

#include "common.cuh"
#ifdef FLUXKERN_EMULATOR
#include "warp.h"
#endif

namespace fluxkern::cuda {

template <class T>
__device__ uint32_t pack_pair(float a, float b) {
    typename Pair<T>::type pair;
    narrow(pair, a, b);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

#ifdef FLUXKERN_EMULATOR

inline void copy_async(Chunk* to, const void* from, bool there) {
    emulator::start_copy(to, there ? from : nullptr, sizeof(Chunk));
}

inline void wait_for_copies() {
    emulator::finish_copies();
}

inline void load_matrices(uint32_t (&out)[4], const Chunk* row) {
    emulator::load_matrices(out, row);
}

inline void load_transposed(uint32_t (&out)[4], const Chunk* row) {
    emulator::load_transposed(out, row);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply_add(c, a, b0, b1, [](uint32_t bits) {
        typename Pair<T>::type pair;
        memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
        return widen(pair);
    });
}

inline bool any_lane(bool v) {
    return emulator::any_lane(v);
}

inline float exp2_estimate(float x) {
    return std::exp2(x);
}

#else

__device__ inline unsigned shared_address(const Chunk* p) {
    return unsigned(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, zeros when they are not there; to be waited for.
__device__ inline void copy_async(Chunk* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
}

// For those that this thread has begun; a barrier makes them visible to others.
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four matrices of 8 x 8: lane 8 m + i names row i of the m-th; a lane gets the pair of row g and
// columns 2 t, 2 t + 1 of each.
__device__ inline void load_matrices(uint32_t (&out)[4], const Chunk* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of rows 2 t, 2 t + 1 and column g.
__device__ inline void load_transposed(uint32_t (&out)[4], const Chunk* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b
template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline bool any_lane(bool v) {
    return __any_sync(0xffffffff, v);
}

// 2^x, two units of the last place off at most; results below 2^-126 are 0.
__device__ inline float exp2_estimate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

}  // namespace fluxkern::cuda
