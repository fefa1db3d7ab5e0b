// What sm_90a adds: tiles of a tensor copied to shared memory by one thread (TMA), barriers that
// count their bytes, products of 128 threads that run on by themselves. Sections of the PTX ISA are
// named where they say what bits mean. For g++ and a CPU the same comes from csrc/emulator/wgmma.h.
#pragma once

#include <cuda.h>

#include "mma.cuh"
#ifdef FLUXKERN_EMULATOR
#include "wgmma.h"
#endif

namespace fluxkern::cuda {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool HOPPER = true;  // whether this is code for sm_90a, or for a CPU
#else
constexpr bool HOPPER = false;
#endif
constexpr int WARPGROUP = 4 * WARP;
constexpr int ATOM_ROWS = 8, ATOM_ROW = 128;  // bytes; of the pattern that a swizzle repeats
constexpr int ACROSS_ATOM = ATOM_ROW / 2;     // elements

struct alignas(8) Barrier {  // mbarrier
    uint64_t bits;
};

// Where an instruction finds a matrix of 16 bits an element in rows of 128 bytes, swizzled: chunk c
// of row r at c ^ (r % 8). Bits 0-13 the address, 16-29 the leading, 32-45 the stride offset, all
// without their last four bits, 62-63 the swizzle, 1 for 128 bytes (wgmma, Matrix Descriptor
// Format). Atoms lie at multiples of 1024, so the base offset is 0. K contiguous: the stride offset
// leads to the next 8 rows, the leading one is not used. N contiguous: the leading offset leads to
// the next 64 columns, the stride offset to the next 8 of K.
__device__ constexpr uint64_t matrix_at(unsigned address, unsigned leading, unsigned stride) {
    return uint64_t(1) << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
           (address & 0x3ffff) >> 4;
}

#ifdef FLUXKERN_EMULATOR

inline unsigned address_of(const void* p) {
    return emulator::shared_address(p);
}

template <class Storage>
Storage& atoms() {
    return shared<Storage>();
}

inline void start(Barrier& barrier, int arrivals) {
    emulator::start_barrier(&barrier, arrivals);
}

inline void show_barriers() {}

inline void arrive(Barrier& barrier) {
    emulator::arrive(&barrier, 0);
}

inline void arrive_expecting(Barrier& barrier, int bytes) {
    emulator::arrive(&barrier, bytes);
}

inline void wait_for(Barrier& barrier, unsigned parity, Site site = Site::here()) {
    emulator::wait_for_phase(&barrier, parity, site);
}

inline void load_box(void* to, const CUtensorMap& map, int d, int l, int h, int b,
                     Barrier& barrier) {
    emulator::load_box(to, map, {d, l, h, b}, &barrier);
}

template <int REGISTERS>
void give_registers() {}

template <int REGISTERS>
void take_registers() {}

inline void meet(int barrier, int threads, Site site = Site::here()) {
    emulator::named_barrier(barrier, threads, true, site);
}

inline void announce(int barrier, int threads, Site site = Site::here()) {
    emulator::named_barrier(barrier, threads, false, site);
}

inline void begin_products() {
    emulator::begin_products();
}

inline void end_products() {
    emulator::end_products();
}

template <int LEFT>
void wait_for_products(Site site = Site::here()) {
    emulator::wait_for_products(LEFT, site);
}

template <class Register>
void settled(Register&) {}

template <class T>
float2 widened(uint32_t bits) {
    typename Pair<T>::type pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
    return widen(pair);
}

template <class T, int COUNT>
void multiply(float (&c)[COUNT], uint64_t a, uint64_t b, bool add) {
    emulator::start_product({c, COUNT, nullptr, a, b, false, add, widened<T>});
}

template <class T, int COUNT>
void multiply_transposed(float (&c)[COUNT], const uint32_t* a, uint64_t b) {
    emulator::start_product({c, COUNT, a, 0, b, true, true, widened<T>});
}

#else

__device__ inline unsigned address_of(const void* p) {
    return unsigned(__cvta_generic_to_shared(p));
}

template <class Storage>
__device__ Storage& atoms() {  // shared<Storage>() at a multiple of 1024
    extern __shared__ __align__(1024) unsigned char swizzled[];
    return *reinterpret_cast<Storage*>(swizzled);
}

__device__ inline void start(Barrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Barriers just begun, to copies; to threads __syncthreads shows them.
__device__ inline void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(&barrier))
                 : "memory");
}

