// Tiles of heads [B, L, H, D] in panels of 64 columns, swizzled as wgmma.cuh has it, and the maps
// by which TMA finds them. The driver makes those; it is looked for when a kernel is launched, so
// nothing links to it.
#pragma once

#include <cudaTypedefs.h>

#include "wgmma.cuh"

namespace fluxkern::cuda {
namespace {

template <int ROWS, int D>
struct alignas(ATOM_ROWS * ATOM_ROW) Panels {
    Chunk chunks[D / ACROSS_ATOM][ROWS][ATOM_ROW / sizeof(Chunk)];

    __device__ Chunk& chunk_at(int row, int column) {
        return chunks[column / 8][row][column % 8 ^ row % 8];
    }
};

template <int ROWS, int D>
__device__ void load(Panels<ROWS, D>& to, const CUtensorMap& map, int l, int h, int b,
                     Barrier& full) {
    arrive_expecting(full, sizeof(to));
#pragma unroll
    for (int i = 0; i < D / ACROSS_ATOM; ++i) {
        load_box(to.chunks[i], map, i * ACROSS_ATOM, l, h, b, full);
    }
}

// A stride in bytes; an axis of one element has none, so anything that a map takes.
inline int64_t map_stride(int64_t stride, int64_t size) {
    return size == 1 ? 16 : stride * 2;
}

// Whether a map takes them (cuTensorMapEncodeTiled, globalAddress and globalStrides).
inline bool has_map(DType dtype, const Heads& x, const AttentionSizes& s, int64_t length) {
    bool all = at_16_bytes(x.data, dtype);
    const int64_t strides[] = {map_stride(x.stride_l, length), map_stride(x.stride_h, s.H),
                               map_stride(x.stride_b, s.B)};
    for (const int64_t stride : strides) {
        all &= stride > 0 && stride % 16 == 0 && stride < int64_t(1) << 40;
    }
    return all;
}

struct Encoder {
    PFN_cuTensorMapEncodeTiled_v12000 run = nullptr;
    cudaError_t error;

    Encoder() {
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        void* function = nullptr;
        error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                 cudaEnableDefault, &found);
        const bool there = found == cudaDriverEntryPointSuccess && function != nullptr;
        if (error == cudaSuccess && !there) error = cudaErrorNotSupported;
        if (error == cudaSuccess) run = reinterpret_cast<decltype(run)>(function);
    }

    // Boxes of `rows` tokens of one head and a panel's columns.
    cudaError_t operator()(CUtensorMap& map, DType dtype, const Heads& x, const AttentionSizes& s,
                           int64_t length, unsigned rows) const {
        const CUtensorMapDataType type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        const cuuint64_t sizes[] = {cuuint64_t(s.D), cuuint64_t(length), cuuint64_t(s.H),
                                    cuuint64_t(s.B)};
        const cuuint64_t strides[] = {cuuint64_t(map_stride(x.stride_l, length)),
                                      cuuint64_t(map_stride(x.stride_h, s.H)),
                                      cuuint64_t(map_stride(x.stride_b, s.B))};
        const cuuint32_t box[] = {ACROSS_ATOM, rows, 1, 1}, steps[] = {1, 1, 1, 1};
        const CUresult result =
            run(&map, type, 4, x.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
    }
};

}  // namespace
}  // namespace fluxkern::cuda
