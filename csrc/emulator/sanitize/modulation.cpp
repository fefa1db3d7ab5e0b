#include "buffers.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

struct ProductShape {
    int64_t S, B, N, K, spare, offset;
};

const ProductShape SHAPES[] = {
    {1, 1, 20, 64, 8, 0},  {2, 5, 17, 1040, 0, 0}, {1, 3, 5, 37, 3, 1}, {1, 1, 3, 1100, 1, 1},
    {1, 0, 5, 16, 0, 0},   {1, 1, 0, 16, 0, 0},    {3, 1, 2, 8, 8, 0},
};

int main() {
    over_dtypes([](DType dtype) {
        for (const ProductShape& s : SHAPES) {
            Buffers m(dtype);
            const int64_t row = s.K + s.spare, rows = s.S * s.B;
            const Tokens vec = {m.take(rows ? (rows - 1) * row + s.K : 0, true, s.offset),
                                s.B * row, row};
            const Rows weight = {m.take(s.N ? (s.N - 1) * row + s.K : 0, true, s.offset), row};
            const void* const bias = s.N % 2 ? m.take(s.N, true, s.offset) : nullptr;
            const Rows out = {m.take(rows * s.N, false), s.N};
            check("modulation", m, [&] {
                return cuda::modulation(dtype, vec, weight, bias, out, {s.S, s.B, s.N, s.K},
                                        nullptr, CONTEXT);
            });
        }
    });
}
