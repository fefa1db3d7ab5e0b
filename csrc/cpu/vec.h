// Vectors of fp32 in the width of the instruction set, from and to fp32, bf16 and fp16 in memory.
// Everything here is local to the file that includes it: code of one instruction set must never be
// the copy that the linker keeps for another.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>

#include "kernels.h"

#define FLUXKERN_INLINE inline __attribute__((always_inline))

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

FLUXKERN_INLINE Vec all(float v) {
    return v - Vec{};
}

template <class To, class From>
FLUXKERN_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

FLUXKERN_INLINE Vec select(Ints mask, Vec yes, Vec no) {
    return mask ? yes : no;
}

// 32-bit words to their low 16 bits.
FLUXKERN_INLINE Halves low_halves(Words v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(v), _mm256_setzero_si256());
    return bit_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    return __builtin_convertvector(v, Halves);
#endif
}

FLUXKERN_INLINE Words wide_words(Halves v) {
    return __builtin_convertvector(v, Words);
}

// A product rounded by itself, not fused into the sum that takes it.
FLUXKERN_INLINE Vec product(Vec a, Vec b) {
    Vec v = a * b;
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

// one vector from memory and back

FLUXKERN_INLINE Vec widen(Vec v, float) {
    return v;
}

FLUXKERN_INLINE Vec widen(Halves v, bf16) {
    return bit_cast<Vec>(wide_words(v) << 16);
}

FLUXKERN_INLINE Vec widen(Halves v, f16) {
#if defined(__AVX512F__)
    return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)));
#elif defined(__AVX2__)
    return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#else
    const Words w = wide_words(v), sign = (w & 0x8000) << 16, rest = (w & 0x7fff) << 13;
    const Words special = Words((w & 0x7c00) == 0x7c00) & 0x70000000;  // inf, NaN: exponent 255
    const Vec scaled = bit_cast<Vec>(rest) * 0x1p112f;                 // subnormals too
    return bit_cast<Vec>(bit_cast<Words>(scaled) | special | sign);
#endif
}

FLUXKERN_INLINE Vec narrow(Vec v, float) {
    return v;
}

// To nearest, ties to even; a NaN stays one.
FLUXKERN_INLINE Halves narrow(Vec v, bf16) {
    const Words w = bit_cast<Words>(v);
    const Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16, quiet = (w >> 16) | 0x40;
    return low_halves(bit_cast<Words>(select(v != v, bit_cast<Vec>(quiet), bit_cast<Vec>(rounded))));
}

