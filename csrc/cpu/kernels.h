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

#include "../heads.h"
#include "../images.h"
#include "../matrices.h"
#include "../stored.h"
#include "../views.h"

namespace fluxkern::cpu {

constexpr int64_t MOST_TOKENS = INT64_MAX;  // of all batch elements of a stream

enum class Isa { baseline, avx2, avx512 };

struct Context {
    Isa isa;
    bool vnni;  // AVX512-VNNI, which not every avx512 has
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

FLUXKERN_KERNEL(norm_modulate, DType, Tokens x, Vectors scale, Vectors shift, Tokens out,
                const Sizes&, float eps, const Context&)
FLUXKERN_KERNEL(norm_modulate_backward, DType, Tokens dh, Tokens x, Vectors scale, Tokens dx,
                Vectors dscale, Vectors dshift, const Sizes&, float eps, float* scratch,
                const Context&)
FLUXKERN_KERNEL(gated_residual, DType, Tokens x, Tokens y, Vectors gate, Tokens x_new,
                const Sizes&, const Context&)
FLUXKERN_KERNEL(gated_residual_backward, DType, Tokens dx_new, Tokens y, Vectors gate, Tokens dy,
                Vectors dgate, const Sizes&, float* scratch, const Context&)
FLUXKERN_KERNEL(gated_residual_norm_modulate, DType, Tokens x, Tokens y, Vectors gate,
                Vectors scale, Vectors shift, Tokens x_new, Tokens h, const Sizes&, float eps,
                const Context&)
FLUXKERN_KERNEL(gated_residual_norm_modulate_backward, DType, Tokens dx_new, Tokens dh,
                Tokens x_new, Tokens y, Vectors gate, Vectors scale, Tokens dx, Tokens dy,
                Vectors dgate, Vectors dscale, Vectors dshift, const Sizes&, float eps,
                float* scratch, const Context&)
FLUXKERN_KERNEL(qk_norm_rope, DType, Heads txt_q, Heads txt_k, Heads txt_v, Heads img_q,
                Heads img_k, Heads img_v, const void* txt_q_weight, const void* txt_k_weight,
                const void* img_q_weight, const void* img_k_weight, Angles cos, Angles sin,
                Heads q, Heads k, Heads v, const HeadSizes&, float eps, const Context&)
FLUXKERN_KERNEL(qk_norm_rope_backward, DType, Heads dq_out, Heads dk_out, Heads txt_q,
                Heads txt_k, Heads img_q, Heads img_k, const void* txt_q_weight,
                const void* txt_k_weight, const void* img_q_weight, const void* img_k_weight,
                Angles cos, Angles sin, Heads txt_dq, Heads txt_dk, Heads img_dq, Heads img_dk,
                void* txt_dq_weight, void* txt_dk_weight, void* img_dq_weight,
                void* img_dk_weight, const HeadSizes&, float eps, float* scratch, const Context&)
FLUXKERN_KERNEL(attention, DType, Heads q, Heads k, Heads v, const void* q_weight,
                const void* k_weight, Angles cos, Angles sin, Heads out, float* lse,
                const AttentionSizes&, float eps, float* scratch, const Context&)
FLUXKERN_KERNEL(gelu_tanh, DType, Tokens x, Tokens out, const Sizes&, const Context&)
FLUXKERN_KERNEL(gelu_tanh_backward, DType, Tokens dy, Tokens x, Tokens dx, const Sizes&,
                const Context&)
FLUXKERN_KERNEL(group_norm_silu, DType, Images x, const void* weight, const void* bias, Images out,
                const ImageSizes&, float eps, float* scratch, const Context&)
FLUXKERN_KERNEL(group_norm_silu_backward, DType, Images dy, Images x, const void* weight,
                const void* bias, Images dx, void* dweight, void* dbias, const ImageSizes&,
                float eps, float* scratch, const Context&)
FLUXKERN_KERNEL(modulation, DType, Tokens vec, Rows weight, const void* bias, Rows out,
                const MatrixSizes&, float* scratch, const Context&)
FLUXKERN_KERNEL(linear, DType, Tokens x, Rows weight, const void* bias, bool gelu, bool add,
                Tokens out, const MatrixSizes&, const Context&)
FLUXKERN_KERNEL(linear_int8, DType, Tokens x, Rows weight, const float* weight_scale,
                const void* bias, bool gelu, bool add, int64_t rotation, Tokens out,
                const MatrixSizes&, const Context&)
FLUXKERN_KERNEL(dequantise, DType, const StoredRows&, Rows out, float* largest, const Context&)
FLUXKERN_KERNEL(requantise_int8, const StoredRows&, Rows out, float* scale, const Context&)

// Sums over the tokens of a stream: each partial is of one stream of one batch element, and of so
// many tokens that no sum depends on the threads.
struct Partials {
    int64_t rows, txt, img;  // tokens of each; how many of a batch element's text and image
};

static inline Partials partials_of(const Sizes& sizes) {
    const int64_t spread = sizes.B * sizes.L / 64, rows = spread < 16 ? 16 : spread;
    return {rows, (sizes.txt_len + rows - 1) / rows, (sizes.L - sizes.txt_len + rows - 1) / rows};
}

// Of fp32 rows in scratch memory, which are read and written in whole vectors.
static inline int64_t padded(int64_t C) {
    return (C + 31) / 32 * 32;
}

static inline int64_t partial_floats(const Sizes& sizes, int64_t vectors) {
    const Partials partials = partials_of(sizes);
    return sizes.B * (partials.txt + partials.img) * vectors * padded(sizes.C);
}

static inline int64_t norm_modulate_backward_scratch(const Sizes& sizes, const Context&) {
    return partial_floats(sizes, 2);
}

static inline int64_t gated_residual_backward_scratch(const Sizes& sizes, const Context&) {
    return partial_floats(sizes, 1);
}

static inline int64_t gated_residual_norm_modulate_backward_scratch(const Sizes& sizes,
                                                                    const Context&) {
    return partial_floats(sizes, 3);
}

// Blocks of pixels of a channels-last picture: of a fixed number, and so many that few are left.
constexpr int64_t STATISTICS_PIXELS = 64;

static inline int64_t pixels_of_a_partial(const ImageSizes& sizes) {
    return sizes.P / 64 < STATISTICS_PIXELS ? STATISTICS_PIXELS : sizes.P / 64;
}

static inline int64_t blocks_of(const ImageSizes& sizes, int64_t pixels) {
    return (sizes.P + pixels - 1) / pixels;
}

static inline int64_t group_norm_silu_scratch(const ImageSizes& sizes, const Context&) {
    if (!sizes.channels_last) return 0;
    const int64_t blocks = blocks_of(sizes, STATISTICS_PIXELS);
    return sizes.B * 2 * (blocks * sizes.groups + padded(sizes.C));
}

static inline int64_t group_norm_silu_backward_scratch(const ImageSizes& sizes,
                                                       const Context& context) {
    const int64_t a_row_each = sizes.B * 2 * padded(sizes.C);
    if (!sizes.channels_last) return a_row_each;
    const int64_t partials = blocks_of(sizes, pixels_of_a_partial(sizes));
    return group_norm_silu_scratch(sizes, context) + (2 + partials) * a_row_each;
}

// Of an attention that norms and rotates: the angles, a row a token.
static inline int64_t rope_attention_scratch(DType, const AttentionSizes& sizes, const Context&) {
    return sizes.L * padded(sizes.D);
}

static inline int64_t modulation_scratch(const MatrixSizes& sizes, const Context&) {
    return sizes.S * sizes.B * padded(sizes.K);
}

static inline int64_t qk_norm_rope_backward_scratch(const HeadSizes& sizes, const Context&) {
    return partial_floats({sizes.B, sizes.L, sizes.D, sizes.txt_len}, 2);
}

}  // namespace fluxkern::cpu
