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
constexpr int REG = 16;
#elif defined(__AVX2__)
constexpr int REG = 8;
#else
constexpr int REG = 4;
#endif
constexpr int WIDTH = 2 * REG;  // of a Vec
constexpr int PAD = 32;         // a multiple of every WIDTH

typedef float Reg __attribute__((vector_size(4 * REG)));
typedef uint32_t Words __attribute__((vector_size(4 * REG)));
typedef uint16_t Halves __attribute__((vector_size(2 * REG)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Two registers: of fp32 and fp16 the first and second half of WIDTH elements, of bf16 the even and
// the odd ones, which takes no shuffle. A Vec kept in fp32 memory stays in the order of its dtype.
struct Vec {
    Reg a, b;
};

template <class To, class From>
FLUXKERN_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

FLUXKERN_INLINE Vec all(float v) {
    return {v - Reg{}, v - Reg{}};
}
FLUXKERN_INLINE Vec operator+(Vec x, Vec y) {
    return {x.a + y.a, x.b + y.b};
}
FLUXKERN_INLINE Vec operator-(Vec x, Vec y) {
    return {x.a - y.a, x.b - y.b};
}
FLUXKERN_INLINE Vec operator*(Vec x, Vec y) {
    return {x.a * y.a, x.b * y.b};
}
FLUXKERN_INLINE Vec operator+(float x, Vec y) {
    return all(x) + y;
}
FLUXKERN_INLINE Vec operator-(Vec x, float y) {
    return x - all(y);
}
FLUXKERN_INLINE Vec operator*(Vec x, float y) {
    return x * all(y);
}

// A product rounded by itself, not fused into the sum that takes it.
FLUXKERN_INLINE Vec product(Vec x, Vec y) {
    Vec v = x * y;
#if defined(__AVX512F__)
    asm("" : "+v"(v.a), "+v"(v.b));
#elif defined(__AVX2__)
    asm("" : "+x"(v.a), "+x"(v.b));
#elif defined(__aarch64__)
    asm("" : "+w"(v.a), "+w"(v.b));
#endif
    return v;
}

typedef float Quarter __attribute__((vector_size(16)));

// The sums of every fourth element.
FLUXKERN_INLINE Quarter quarter(Reg v) {
#if defined(__AVX512F__)
    const __m512 whole = bit_cast<__m512>(v);
    const __m256 half = _mm512_maskz_extractf32x8_ps(0xff, whole, 0) +
                        _mm512_maskz_extractf32x8_ps(0xff, whole, 1);
    return bit_cast<Quarter>(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    const __m256 half = bit_cast<__m256>(v);
    return bit_cast<Quarter>(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
    return v;
#endif
}

FLUXKERN_INLINE float total(Reg v) {
    const Quarter q = quarter(v);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// Of four at once, each as total gives it.
FLUXKERN_INLINE Quarter totals(const Quarter (&q)[4]) {
    typedef uint32_t Places __attribute__((vector_size(16)));
    constexpr Places low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
    const Quarter two = __builtin_shuffle(q[0], q[1], low) + __builtin_shuffle(q[0], q[1], high);
    const Quarter more = __builtin_shuffle(q[2], q[3], low) + __builtin_shuffle(q[2], q[3], high);
    return __builtin_shuffle(two, more, Places{0, 1, 4, 5}) +
           __builtin_shuffle(two, more, Places{2, 3, 6, 7});
}

FLUXKERN_INLINE Quarter square_root(Quarter v) {
#ifdef __x86_64__
    return bit_cast<Quarter>(_mm_sqrt_ps(bit_cast<__m128>(v)));
#else
    return {__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]),
            __builtin_sqrtf(v[3])};
#endif
}

// The even and the odd elements of a and b behind each other, and back.
constexpr Words every_second(uint32_t first) {
    Words v = {};
    for (int i = 0; i < REG; ++i) v[i] = first + 2 * uint32_t(i);
    return v;
}
constexpr Words in_turn(uint32_t first) {
    Words v = {};
    for (int i = 0; i < REG; ++i) v[i] = first + uint32_t(i / 2) + (i % 2 ? REG : 0);
    return v;
}
FLUXKERN_INLINE Vec parted(Vec v) {
    return {__builtin_shuffle(v.a, v.b, every_second(0)),
            __builtin_shuffle(v.a, v.b, every_second(1))};
}
FLUXKERN_INLINE Vec joined(Vec v) {
    return {__builtin_shuffle(v.a, v.b, in_turn(0)), __builtin_shuffle(v.a, v.b, in_turn(REG / 2))};
}

// elements: WIDTH of them as they lie in memory, in registers

struct TwoHalves {
    Halves a, b;
};

template <class T>
struct StoredAs {
    using type = Vec;
};
template <>
struct StoredAs<bf16> {
    using type = Words;  // little-endian: the even element is the low half
};
template <>
struct StoredAs<f16> {
    using type = TwoHalves;
};
template <class T>
using Stored = typename StoredAs<T>::type;

FLUXKERN_INLINE Vec widen(Vec v, float) {
    return v;
}

FLUXKERN_INLINE Vec widen(Words pairs, bf16) {
    return {bit_cast<Reg>(pairs << 16), bit_cast<Reg>(pairs & 0xffff0000)};
}

FLUXKERN_INLINE Reg widen(Halves v, f16) {
#if defined(__AVX512F__)
    return bit_cast<Reg>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(v)));
#elif defined(__AVX2__)
    return bit_cast<Reg>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#else
    const Words w = __builtin_convertvector(v, Words);
    const Words sign = (w & 0x8000) << 16, rest = (w & 0x7fff) << 13;
    const Words special = Words((w & 0x7c00) == 0x7c00) & 0x7f800000;  // inf, NaN
    const Reg scaled = bit_cast<Reg>(rest) * 0x1p112f;                 // subnormals too
    return bit_cast<Reg>(bit_cast<Words>(scaled) | special | sign);
#endif
}

FLUXKERN_INLINE Halves narrow(Reg v, f16) {
#if defined(__AVX512F__)
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT;
    return bit_cast<Halves>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), nearest));
