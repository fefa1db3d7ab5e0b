// What a .cu file finds instead of the toolkit's cuda_runtime.h when g++ compiles it for a CPU:
//
//   g++ -std=c++20 -O2 -Wno-unknown-pragmas -DFLUXKERN_EMULATOR -Icsrc/emulator
//       -isystem $CUDA_HOME/include -x c++ -c csrc/cuda/<op>.cu
//
// together with csrc/emulator/*.cpp. cuda_bf16.h, cuda_fp16.h and the vector types are the
// toolkit's own. Shared memory is dynamic only: it lies on the heap, exactly as large as the launch
// says, new for each block and filled with NaN. FLUXKERN_EMULATOR_REVERSE=1 runs blocks and threads
// from the last to the first.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#include "device.h"

#undef __shared__
#define __shared__ static_assert(false, "use shared<T>() of csrc/cuda/common.cuh");

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace fluxkern::emulator {

template <uint3 Thread::*FIELD, unsigned uint3::*AXIS>
struct Coordinate {
    operator unsigned() const {
        return self().*FIELD.*AXIS;
    }
};

template <uint3 Thread::*FIELD>
struct Index {
    Coordinate<FIELD, &uint3::x> x;
    Coordinate<FIELD, &uint3::y> y;
    Coordinate<FIELD, &uint3::z> z;
};

}  // namespace fluxkern::emulator

using fluxkern::emulator::Site;

inline constexpr fluxkern::emulator::Index<&fluxkern::emulator::Thread::index> threadIdx = {};
inline constexpr fluxkern::emulator::Index<&fluxkern::emulator::Thread::block_index> blockIdx = {};
inline constexpr fluxkern::emulator::Index<&fluxkern::emulator::Thread::block_dim> blockDim = {};
inline constexpr fluxkern::emulator::Index<&fluxkern::emulator::Thread::grid_dim> gridDim = {};

inline void __syncthreads(Site site = Site::here()) {
    fluxkern::emulator::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, Site site = Site::here()) {
    fluxkern::emulator::warp_barrier(mask, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, Site site = Site::here()) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = fluxkern::emulator::exchange(mask, source & 31, bits, site);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// The source lane lies in the same group of `width` lanes, else a lane keeps its own value.
template <class T>
T shuffle_within(unsigned mask, T value, int source, int width, Site site) {
    const int lane = fluxkern::emulator::lane();
    const bool inside = source >= 0 && source / width == lane / width;
    return __shfl_sync(mask, value, inside ? source : lane, 32, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Site site = Site::here()) {
    return shuffle_within(mask, value, fluxkern::emulator::lane() ^ bits, width, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, Site site = Site::here()) {
    return shuffle_within(mask, value, fluxkern::emulator::lane() + by, width, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, Site site = Site::here()) {
    return shuffle_within(mask, value, fluxkern::emulator::lane() - by, width, site);
}

inline void __trap() {
    std::abort();
}

inline float rsqrtf(float x) {
    return 1 / std::sqrt(x);
}

inline float __expf(float x) {
    return std::exp(x);
}

inline float __fdividef(float x, float y) {
    return x / y;
}

inline float __frcp_rn(float x) {
    return 1 / x;
}

using std::max;
using std::min;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const std::tuple<Parameters...> given(std::forward<Arguments>(arguments)...);
    return fluxkern::emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                                  [&] { std::apply(kernel, given); });
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
    return fluxkern::emulator::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
