#include "buffers.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

struct HeadShape {
    int64_t B, L, H, D, txt_len, spare, offset;
};

const HeadShape SHAPES[] = {
    {2, 7, 3, 64, 3, 8, 0}, {1, 5, 9, 128, 5, 0, 0}, {2, 3, 2, 10, 1, 3, 1},
    {1, 3, 1, 2, 0, 0, 0},  {1, 2, 2, 64, 1, 3, 0},  {1, 9, 5, 8, 2, 0, 0},
    {1, 3, 2, 256, 1, 0, 0}, {0, 3, 2, 64, 1, 0, 0},
};

Heads heads(Buffers& m, const HeadShape& s, int64_t length, bool filled = true) {
    const int64_t h = s.D, l = s.H * h + (filled ? s.spare : 0), b = length * l;
    const int64_t count = s.B && length ? (s.B - 1) * b + (length - 1) * l + s.H * s.D : 0;
    return {m.take(count, filled, filled ? s.offset : 0), b, l, h};
}

Angles angles(Buffers& m, const HeadShape& s) {  // stride 2, as of repeat-interleaved ones
    const int64_t count = s.L * s.D - 1;
    return {static_cast<const float*>(m.take(count, true, 0, DType::f32)), s.D, 2};
}

void forward(DType dtype, const HeadShape& s) {
    Buffers m(dtype);
    const HeadSizes sizes = {s.B, s.L, s.H, s.D, s.txt_len};
    Heads in[6], out[3];
    for (int i = 0; i < 6; ++i) in[i] = heads(m, s, i < 3 ? s.txt_len : s.L - s.txt_len);
    for (Heads& o : out) o = heads(m, s, s.L, false);
    const void* w[4];
    for (const void*& weight : w) weight = m.take(s.D, true, s.offset);
    const Angles cos = angles(m, s), sin = angles(m, s);
    check("qk_norm_rope", m, [&] {
        return cuda::qk_norm_rope(dtype, in[0], in[1], in[2], in[3], in[4], in[5], w[0], w[1], w[2],
                                  w[3], cos, sin, out[0], out[1], out[2], sizes, 1e-6f, CONTEXT);
    });
}

void backward(DType dtype, const HeadShape& s) {
    Buffers m(dtype);
    const HeadSizes sizes = {s.B, s.L, s.H, s.D, s.txt_len};
    const Heads dq = heads(m, s, s.L), dk = heads(m, s, s.L);
    Heads in[4], out[4];
    for (int i = 0; i < 4; ++i) in[i] = heads(m, s, i < 2 ? s.txt_len : s.L - s.txt_len);
    for (int i = 0; i < 4; ++i) out[i] = heads(m, s, i < 2 ? s.txt_len : s.L - s.txt_len, false);
    const void* w[4];
    void* dw[4];
    for (const void*& weight : w) weight = m.take(s.D, true, s.offset);
    for (void*& gradient : dw) gradient = m.take(s.D, false);
    const Angles cos = angles(m, s), sin = angles(m, s);
    float* const partial = scratch(m, cuda::qk_norm_rope_backward_scratch(sizes, CONTEXT));
    check("qk_norm_rope_backward", m, [&] {
        return cuda::qk_norm_rope_backward(dtype, dq, dk, in[0], in[1], in[2], in[3], w[0], w[1],
                                           w[2], w[3], cos, sin, out[0], out[1], out[2], out[3],
                                           dw[0], dw[1], dw[2], dw[3], sizes, 1e-6f, partial,
                                           CONTEXT);
    });
}

int main() {
    over_dtypes([](DType dtype) {
        for (const HeadShape& shape : SHAPES) {
            forward(dtype, shape);
            backward(dtype, shape);
        }
    });
}
