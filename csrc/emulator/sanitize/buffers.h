// Inputs and outputs for the kernels under a sanitizer: views whose last element is the last of a
// heap block of its own, inputs of random numbers, outputs that start as NaN and must not stay it.
//
//   g++ -std=c++20 -O1 -g -fsanitize=address,undefined (or thread) -Wno-unknown-pragmas
//       -DFLUXKERN_EMULATOR -Icsrc/emulator -isystem $CUDA_HOME/include -x c++
//       csrc/emulator/sanitize/<op>.cpp csrc/cuda/<op>.cu csrc/emulator/*.cpp
//
// The program ends with 0 when every launch came back, every output is written, and blocks and
// threads from the last to the first give the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "../../cuda/kernels.h"

namespace fluxkern::sanitize {

const cuda::Context CONTEXT = {nullptr, 3};

inline int size_of(DType dtype) {
    return dtype == DType::f32 ? 4 : 2;
}

struct Memory {
    std::unique_ptr<unsigned char[]> bytes;
    size_t size;
    DType dtype;
    bool written;  // by the kernel
    bool fp8 = false;
};

class Buffers {
public:
    explicit Buffers(DType dtype) : dtype_(dtype) {}

    // `offset` elements into a block of count elements; an output when not `filled`.
    void* take(int64_t count, bool filled, int64_t offset = 0, DType dtype = DType(-1)) {
        const DType type = dtype == DType(-1) ? dtype_ : dtype;
        const size_t size = size_t(count + offset) * size_of(type);
        blocks_.push_back({std::make_unique<unsigned char[]>(size), size, type, !filled});
        for (int64_t i = 0; i < count + offset; ++i) put(blocks_.back(), i, filled);
        return blocks_.back().bytes.get() + offset * size_of(type);
    }
    uint8_t* take_fp8(int64_t count) {  // an output
        auto bytes = std::make_unique<unsigned char[]>(count);
        blocks_.push_back({std::move(bytes), size_t(count), {}, true, true});
        return blocks_.back().bytes.get();
    }
    void poison_outputs() {
        for (Memory& block : blocks_) {
            if (block.written) std::memset(block.bytes.get(), 0xff, block.size);
        }
    }
    std::vector<unsigned char> outputs() const {
        std::vector<unsigned char> all;
        for (const Memory& block : blocks_) {
            if (block.written) all.insert(all.end(), &block.bytes[0], &block.bytes[block.size]);
        }
        return all;
    }
    bool all_written() const {
        bool all = true;
        for (const Memory& block : blocks_) {
            const int64_t count = int64_t(block.size) / (block.fp8 ? 1 : size_of(block.dtype));
            for (int64_t i = 0; block.written && i < count; ++i) all &= !is_nan(block, i);
        }
        return all;
    }

private:
    void put(Memory& block, int64_t i, bool filled) {
        const float value = filled ? normal_(random_) : std::numeric_limits<float>::quiet_NaN();
        const __nv_bfloat16 b(value);
        const __half h(value);
        const void* from = block.dtype == DType::f32    ? static_cast<const void*>(&value)
                           : block.dtype == DType::bf16 ? static_cast<const void*>(&b)
                                                        : static_cast<const void*>(&h);
        const int size = size_of(block.dtype);
        std::memcpy(&block.bytes[i * size], from, size);
    }
    static bool is_nan(const Memory& block, int64_t i) {
        if (block.fp8) return (block.bytes[i] & 0x7f) == 0x7f;
        uint32_t bits = 0;
        const int size = size_of(block.dtype);
        std::memcpy(&bits, &block.bytes[i * size], size);
        const uint32_t inf = size == 4 ? 0x7f800000 : block.dtype == DType::bf16 ? 0x7f80 : 0x7c00;
        return (bits & (size == 4 ? 0x7fffffff : 0x7fff)) > inf;
    }

    DType dtype_;
    std::vector<Memory> blocks_;
    std::mt19937 random_{20261124};
    std::normal_distribution<float> normal_;
};

struct Shape {
    int64_t B, L, C, txt_len;
    int64_t spare;   // elements between rows
    int64_t offset;  // elements in front: misaligned when odd
};

inline Sizes sizes_of(const Shape& s) {
    return {s.B, s.L, s.C, s.txt_len};
}

inline Tokens tokens(Buffers& buffers, const Shape& s, bool filled = true) {
    const int64_t l = filled ? s.C + s.spare : s.C, b = l * s.L;
    const int64_t count = s.B && s.L ? (s.B - 1) * b + (s.L - 1) * l + s.C : 0;
    return {buffers.take(count, filled, filled ? s.offset : 0), b, l};
}

inline Tokens fp8_tokens(Buffers& buffers, const Shape& s) {
    return {buffers.take_fp8(s.B * s.L * s.C), s.L * s.C, s.C};
}

// One row of all tokens where the shape has no text; the inputs are views of a wider table.
inline Vectors vectors(Buffers& buffers, const Shape& s, bool filled = true) {
    const int64_t S = s.txt_len > 0 ? 2 : 1, row = filled ? 3 * s.C + s.spare : s.C, b = S * row;
    const int64_t count = s.B ? (s.B - 1) * b + (S - 1) * row + s.C : 0;
    return {buffers.take(count, filled, filled ? s.offset : 0), b, S == 2 ? row : 0};
}

inline float* scratch(Buffers& buffers, int64_t floats) {  // exactly as large as asked for
    return static_cast<float*>(buffers.take(floats, false, 0, DType::f32));
}

// Runs it forwards and backwards; ends the program when something is wrong.
inline void check(const char* op, Buffers& buffers, const std::function<cudaError_t()>& run) {
    std::vector<unsigned char> results[2];
    for (const bool reverse : {false, true}) {
        setenv("FLUXKERN_EMULATOR_REVERSE", reverse ? "1" : "0", 1);
        buffers.poison_outputs();
        const cudaError_t error = run();
        if (error != cudaSuccess) {
            std::fprintf(stderr, "%s: %s\n", op, cudaGetErrorString(error));
            std::exit(3);
        }
        if (!buffers.all_written()) {
            std::fprintf(stderr, "%s leaves an output unwritten\n", op);
            std::exit(4);
        }
        results[reverse] = buffers.outputs();
    }
    if (results[0] != results[1]) {
        std::fprintf(stderr, "%s depends on the order of blocks and threads\n", op);
        std::exit(5);
    }
}

template <class Run>
void over_dtypes(Run run) {
    run(DType::bf16);
#ifndef __SANITIZE_THREAD__  // threads do the same in all
    run(DType::f32);
    run(DType::f16);
#endif
}

}  // namespace fluxkern::sanitize
