#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), out = fp8_tokens(m, s);
    const Vectors scale = vectors(m, s), shift = vectors(m, s);
    float* const row_scale = scratch(m, s.B * s.L);
    check("norm_modulate_fp8", m, [&] {
        return cuda::norm_modulate_fp8(dtype, x, scale, shift, out, row_scale, sizes_of(s), 1e-6f,
                                       CONTEXT);
    });
}

int main() {
    over_shapes(forward);
}
