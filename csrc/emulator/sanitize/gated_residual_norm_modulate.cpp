#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), y = tokens(m, s);
    const Tokens x_new = tokens(m, s, false), h = tokens(m, s, false);
    const Vectors gate = vectors(m, s), scale = vectors(m, s), shift = vectors(m, s);
    check("gated_residual_norm_modulate", m, [&] {
        return cuda::gated_residual_norm_modulate(dtype, x, y, gate, scale, shift, x_new, h,
                                                  sizes_of(s), 1e-6f, CONTEXT);
    });
}

void backward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dx_new = tokens(m, s), dh = tokens(m, s), x_new = tokens(m, s), y = tokens(m, s);
    const Tokens dx = tokens(m, s, false), dy = tokens(m, s, false);
    const Vectors gate = vectors(m, s), scale = vectors(m, s), dgate = vectors(m, s, false);
    const Vectors dscale = vectors(m, s, false), dshift = vectors(m, s, false);
    float* const partials = scratch(
        m, cuda::gated_residual_norm_modulate_backward_scratch(sizes_of(s), CONTEXT));
    check("gated_residual_norm_modulate_backward", m, [&] {
        return cuda::gated_residual_norm_modulate_backward(
            dtype, dx_new, dh, x_new, y, gate, scale, dx, dy, dgate, dscale, dshift, sizes_of(s),
            1e-6f, partials, CONTEXT);
    });
}

int main() {
    over_shapes(forward);
    over_shapes(backward);
}
