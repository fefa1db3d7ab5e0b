// Rows of a stream [B, L, C]: which thread takes which, which vectors a token takes, sums over tokens.
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
Out<T> out_of(const Tokens& x, const Place& at, bool streaming) {
    return {static_cast<T*>(x.data) + at.b * x.stride_b + at.l * x.stride_l, streaming};
}

// Whether an output is larger than the caches and every vector of it aligned.
template <class T>
bool streams(const Context& context, const Sizes& sizes, const Tokens& out) {
    constexpr uint64_t bytes = WIDTH * sizeof(T);
    const uint64_t places = uint64_t(out.data) | (out.stride_b | out.stride_l) * sizeof(T);
    const int64_t size = sizes.B * sizes.L * sizes.C * int64_t(sizeof(T));
    return bytes >= 16 && places % bytes == 0 && 4 * size > context.cache_bytes;
}

template <class Body>
void each_row(const Context& context, const Sizes& sizes, const Body& body) {
    const int64_t grain = sizes.C > 0 ? GRAIN / sizes.C + 1 : GRAIN;
    parallel(context, sizes.B * sizes.L, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / sizes.L, l = row % sizes.L;
            body(Place{b, l, l < sizes.txt_len});
        }
    });
}

// sums over the tokens of a stream: one row of partial sums a chunk, added in order

// body(Place, sums [N, C]) for the tokens of every chunk.
template <int N, class Body>
void each_row_of_chunks(const Context& context, const Sizes& sizes, float* scratch,
                        const Body& body) {
    const Chunks chunks = chunks_of(sizes);
    const int64_t each = chunks.txt + chunks.img;
    parallel(context, sizes.B * each, GRAIN / (chunks.rows * (sizes.C + 1)) + 1,
             [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                     const int64_t b = i / each, c = i % each;
                     const bool txt = c < chunks.txt;
                     const int64_t border = txt ? sizes.txt_len : sizes.L;
                     int64_t l = txt ? c * chunks.rows
                                     : sizes.txt_len + (c - chunks.txt) * chunks.rows;
                     const int64_t last = l + chunks.rows < border ? l + chunks.rows : border;
                     float* sums = scratch + i * N * sizes.C;
                     __builtin_memset(sums, 0, N * sizes.C * sizeof(float));
                     for (; l < last; ++l) body(Place{b, l, txt}, sums);
                 }
             });
}

template <class T, int N>
void add_chunks(const Context& context, const Sizes& sizes, const float* scratch,
                const Rows (&txt)[N], const Rows (&img)[N]) {
    constexpr int64_t TILE = LANES * WIDTH;
    const Chunks chunks = chunks_of(sizes);
    const int64_t tiles = (sizes.C + TILE - 1) / TILE, each = chunks.txt + chunks.img;
    parallel(context, sizes.B * 2 * N * tiles, GRAIN / (TILE * (each + 1)) + 1,
             [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                     const int64_t b = i / (2 * N * tiles), n = i / tiles % N, tile = i % tiles;
                     const bool of_txt = i / (N * tiles) % 2 == 0;
                     const Rows& rows = of_txt ? txt[n] : img[n];
                     if (rows.data == nullptr) continue;
                     const int64_t first = of_txt ? 0 : chunks.txt;
                     const int64_t end_chunk = of_txt ? chunks.txt : each;
                     const int64_t column = tile * TILE, left = sizes.C - column;
                     const float* sums = scratch + ((b * each) * N + n) * sizes.C + column;
                     T* out = static_cast<T*>(rows.data) + b * rows.stride_b + column;
                     each_vec(left < TILE ? left : TILE, [&](int64_t j, int, auto part) {
                         Vec sum = {};
                         for (int64_t c = first; c < end_chunk; ++c) {
                             sum += load(sums + c * N * sizes.C + j, part);
                         }
                         store(out + j, sum, part);
                     });
                 }
             });
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