#elif defined(__AVX2__)
    return bit_cast<Halves>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    const Words w = bit_cast<Words>(v), sign = (w >> 16) & 0x8000, rest = w & 0x7fffffff;
    const Words small = bit_cast<Words>(bit_cast<Reg>(rest) + 0.5f) - 0x3f000000;  // 2^-24 a step
    const Words normal = (rest + 0xfff + ((rest >> 13) & 1) - 0x38000000) >> 13;
    const Words nan = Words(rest > 0x7f800000), large = (nan & 0x7e00) | (~nan & 0x7c00);
    const Words is_small = Words(rest < 0x38800000), is_large = Words(rest >= 0x47800000);
    const Words found = (is_small & small) | (is_large & large) | (~is_small & ~is_large & normal);
    return __builtin_convertvector(found | sign, Halves);
#endif
}

FLUXKERN_INLINE Vec widen(TwoHalves v, f16) {
    return {widen(v.a, f16{}), widen(v.b, f16{})};
}

// To nearest, ties to even. A NaN stays one: it is quiet, and its low half, from bf16, is zero.
FLUXKERN_INLINE Words rounded_to_bf16(Reg v) {
    const Words w = bit_cast<Words>(v);
    return w + 0x7fff + ((w >> 16) & 1);
}

// v as load would give it after a store; v itself in fp16, which packing rounds
FLUXKERN_INLINE Vec rounded(Vec v, float) {
    return v;
}
FLUXKERN_INLINE Vec rounded(Vec v, bf16) {
    return {bit_cast<Reg>(rounded_to_bf16(v.a) & 0xffff0000),
            bit_cast<Reg>(rounded_to_bf16(v.b) & 0xffff0000)};
}
FLUXKERN_INLINE Vec rounded(Vec v, f16) {
    return {widen(narrow(v.a, f16{}), f16{}), widen(narrow(v.b, f16{}), f16{})};
}

