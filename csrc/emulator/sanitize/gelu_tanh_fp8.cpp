#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void forward(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens x = tokens(m, s), out = fp8_tokens(m, s);
    float* const row_scale = scratch(m, s.B * s.L);
    check("gelu_tanh_fp8", m, [&] {
        return cuda::gelu_tanh_fp8(dtype, x, out, row_scale, sizes_of(s), CONTEXT);
    });
}

int main() {
    over_dtypes([](DType dtype) { forward(dtype, {1, 2, 6160, 0, 16, 0}); });  // four vectors
    over_shapes(forward);
}
