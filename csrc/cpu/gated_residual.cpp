// x_new = x + gate * y, and its backward.
// Parallel: forward over tokens; backward over spans of tokens of one stream.
// Bytes: forward 3 B L C elements; backward 3 B L C, and fp32 partials of a row a span.
// Accumulation: fp32, rounded once; sums over tokens in a fixed order.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void gated_residual(DType dtype, Tokens x, Tokens y, Vectors gate, Tokens x_new,
                    const Sizes& sizes, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, x_new);
        each_row(context, sizes, [&](const Place& at) {
            const T *x_row = row_of<T>(x, at), *y_row = row_of<T>(y, at);
            const T* gate_row = row_of<T>(gate, at);
            const Out<T> out = out_of<T>(x_new, at, streaming);
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec branch = load(gate_row + i, part) * load(y_row + i, part);
                out.store(i, load(x_row + i, part) + branch, part);
            });
        });
    });
}

void gated_residual_backward(DType dtype, Tokens dx_new, Tokens y, Vectors gate, Tokens dy,
                             Vectors dgate, const Sizes& sizes, float* scratch,
                             const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, dy);
        const auto group = [&]<int R>(Group<R>, const Place& at, float* gate_sums) {
            const T *dx_row = row_of<T>(dx_new, at), *y_row = row_of<T>(y, at);
            const T* gate_row = row_of<T>(gate, at);
            const Out<T> out = out_of<T>(dy, at, streaming);
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec factor = load(gate_row + i, part);
                Vec sum = load(gate_sums + i);
                for (int r = 0; r < R; ++r) {
                    const Vec g = load(dx_row + r * dx_new.stride_l + i, part);
                    out.store(r * dy.stride_l + i, factor * g, part);
                    sum = sum + g * load(y_row + r * y.stride_l + i, part);
                }
                store(gate_sums + i, sum);
            });
        };
        each_group<1>(context, sizes, scratch, group);
        sum_partials<T>(context, sizes, scratch, {dgate});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
