// The CPU kernels without torch: pointers, sizes, strides and a parallel_for.
//
// csrc/cpu/*.cpp are compiled once per instruction set, each time with -DFLUXKERN_ISA=<name>:
//
//   baseline  no flag of an instruction set
//   avx2      -mavx2 -mfma -mf16c
//   avx512    -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
//
// on other machines than x86-64 as baseline alone.
#pragma once

#include <cstdint>

#include "../views.h"

namespace fluxkern::cpu {

enum class Isa { baseline, avx2, avx512 };

struct Context {
    Isa isa;
    // Calls range on parts of [begin, end), none smaller than grain, on the threads of torch.
    void (*parallel_for)(int64_t begin, int64_t end, int64_t grain,
                         void (*range)(int64_t begin, int64_t end, void* state), void* state);
};

// One kernel, compiled for each instruction set; runs the one of the Context, its last argument.
template <class... Args>
struct Kernel {
    void (*compiled[3])(Args...);

    template <class... Given>
    void operator()(const Given&... given) const {
        const Context& context = (given, ...);
        compiled[int(context.isa)](given...);
    }
};
template <class... Args>
Kernel(void (*)(Args...), void (*)(Args...), void (*)(Args...)) -> Kernel<Args...>;

#ifdef __x86_64__
#define FLUXKERN_KERNEL(name, ...)                 \
    namespace baseline { void name(__VA_ARGS__); } \
    namespace avx2 { void name(__VA_ARGS__); }     \
    namespace avx512 { void name(__VA_ARGS__); }   \
    [[maybe_unused]] constexpr Kernel name = {baseline::name, avx2::name, avx512::name};
#else
#define FLUXKERN_KERNEL(name, ...)                 \
    namespace baseline { void name(__VA_ARGS__); } \
    [[maybe_unused]] constexpr Kernel name = {baseline::name, baseline::name, baseline::name};
#endif

FLUXKERN_KERNEL(norm_modulate, DType, Tokens x, Rows txt_scale, Rows txt_shift, Rows img_scale,
                Rows img_shift, Tokens out, const Sizes&, float eps, const Context&)
FLUXKERN_KERNEL(norm_modulate_backward, DType, Tokens dh, Tokens x, Rows txt_scale, Rows img_scale,
                Tokens dx, Rows txt_dscale, Rows txt_dshift, Rows img_dscale, Rows img_dshift,
                const Sizes&, float eps, float* scratch, const Context&)
FLUXKERN_KERNEL(gated_residual, DType, Tokens x, Tokens y, Rows txt_gate, Rows img_gate,
                Tokens x_new, const Sizes&, const Context&)
FLUXKERN_KERNEL(gated_residual_backward, DType, Tokens dx_new, Tokens y, Rows txt_gate,
                Rows img_gate, Tokens dy, Rows txt_dgate, Rows img_dgate, const Sizes&,
                float* scratch, const Context&)
FLUXKERN_KERNEL(gated_residual_norm_modulate, DType, Tokens x, Tokens y, Rows txt_gate,
                Rows txt_scale, Rows txt_shift, Rows img_gate, Rows img_scale, Rows img_shift,
                Tokens x_new, Tokens h, const Sizes&, float eps, const Context&)
FLUXKERN_KERNEL(gated_residual_norm_modulate_backward, DType, Tokens dx_new, Tokens dh,
                Tokens x_new, Tokens y, Rows txt_gate, Rows txt_scale, Rows img_gate,
                Rows img_scale, Tokens dx, Tokens dy, Rows txt_dgate, Rows txt_dscale,
                Rows txt_dshift, Rows img_dgate, Rows img_dscale, Rows img_dshift, const Sizes&,
                float eps, float* scratch, const Context&)
FLUXKERN_KERNEL(stream_copy, const void* source, void* target, int64_t bytes, const Context&)

// Tokens of one stream of one batch element, so many that no sum depends on the threads.
struct Chunks {
    int64_t rows, txt, img;  // tokens a chunk; chunks of a batch element's text and image
};

static inline Chunks chunks_of(const Sizes& sizes) {
    const int64_t spread = sizes.B * sizes.L / 64, rows = spread < 16 ? 16 : spread;
    return {rows, (sizes.txt_len + rows - 1) / rows, (sizes.L - sizes.txt_len + rows - 1) / rows};
}

// Of fp32 rows in scratch memory, which are read and written in whole vectors.
static inline int64_t padded(int64_t C) {
    return (C + 31) / 32 * 32;
}

static inline int64_t chunk_sums(const Sizes& sizes, int64_t vectors) {
    const Chunks chunks = chunks_of(sizes);
    return sizes.B * (chunks.txt + chunks.img) * vectors * padded(sizes.C);
}

static inline int64_t norm_modulate_backward_scratch(const Sizes& sizes, const Context&) {
    return chunk_sums(sizes, 2);
}

static inline int64_t gated_residual_backward_scratch(const Sizes& sizes, const Context&) {
    return chunk_sums(sizes, 1);
}

static inline int64_t gated_residual_norm_modulate_backward_scratch(const Sizes& sizes,
                                                                    const Context&) {
    return chunk_sums(sizes, 3);
}

}  // namespace fluxkern::cpu