__device__ inline void arrive_expecting(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     address_of(&barrier)),
                 "r"(bytes)
                 : "memory");
}

// Until the phase of this parity is over; that before the first has parity 1.
__device__ inline void wait_for(Barrier& barrier, unsigned parity) {
    const unsigned address = address_of(&barrier);
    for (int over = 0; !over;) {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
            "selp.b32 %0, 1, 0, p; }"
            : "=r"(over)
            : "r"(address), "r"(parity)
            : "memory");
    }
}

// A box of the map, zeros where it leaves the tensor; its bytes are told to the barrier.
__device__ inline void load_box(void* to, const CUtensorMap& map, int d, int l, int h, int b,
                                Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(address_of(to)),
        "l"(&map), "r"(d), "r"(l), "r"(h), "r"(b), "r"(address_of(&barrier))
        : "memory");
}

template <int REGISTERS>
__device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Named barriers: `threads` of a block come to it, some of which do not wait there.
__device__ inline void meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void announce(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers written before are seen by products after.
__device__ inline void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void end_products() {  // of a group
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int LEFT>  // of the last groups may still run
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from moving what it does with registers over the line where they settle.
__device__ inline void settled(float& x) {
    asm volatile("" : "+f"(x)::"memory");
}

__device__ inline void settled(uint32_t& x) {
    asm volatile("" : "+r"(x)::"memory");
}

#define FLUXKERN_8(c, i)                                                                      \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
        "+f"(c[i + 6]), "+f"(c[i + 7])
#define FLUXKERN_32(c, i) \
    FLUXKERN_8(c, i), FLUXKERN_8(c, i + 8), FLUXKERN_8(c, i + 16), FLUXKERN_8(c, i + 24)
#define FLUXKERN_NAMES_32                                                                      \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLUXKERN_NAMES_64                                                                      \
    FLUXKERN_NAMES_32                                                                          \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "    \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Of both types; c in registers as in mma.cuh, 16 rows a warp, N / 8 of its tiles of columns.
#define FLUXKERN_PRODUCTS(T, TYPE)                                                                 \
    template <>                                                                                    \
    __device__ inline void multiply<T>(float (&c)[64], uint64_t a, uint64_t b, bool add) {         \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; "                                     \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                  \
                     " " FLUXKERN_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0; }"                         \
                     : FLUXKERN_32(c, 0), FLUXKERN_32(c, 32)                                       \
                     : "l"(a), "l"(b), "r"(int(add)));                                             \
    }                                                                                              \
    template <>                                                                                    \
    __device__ inline void multiply_transposed<T>(float (&c)[64], const uint32_t* a, uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                  \
                     " " FLUXKERN_NAMES_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"             \
                     : FLUXKERN_32(c, 0), FLUXKERN_32(c, 32)                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }                                                                                              \
    template <>                                                                                    \
    __device__ inline void multiply_transposed<T>(float (&c)[32], const uint32_t* a, uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                   \
                     " " FLUXKERN_NAMES_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"             \
                     : FLUXKERN_32(c, 0)                                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    }

// c = a b, or c += a b: 64 x 16 by 16 x N, both in shared memory with K contiguous
template <class T>
__device__ void multiply(float (&c)[64], uint64_t a, uint64_t b, bool add);

// c += a b: a in registers, b in shared memory with N contiguous
template <class T>
__device__ void multiply_transposed(float (&c)[64], const uint32_t* a, uint64_t b);
template <class T>
__device__ void multiply_transposed(float (&c)[32], const uint32_t* a, uint64_t b);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

FLUXKERN_PRODUCTS(__nv_bfloat16, "bf16")
FLUXKERN_PRODUCTS(__half, "f16")

#endif

#undef FLUXKERN_8
#undef FLUXKERN_32
#undef FLUXKERN_NAMES_32
#undef FLUXKERN_NAMES_64
#undef FLUXKERN_PRODUCTS

#endif

}  // namespace fluxkern::cuda
