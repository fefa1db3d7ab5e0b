#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), y = tokens(m, s);
    const Tokens x_new = tokens(m, s, false), h = tokens(m, s, false);
    Rows v[6];
    for (Rows& row : v) row = rows(m, s);
    check("gated_residual_norm_modulate", m, [&] {
        return cuda::gated_residual_norm_modulate(dtype, x, y, v[0], v[1], v[2], v[3], v[4], v[5],
                                                  x_new, h, sizes_of(s), 1e-6f, CONTEXT);
    });
}

void backward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dx_new = tokens(m, s), dh = tokens(m, s), x_new = tokens(m, s), y = tokens(m, s);
    const Tokens dx = tokens(m, s, false), dy = tokens(m, s, false);
    Rows v[4], d[6];
    for (Rows& row : v) row = rows(m, s);
    for (Rows& row : d) row = rows(m, s, false);
    float* const partial = scratch(
        m, cuda::gated_residual_norm_modulate_backward_scratch(sizes_of(s), CONTEXT));
    check("gated_residual_norm_modulate_backward", m, [&] {
        return cuda::gated_residual_norm_modulate_backward(
            dtype, dx_new, dh, x_new, y, v[0], v[1], v[2], v[3], dx, dy, d[0], d[1], d[2], d[3],
            d[4], d[5], sizes_of(s), 1e-6f, partial, CONTEXT);
    });
}

int main() {
    over_shapes(forward);
    over_shapes(backward);
}
