#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), y = tokens(m, s), out = tokens(m, s, false);
    const Vectors gate = vectors(m, s);
    check("gated_residual", m, [&] {
        return cuda::gated_residual(dtype, x, y, gate, out, sizes_of(s), CONTEXT);
    });
}

void backward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dx_new = tokens(m, s), y = tokens(m, s), dy = tokens(m, s, false);
    const Vectors gate = vectors(m, s), dgate = vectors(m, s, false);
    float* const partials =
        scratch(m, cuda::gated_residual_backward_scratch(sizes_of(s), CONTEXT));
    check("gated_residual_backward", m, [&] {
        return cuda::gated_residual_backward(dtype, dx_new, y, gate, dy, dgate, sizes_of(s), partials,
                                             CONTEXT);
    });
}

int main() {
    over_shapes(forward);
    over_shapes(backward);
}
