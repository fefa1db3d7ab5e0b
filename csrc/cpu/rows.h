// Rows of a stream [B, L, C]: which thread takes which, and sums over the tokens of a stream.
#pragma once

#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread

struct Place {  // of a token
    int64_t b, l;
    bool txt;
};

template <class T>
const T* row_of(const Tokens& x, const Place& at) {
    return static_cast<const T*>(x.data) + at.b * x.stride_b + at.l * x.stride_l;
}

template <class T>
const T* row_of(const Rows& x, int64_t b) {
    return static_cast<const T*>(x.data) + b * x.stride_b;
}

template <class T>
const T* row_of(const Vectors& x, const Place& at) {
    return static_cast<const T*>(x.data) + at.b * x.stride_b + (at.txt ? 0 : x.stride_s);
}

template <class T>
Out<T> out_of(const Tokens& x, const Place& at, bool streaming) {
    return {static_cast<T*>(x.data) + at.b * x.stride_b + at.l * x.stride_l, streaming};
}

constexpr int64_t ENOUGH_TO_STREAM = int64_t(4) << 20;  // bytes

// Whether an output is too large to be found in a cache later, and every vector of it aligned.
template <class T>
bool streams(const Sizes& sizes, const Tokens& out) {
    const uint64_t places = uint64_t(out.data) | (out.stride_b | out.stride_l) * sizeof(T);
    const int64_t bytes = sizes.B * sizes.L * sizes.C * int64_t(sizeof(T));
    return places % sizeof(Reg) == 0 && bytes >= ENOUGH_TO_STREAM;
}

FLUXKERN_INLINE Place place_of(int64_t row, const Sizes& sizes) {
    const int64_t b = row / sizes.L, l = row % sizes.L;
    return {b, l, l < sizes.txt_len};
}

// body(first, end) for rows that one thread takes
template <class Body>
void each_range(const Context& context, const Sizes& sizes, const Body& body) {
    const int64_t grain = sizes.C > 0 ? GRAIN / sizes.C + 1 : GRAIN;
    parallel(context, sizes.B * sizes.L, grain, body);
}

template <class Body>
void each_row(const Context& context, const Sizes& sizes, const Body& body) {
    each_range(context, sizes, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(place_of(row, sizes));
    });
}

// Every row but the first is started in the loop that finishes the row before it, so that memory is
// never idle: start(i, lane, part) of this row, finish(i, part) of the one before.
template <class T, class Start, class Finish>
FLUXKERN_INLINE void overlapped(int64_t C, bool starts, bool finishes, const Start& start,
                                const Finish& finish) {
    if (!finishes) return each_vec<T>(C, start);
    if (!starts) {
        return each_vec<T>(C, [&](int64_t i, int, auto part) { finish(i, part); });
    }
    each_vec<T>(C, [&](int64_t i, int lane, auto part) {
        finish(i, part);
        start(i, lane, part);
    });
}

// sums over the tokens of a stream: partials, added in order

struct Span {  // the tokens of a partial
    Place first;
    int64_t end;  // token
};

// body(Span, sums [N, padded(C)]) for every partial; a token takes `work` elements.
template <int N, class Body>
void each_partial(const Context& context, const Sizes& sizes, int64_t work, float* scratch,
                  const Body& body) {
    const Partials partials = partials_of(sizes);
    const int64_t each = partials.txt + partials.img, C = padded(sizes.C);
    const int64_t grain = GRAIN / (partials.rows * (work + 1)) + 1;
    parallel(context, sizes.B * each, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / each, p = i % each;
            const bool txt = p < partials.txt;
            const int64_t border = txt ? sizes.txt_len : sizes.L;
            const int64_t l = txt ? p * partials.rows
                                  : sizes.txt_len + (p - partials.txt) * partials.rows;
            const int64_t last = l + partials.rows < border ? l + partials.rows : border;
            float* sums = scratch + i * N * C;
            __builtin_memset(sums, 0, N * C * sizeof(float));
            body(Span{{b, l, txt}, last}, sums);
        }
    });
}

template <int R>
struct Group {};
constexpr int GROUP = 4;

// body(Group<R>, Place of the first, sums) for groups of R tokens of every partial, so that vectors
// and sums are read and written once a group.
template <int N, class Body>
void each_group(const Context& context, const Sizes& sizes, float* scratch, const Body& body) {
    each_partial<N>(context, sizes, sizes.C, scratch, [&](const Span& span, float* sums) {
        Place at = span.first;
        for (; at.l + GROUP <= span.end; at.l += GROUP) body(Group<GROUP>{}, at, sums);
        for (; at.l < span.end; ++at.l) body(Group<1>{}, at, sums);
    });
}

// The N gradients of vectors; one row of all tokens is that of the image.
template <class T, int N>
void sum_partials(const Context& context, const Sizes& sizes, const float* scratch,
                  const Vectors (&out)[N]) {
    constexpr int64_t TILE = 2 * WIDTH;
    const Partials partials = partials_of(sizes);
    const int64_t tiles = (sizes.C + TILE - 1) / TILE, each = partials.txt + partials.img;
    const int64_t C = padded(sizes.C), streams = out[0].stride_s == 0 ? 1 : 2;
    parallel(context, sizes.B * streams * N * tiles, GRAIN / (TILE * (each + 1)) + 1,
             [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                     const int64_t b = i / (streams * N * tiles), n = i / tiles % N;
                     const int64_t column = i % tiles * TILE, left = sizes.C - column;
                     const bool txt = streams == 2 && i / (N * tiles) % 2 == 0;
                     const int64_t first = txt ? 0 : partials.txt;
                     const int64_t last = txt ? partials.txt : each;
                     const float* sums = scratch + (b * each * N + n) * C + column;
                     T* const row = const_cast<T*>(row_of<T>(out[n], {b, 0, txt}));
                     each_vec<T>(left < TILE ? left : TILE, [&](int64_t j, int, auto part) {
                         Vec sum = {};
                         for (int64_t p = first; p < last; ++p) {
                             sum = sum + load(sums + p * N * C + j);
                         }
                         Out<T>{row + column, false}.store(j, sum, part);
                     });
                 }
             });
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
