#include "buffers.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

struct PictureShape {
    int64_t B, C, P, groups, offset;
    bool channels_last;
};

const PictureShape SHAPES[] = {
    {2, 6, 35, 3, 0, false},   {1, 4, 4104, 2, 0, false}, {2, 8, 64, 1, 1, false},
    {2, 24, 35, 3, 0, true},   {1, 9, 300, 3, 0, true},   {1, 2056, 2, 4, 0, true},
    {2, 16, 40, 4, 1, true},   {0, 8, 9, 2, 0, false},    {2, 8, 0, 2, 0, false},
};

Images images(Buffers& m, const PictureShape& s, bool filled = true) {
    const int64_t c = s.channels_last ? 1 : s.P, p = s.channels_last ? s.C : 1;
    return {m.take(s.B * s.C * s.P, filled, filled ? s.offset : 0), s.C * s.P, c, p};
}

void both(DType dtype, const PictureShape& s) {
    Buffers m(dtype);
    const ImageSizes sizes = {s.B, s.C, s.P, s.groups, s.channels_last};
    const Images dy = images(m, s), x = images(m, s);
    const Images out = images(m, s, false), dx = images(m, s, false);
    const void *weight = m.take(s.C, true, s.offset), *bias = m.take(s.C, true, s.offset);
    void *dweight = m.take(s.C, false), *dbias = m.take(s.C, false);
    float* const forward = scratch(m, cuda::group_norm_silu_scratch(sizes, CONTEXT));
    float* const backward = scratch(m, cuda::group_norm_silu_backward_scratch(sizes, CONTEXT));
    check("group_norm_silu", m, [&] {
        const cudaError_t error = cuda::group_norm_silu(dtype, x, weight, bias, out, sizes, 1e-6f,
                                                        forward, CONTEXT);
        if (error != cudaSuccess) return error;
        return cuda::group_norm_silu_backward(dtype, dy, x, weight, bias, dx, dweight, dbias, sizes,
                                              1e-6f, backward, CONTEXT);
    });
}

int main() {
    over_dtypes([](DType dtype) {
        for (const PictureShape& shape : SHAPES) both(dtype, shape);
    });
}
