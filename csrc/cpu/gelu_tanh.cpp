// out = 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); backward.
// Parallel: over blocks of 4096 columns of a row.
// Bytes: forward 2 B L C elements; backward 3 B L C.
// Accumulation: fp32, rounded once; one power of 2 and one division an element.
// Limits: none; rows that are no multiple of a vector or misaligned are stored through the caches.
#include "gelu.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

using namespace gelu_constants;

// s + 2 x s (1 - s) u', s = 1 / (1 + e), 1 - s = e s
template <class T>
FLUXKERN_INLINE Vec slope(Vec x, T) {
    x = at_most(9, at_least(-9, x));
    const Vec squared = x * x;
    const Vec e = exp2(x * (all(A) + squared * B), T{}), s = quotient(all(1), 1 + e, T{});
    return s + x * s * (e * s) * (all(2 * C1) + squared * (6 * C1 * C3));
}

// body(Place, first column, columns) for blocks of a row
template <class Body>
void each_block(const Context& context, const Sizes& sizes, const Body& body) {
    constexpr int64_t BLOCK = 4096;
    const int64_t blocks = (sizes.C + BLOCK - 1) / BLOCK;
    const int64_t grain = GRAIN / (sizes.C < BLOCK ? sizes.C + 1 : BLOCK) + 1;
    parallel(context, sizes.B * sizes.L * blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            const int64_t first = n % blocks * BLOCK, left = sizes.C - first;
            body(place_of(n / blocks, sizes), first, left < BLOCK ? left : BLOCK);
        }
    });
}

}  // namespace

void gelu_tanh(DType dtype, Tokens x, Tokens out, const Sizes& sizes, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, out);
        each_block(context, sizes, [&](const Place& at, int64_t first, int64_t columns) {
            const T* row = row_of<T>(x, at) + first;
            const Out<T> out_row = out_of<T>(out, at, streaming);
            each_vec<T>(columns, [&](int64_t i, int, auto part) {
                out_row.store(first + i, gelu(load(row + i, part), T{}), part);
            });
        });
    });
}

void gelu_tanh_backward(DType dtype, Tokens dy, Tokens x, Tokens dx, const Sizes& sizes,
                        const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const bool streaming = streams<T>(sizes, dx);
        each_block(context, sizes, [&](const Place& at, int64_t first, int64_t columns) {
            const T *row = row_of<T>(x, at) + first, *dy_row = row_of<T>(dy, at) + first;
            const Out<T> out_row = out_of<T>(dx, at, streaming);
            each_vec<T>(columns, [&](int64_t i, int, auto part) {
                const Vec g = load(dy_row + i, part);
                out_row.store(first + i, g * slope(load(row + i, part), T{}), part);
            });
        });
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
