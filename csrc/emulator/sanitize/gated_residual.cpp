#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), y = tokens(m, s), out = tokens(m, s, false);
    const Rows txt = rows(m, s), img = rows(m, s);
    check("gated_residual", m, [&] {
        return cuda::gated_residual(dtype, x, y, txt, img, out, sizes_of(s), CONTEXT);
    });
}

void backward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dx_new = tokens(m, s), y = tokens(m, s), dy = tokens(m, s, false);
    const Rows txt = rows(m, s), img = rows(m, s);
    const Rows txt_dgate = rows(m, s, false), img_dgate = rows(m, s, false);
    float* const partial =
        scratch(m, cuda::gated_residual_backward_scratch(sizes_of(s), CONTEXT));
    check("gated_residual_backward", m, [&] {
        return cuda::gated_residual_backward(dtype, dx_new, y, txt, img, dy, txt_dgate, img_dgate,
                                             sizes_of(s), partial, CONTEXT);
    });
}

int main() {
    over_shapes(forward);
    over_shapes(backward);
}
