#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), out = tokens(m, s, false);
    const Rows v[] = {rows(m, s), rows(m, s), rows(m, s), rows(m, s)};
    check("norm_modulate", m, [&] {
        return cuda::norm_modulate(dtype, x, v[0], v[1], v[2], v[3], out, sizes_of(s), 1e-6f,
                                   CONTEXT);
    });
}

void backward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dh = tokens(m, s), x = tokens(m, s), dx = tokens(m, s, false);
    const Rows txt = rows(m, s), img = rows(m, s);
    const Rows d[] = {rows(m, s, 0), rows(m, s, 0), rows(m, s, 0), rows(m, s, 0)};
    float* const partial =
        scratch(m, cuda::norm_modulate_backward_scratch(sizes_of(s), CONTEXT));
    check("norm_modulate_backward", m, [&] {
        return cuda::norm_modulate_backward(dtype, dh, x, txt, img, dx, d[0], d[1], d[2], d[3],
                                            sizes_of(s), 1e-6f, partial, CONTEXT);
    });
}

int main() {
    over_shapes(forward);
    over_shapes(backward);
}