FLUXKERN_INLINE Words high_halves(Words a, Words b) {
#if defined(__AVX512F__)
    const __m512i even = bit_cast<__m512i>(a >> 16), odd = bit_cast<__m512i>(b);
    return bit_cast<Words>(_mm512_mask_mov_epi16(even, 0xaaaaaaaa, odd));
#elif defined(__AVX2__)
    const __m256i even = bit_cast<__m256i>(a >> 16), odd = bit_cast<__m256i>(b);
    return bit_cast<Words>(_mm256_blend_epi16(even, odd, 0xaa));
#else
    return (a >> 16) | (b & 0xffff0000);
#endif
}

// values that are rounded already
FLUXKERN_INLINE Vec packed(Vec v, float) {
    return v;
}
FLUXKERN_INLINE Words packed(Vec v, bf16) {
    return high_halves(bit_cast<Words>(v.a), bit_cast<Words>(v.b));
}
FLUXKERN_INLINE TwoHalves packed(Vec v, f16) {
    return {narrow(v.a, f16{}), narrow(v.b, f16{})};
}

template <class T>
FLUXKERN_INLINE Stored<T> narrow(Vec v, T) {
    return packed(v, T{});
}
FLUXKERN_INLINE Words narrow(Vec v, bf16) {
#if defined(__AVX512F__)
    const Words a = bit_cast<Words>(v.a), b = bit_cast<Words>(v.b);
    const __m512i high = bit_cast<__m512i>(high_halves(a, b)), one = _mm512_set1_epi16(1);
    const __m512i low = _mm512_mask_mov_epi16(bit_cast<__m512i>(a), 0xaaaaaaaa,
                                              bit_cast<__m512i>(b << 16));
    const __m512i tie_to_even = _mm512_ternarylogic_epi32(low, high, one, 0xf8);  // low | high & 1
    const __mmask32 up = _mm512_cmpgt_epu16_mask(tie_to_even, _mm512_set1_epi16(-0x8000));
    return bit_cast<Words>(_mm512_mask_add_epi16(high, up, high, one));
#else
    return high_halves(rounded_to_bf16(v.a), rounded_to_bf16(v.b));
#endif
}

// memory

template <class Register>
FLUXKERN_INLINE void get(const void* p, Register& v) {
    __builtin_memcpy(&v, p, sizeof(v));
}
FLUXKERN_INLINE void get(const void* p, Vec& v) {
    get(p, v.a), get(static_cast<const char*>(p) + sizeof(v.a), v.b);
}
FLUXKERN_INLINE void get(const void* p, TwoHalves& v) {
    get(p, v.a), get(static_cast<const char*>(p) + sizeof(v.a), v.b);
}

template <class Register>
FLUXKERN_INLINE void put(void* p, Register v) {
    __builtin_memcpy(p, &v, sizeof(v));
}
FLUXKERN_INLINE void put(void* p, Vec v) {
    put(p, v.a), put(static_cast<char*>(p) + sizeof(v.a), v.b);
}
FLUXKERN_INLINE void put(void* p, TwoHalves v) {
    put(p, v.a), put(static_cast<char*>(p) + sizeof(v.a), v.b);
}

// Past the caches; p lies at a multiple of the size.
FLUXKERN_INLINE void stream(void* p, Words v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
#elif defined(__x86_64__)
    _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(v));
#else
    put(p, v);
#endif
}
FLUXKERN_INLINE void stream(void* p, Vec v) {
    stream(p, bit_cast<Words>(v.a));
    stream(static_cast<char*>(p) + sizeof(v.a), bit_cast<Words>(v.b));
}
FLUXKERN_INLINE void stream(void* p, TwoHalves v) {
#ifdef __AVX512F__
    const __m512i low = _mm512_castsi256_si512(bit_cast<__m256i>(v.a));
    stream(p, bit_cast<Words>(_mm512_inserti64x4(low, bit_cast<__m256i>(v.b), 1)));
#else
    stream(p, bit_cast<Words>(v));
#endif
}

FLUXKERN_INLINE void end_of_streaming() {
#ifdef __x86_64__
    _mm_sfence();
#endif
}

