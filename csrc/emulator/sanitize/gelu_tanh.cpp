#include "shapes.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

void both(DType dtype, const Shape& s) {
    Buffers m(dtype);
    const Tokens dy = tokens(m, s), x = tokens(m, s);
    const Tokens out = tokens(m, s, false), dx = tokens(m, s, false);
    check("gelu_tanh", m, [&] {
        const cudaError_t error = cuda::gelu_tanh(dtype, x, out, sizes_of(s), CONTEXT);
        if (error != cudaSuccess) return error;
        return cuda::gelu_tanh_backward(dtype, dy, x, dx, sizes_of(s), CONTEXT);
    });
}

int main() {
    over_shapes(both);
}
