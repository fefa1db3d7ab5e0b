// x_new = x + gate * y, and its backward.
// Parallel: forward over tokens; backward over chunks of tokens of one stream.
// Bytes: forward 3 B L C elements; backward 3 B L C, and fp32 partial sums of a row a chunk.
// Accumulation: fp32, rounded once; sums over tokens in a fixed order.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void gated_residual(DType dtype, Tokens x, Tokens y, Rows txt_gate, Rows img_gate, Tokens x_new,
                    const Sizes& sizes, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, x_new);
        each_row(context, sizes, [&](const Place& at) {
            const T *x_row = row_of<T>(x, at), *y_row = row_of<T>(y, at);
            const T* gate = row_of<T>(at.txt ? txt_gate : img_gate, at.b);
            const Out<T> out = out_of<T>(x_new, at, streaming);
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec branch = load(gate + i, part) * load(y_row + i, part);
                out.store(i, load(x_row + i, part) + branch, part);
            });
        });
    });
}

void gated_residual_backward(DType dtype, Tokens dx_new, Tokens y, Rows txt_gate, Rows img_gate,
                             Tokens dy, Rows txt_dgate, Rows img_dgate, const Sizes& sizes,
                             float* scratch, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, dy);
        const auto group = [&]<int R>(Group<R>, const Place& at, float* dgate) {
            const T *dx_row = row_of<T>(dx_new, at), *y_row = row_of<T>(y, at);
            const T* gate = row_of<T>(at.txt ? txt_gate : img_gate, at.b);
            const Out<T> out = out_of<T>(dy, at, streaming);
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec factor = load(gate + i, part);
                Vec sum = load(dgate + i);
                for (int r = 0; r < R; ++r) {
                    const Vec g = load(dx_row + r * dx_new.stride_l + i, part);
                    out.store(r * dy.stride_l + i, factor * g, part);
                    sum = sum + g * load(y_row + r * y.stride_l + i, part);
                }
                store(dgate + i, sum);
            });
        };
        each_group<1>(context, sizes, scratch, group);
        add_chunks<T, 1>(context, sizes, scratch, {txt_dgate}, {img_dgate});
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