// How much of a vector there is: all of it, or the first n elements, which are one in `ones`.
struct Whole {};
struct Part {
    int n;
    Vec ones;
};

template <class T>
FLUXKERN_INLINE Vec load(const T* p, Whole = {}) {
    Stored<T> stored;
    get(p, stored);
    return widen(stored, T{});
}

template <class T>
FLUXKERN_INLINE Vec load(const T* p, const Part& part) {  // zeros behind the end
    T elements[WIDTH] = {};
    for (int i = 0; i < part.n; ++i) elements[i] = p[i];
    return load(elements);
}

template <class T>
FLUXKERN_INLINE Part first(int n) {
    T ones[WIDTH];
    put(ones, packed(all(1), T{}));
    return {n, load(ones, Part{n, {}})};
}

template <class T>
FLUXKERN_INLINE float scalar(const void* values, int64_t i) {
    return load(static_cast<const T*>(values) + i, first<T>(1)).a[0];
}

FLUXKERN_INLINE void store(float* p, Vec v) {
    put(p, v);
}

// A Vec of natural order in the order of T, and back.
template <class T>
FLUXKERN_INLINE Vec ordered_as(Vec v, T) {
    return v;
}
FLUXKERN_INLINE Vec ordered_as(Vec v, bf16) {
    return parted(v);
}
template <class T>
FLUXKERN_INLINE Vec natural(Vec v, T) {
    return v;
}
FLUXKERN_INLINE Vec natural(Vec v, bf16) {
    return joined(v);
}

FLUXKERN_INLINE Vec keep(Vec v, Whole) {
    return v;
}
FLUXKERN_INLINE Vec keep(Vec v, const Part& part) {  // zeros behind the end
    return v * part.ones;
}

// A row of an output; streaming: past the caches, which wants whole vectors at their alignment.
template <class T>
struct Out {
    T* row;
    bool streaming;

    template <class Extent>
    FLUXKERN_INLINE void store(int64_t i, Vec v, const Extent& extent) const {
        write(i, narrow(v, T{}), extent);
    }
    template <class Extent>
    FLUXKERN_INLINE void store_rounded(int64_t i, Vec v, const Extent& extent) const {
        write(i, packed(v, T{}), extent);
    }
    FLUXKERN_INLINE void write(int64_t i, Stored<T> stored, Whole) const {
        if (streaming) return stream(row + i, stored);
        put(row + i, stored);
    }
    FLUXKERN_INLINE void write(int64_t i, Stored<T> stored, const Part& part) const {
        T elements[WIDTH];
        put(elements, stored);
        for (int j = 0; j < part.n; ++j) row[i + j] = elements[j];
    }
};

template <class T>
FLUXKERN_INLINE void prefetch(const T* p) {  // one Vec, to the second level
    constexpr int LINE = 64 / sizeof(T);
    for (int i = 0; i < WIDTH; i += LINE) __builtin_prefetch(p + i, 0, 2);
}

// loops over a row

constexpr int LANES = 2;  // sums that do not wait for each other

// body(i, lane, Whole or Part) over the columns of a row of T
template <class T, class Body>
FLUXKERN_INLINE void each_vec(int64_t C, const Body& body) {
    int64_t i = 0;
    for (; i + 2 * WIDTH <= C; i += 2 * WIDTH) {
        body(i, 0, Whole{});
        body(i + WIDTH, 1, Whole{});
    }
    if (i + WIDTH <= C) {
        body(i, 0, Whole{});
        i += WIDTH;
    }
    if (i < C) body(i, 1, first<T>(int(C - i)));
}

struct Sum {
    Vec lanes[LANES] = {};

    FLUXKERN_INLINE void add(int lane, Vec v) {
        lanes[lane] = lanes[lane] + v;
    }
    FLUXKERN_INLINE Reg reg() const {
        const Vec sum = lanes[0] + lanes[1];
        return sum.a + sum.b;
    }
    FLUXKERN_INLINE float total() const {
        return FLUXKERN_ISA::total(reg());
    }
    FLUXKERN_INLINE Quarter quarter() const {
        return FLUXKERN_ISA::quarter(reg());
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
