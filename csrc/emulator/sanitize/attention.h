// Attention against sums in double, by a launcher of csrc/cuda/kernels.h.
#pragma once

#include <cmath>

#include "buffers.h"

namespace fluxkern::sanitize {

struct AttentionShape {
    int64_t B, L, M, H, D, spare, offset;
    bool rope;
};

inline double value(DType dtype, const void* data, int64_t i) {
    if (dtype == DType::f32) return static_cast<const float*>(data)[i];
    if (dtype == DType::bf16) return float(static_cast<const __nv_bfloat16*>(data)[i]);
    return float(static_cast<const __half*>(data)[i]);
}

struct AttentionCall {
    const AttentionShape s;
    const DType dtype;
    decltype(cuda::attention)* const attention;
    Buffers memory{dtype};
    const Heads q = heads(s.L, true), k = heads(s.M, true), v = heads(s.M, true);
    const Heads out = heads(s.L, false);
    const void* const q_weight = memory.take(s.D, true, s.offset);
    const void* const k_weight = memory.take(s.D, true, s.offset);
    const Angles cos = angles(), sin = angles();
    float* const lse = static_cast<float*>(memory.take(s.B * s.L * s.H, false, 0, DType::f32));

    Heads heads(int64_t length, bool filled) {
        const int64_t h = s.D, l = s.H * h + (filled ? s.spare : 0), b = length * l;
        const int64_t count = s.B && length ? (s.B - 1) * b + (length - 1) * l + s.H * s.D : 0;
        return {memory.take(count, filled, filled ? s.offset : 0), b, l, h};
    }
    Angles angles() {  // stride 2, as of repeat-interleaved ones
        const int64_t count = s.L ? s.L * s.D - 1 : 0;
        return {static_cast<const float*>(memory.take(count, true, 0, DType::f32)), s.D, 2};
    }

    using Row = std::vector<double>;

    Row row(const Heads& x, int64_t b, int64_t l, int64_t h, const void* weight) const {
        Row row(s.D);
        double squares = 0;
        for (int64_t d = 0; d < s.D; ++d) {
            row[d] = value(dtype, x.data, b * x.stride_b + l * x.stride_l + h * x.stride_h + d);
            squares += row[d] * row[d];
        }
        if (weight == nullptr) return row;
        for (int64_t d = 0; d < s.D; d += 2) {
            const double c = cos.data[l * s.D + d], n = sin.data[l * s.D + d];
            const double rstd = 1 / std::sqrt(squares / s.D + 1e-6);
            const double x = row[d] * rstd * value(dtype, weight, d);
            const double y = row[d + 1] * rstd * value(dtype, weight, d + 1);
            row[d] = c * x - n * y;
            row[d + 1] = n * x + c * y;
        }
        return row;
    }

    double furthest(int64_t b, int64_t l, int64_t h) const {  // of a row's results from the truth
        const Row query = row(q, b, l, h, s.rope ? q_weight : nullptr);
        Row sums(s.D);
        double total = 0, most = 0;
        for (int64_t m = 0; m < s.M; ++m) {
            const Row key = row(k, b, m, h, s.rope ? k_weight : nullptr);
            const Row values = row(v, b, m, h, nullptr);
            double score = 0;
            for (int64_t d = 0; d < s.D; ++d) score += query[d] * key[d];
            const double p = std::exp(score / std::sqrt(double(s.D)));
            total += p;
            for (int64_t d = 0; d < s.D; ++d) sums[d] += p * values[d];
        }
        const Row found = row(out, b, l, h, nullptr);
        for (int64_t d = 0; d < s.D; ++d) {
            most = std::fmax(most, std::fabs(found[d] - (total ? sums[d] / total : 0)));
        }
        if (total == 0) return most;
        return std::fmax(most, std::fabs(lse[(b * s.L + l) * s.H + h] - std::log(total)));
    }

    void check_values() const {
        const double allowed = dtype == DType::f32 ? 1e-4 : s.rope ? 1e-1 : 2e-2;
        for (int64_t i = 0; i < s.B * s.L * s.H; ++i) {
            const double off = furthest(i / s.H / s.L, i / s.H % s.L, i % s.H);
            if (off <= allowed) continue;
            std::fprintf(stderr, "attention is off by %g at D = %d\n", off, int(s.D));
            std::exit(6);
        }
    }

    void run(const cuda::Context& context) {
        const AttentionSizes sizes = {s.B, s.L, s.M, s.H, s.D};
        const int64_t floats = s.rope ? cuda::rope_attention_scratch(dtype, sizes, context) : 0;
        const std::unique_ptr<float[]> scratch(new float[floats]);
        check("attention", memory, [&] {
            return attention(dtype, q, k, v, s.rope ? q_weight : nullptr,
                             s.rope ? k_weight : nullptr, cos, sin, out, lse, sizes, 1e-6f,
                             scratch.get(), context);
        });
        check_values();
    }
};

}  // namespace fluxkern::sanitize
