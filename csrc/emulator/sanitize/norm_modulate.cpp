#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), out = tokens(m, s, false);
    const Vectors scale = vectors(m, s), shift = vectors(m, s);
    check("norm_modulate", m, [&] {
        return cuda::norm_modulate(dtype, x, scale, shift, out, sizes_of(s), 1e-6f, CONTEXT);
    });
}

void backward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dh = tokens(m, s), x = tokens(m, s), dx = tokens(m, s, false);
    const Vectors scale = vectors(m, s);
    const Vectors dscale = vectors(m, s, false), dshift = vectors(m, s, false);
    float* const partials =
        scratch(m, cuda::norm_modulate_backward_scratch(sizes_of(s), CONTEXT));
    check("norm_modulate_backward", m, [&] {
        return cuda::norm_modulate_backward(dtype, dh, x, scale, dx, dscale, dshift, sizes_of(s),
                                            1e-6f, partials, CONTEXT);
    });
}

int main() {
    over_shapes(forward);
    over_shapes(backward);
}