FLUXKERN_INLINE Halves narrow(Vec v, f16) {
#if defined(__AVX512F__)
    return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    const Words w = bit_cast<Words>(v), sign = (w >> 16) & 0x8000, rest = w & 0x7fffffff;
    const Words small = bit_cast<Words>(bit_cast<Vec>(rest) + 0.5f) - 0x3f000000;  // 2^-24 a step
    const Words normal = (rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13;
    const Words large = Words(rest > 0x7f800000) & 0x7e00, inf = ~Words(rest > 0x7f800000) & 0x7c00;
    const Words is_small = Words(rest < 0x38800000), is_large = Words(rest >= 0x47800000);
    const Words found = (is_small & small) | (is_large & (large | inf)) |
                        (~is_small & ~is_large & normal);
    return low_halves(found | sign);
#endif
}

template <class T>
using Stored = decltype(narrow(Vec{}, T{}));

// How much of a vector there is: all of it, or the first n.
struct Whole {};
struct Part {
    int n;
};

template <class T>
FLUXKERN_INLINE Vec load(const T* p, Whole) {
    Stored<T> stored;
    __builtin_memcpy(&stored, p, sizeof(stored));
    return widen(stored, T{});
}

template <class T>
FLUXKERN_INLINE Vec load(const T* p, Part part) {  // zeros behind the end
    T elements[WIDTH] = {};
    for (int i = 0; i < part.n; ++i) elements[i] = p[i];
    return load(elements, Whole{});
}

template <class T>
FLUXKERN_INLINE void store(T* p, Vec v, Whole) {
    const Stored<T> stored = narrow(v, T{});
    __builtin_memcpy(p, &stored, sizeof(stored));
}

template <class T>
FLUXKERN_INLINE void store(T* p, Vec v, Part part) {
    T elements[WIDTH];
    store(elements, v, Whole{});
    for (int i = 0; i < part.n; ++i) p[i] = elements[i];
}

FLUXKERN_INLINE Vec keep(Vec v, Whole) {
    return v;
}

FLUXKERN_INLINE Vec keep(Vec v, Part part) {  // zeros behind the end
    float elements[WIDTH];
    __builtin_memcpy(elements, &v, sizeof(v));
    return load(elements, part);
}

// What load would give for v after it has been stored as a T.
template <class T>
FLUXKERN_INLINE Vec rounded(Vec v) {
    return widen(narrow(v, T{}), T{});
}

// stores that leave nothing in the caches

FLUXKERN_INLINE void stream(void* p, const void* v, size_t bytes) {
#if defined(__AVX512F__)
    if (bytes == 64) return _mm512_stream_ps(static_cast<float*>(p), *static_cast<const __m512*>(v));
#endif
#if defined(__AVX2__)
    if (bytes == 32) return _mm256_stream_ps(static_cast<float*>(p), *static_cast<const __m256*>(v));
#endif
#if defined(__x86_64__)
    if (bytes == 16) return _mm_stream_ps(static_cast<float*>(p), *static_cast<const __m128*>(v));
#endif
    __builtin_memcpy(p, v, bytes);
}

FLUXKERN_INLINE void end_of_streaming() {
#ifdef __x86_64__
    _mm_sfence();
#endif
}

// A row of an output; streaming: past the caches, which wants whole vectors at their alignment.
template <class T>
struct Out {
    T* row;
    bool streaming;

    FLUXKERN_INLINE void store(int64_t i, Vec v, Part part) const {
        FLUXKERN_ISA::store(row + i, v, part);
    }
    FLUXKERN_INLINE void store(int64_t i, Vec v, Whole whole) const {
        if (!streaming) return FLUXKERN_ISA::store(row + i, v, whole);
        const Stored<T> stored = narrow(v, T{});
        stream(row + i, &stored, sizeof(stored));
    }
};

// loops over a row

constexpr int LANES = 4;  // sums that do not wait for each other

// body(i, lane, Whole or Part) over the columns of a row
template <class Body>
FLUXKERN_INLINE void each_vec(int64_t C, const Body& body) {
    int64_t i = 0;
    for (; i + LANES * WIDTH <= C; i += LANES * WIDTH) {
        body(i, 0, Whole{});
        body(i + WIDTH, 1, Whole{});
        body(i + 2 * WIDTH, 2, Whole{});
        body(i + 3 * WIDTH, 3, Whole{});
    }
    for (; i + WIDTH <= C; i += WIDTH) body(i, 0, Whole{});
    if (i < C) body(i, 0, Part{int(C - i)});
}

struct Sum {
    Vec lanes[LANES] = {};

    FLUXKERN_INLINE void add(int lane, Vec v) {
        lanes[lane] += v;
    }
    FLUXKERN_INLINE float total() const {
        const Vec sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
        float parts[WIDTH];
        __builtin_memcpy(parts, &sum, sizeof(sum));
        for (int n = WIDTH / 2; n > 0; n /= 2) {
            for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
        }
        return parts[0];
    }
};

// dtypes and threads

template <class Body>
void with_dtype(DType dtype, const Body& body) {
    if (dtype == DType::f32) return body(float{});
    if (dtype == DType::bf16) return body(bf16{});
    body(f16{});
}

template <class Body>
void parallel(const Context& context, int64_t count, int64_t grain, const Body& body) {
    const auto range = [](int64_t begin, int64_t end, void* state) {
        (*static_cast<const Body*>(state))(begin, end);
        end_of_streaming();
    };
    context.parallel_for(0, count, grain, range, const_cast<Body*>(&body));
}

}  // namespace
}  // namespace fluxkern::cpu::FLUXKERN_ISA
