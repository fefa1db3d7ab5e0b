// Weights as files hold them, to fp32, bf16, fp16, or to int8 with a scale a row.
// Parallel: over rows.
// Bytes: those of the file once, those of the outputs once; a row between them stays in the caches.
// Accumulation: none; a code times its scales is exact in fp32 but for a last rounding.
// Limits: a row is a whole number of blocks, and of groups of ConvRot.
#include "buffer.h"
#include "convrot.h"
#include "exp.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * REG)));
typedef int8_t Bytes __attribute__((vector_size(REG)));

FLUXKERN_INLINE float half_at(const uint8_t* p) {
    Halves v = {};
    __builtin_memcpy(&v, p, 2);
    return widen(v, f16{})[0];
}

FLUXKERN_INLINE uint32_t word_at(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
}

// blocks of ggml: SIZE elements in BYTES

template <bool MIN>  // d * (q - 8), or d * q + m
struct Q4 {
    static constexpr int SIZE = 32, BYTES = MIN ? 20 : 18;

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block), m = MIN ? half_at(block + 2) : -8 * d;
        const uint8_t* q = block + BYTES - 16;
        for (int i = 0; i < 16; ++i) {
            out[i] = d * float(q[i] & 15) + m;
            out[i + 16] = d * float(q[i] >> 4) + m;
        }
    }
};

template <bool MIN>  // d * (q - 16), or d * q + m, bit i of h above the four of element i
struct Q5 {
    static constexpr int SIZE = 32, BYTES = MIN ? 24 : 22;

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block), m = MIN ? half_at(block + 2) : -16 * d;
        const uint32_t h = word_at(block + BYTES - 20);
        const uint8_t* q = block + BYTES - 16;
        for (int i = 0; i < 16; ++i) {
            out[i] = d * float((q[i] & 15) | (h >> i & 1) << 4) + m;
            out[i + 16] = d * float((q[i] >> 4) | (h >> (i + 16) & 1) << 4) + m;
        }
    }
};

struct Q8 {
    static constexpr int SIZE = 32, BYTES = 34;

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block);
        for (int i = 0; i < SIZE; ++i) out[i] = d * float(int8_t(block[2 + i]));
    }
};

// d * scale * q - dmin * min; 16 elements have a byte of both
struct Q2K {
    static constexpr int SIZE = 256, BYTES = 84;

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        for (int run = 0; run < 16; ++run) {
            const float scale = d * float(block[run] & 15), min = dmin * float(block[run] >> 4);
            const uint8_t* q = block + 16 + run / 8 * 32 + run % 2 * 16;
            const int shift = run % 8 / 2 * 2;
            for (int i = 0; i < 16; ++i) out[16 * run + i] = scale * float(q[i] >> shift & 3) - min;
        }
    }
};

// d * scale * (q - 4), a third bit of each q in h
struct Q3K {
    static constexpr int SIZE = 256, BYTES = 110;

    static int scale_of(const uint8_t* s, int run) {
        const int low = s[run % 8] >> 4 * (run / 8) & 15, high = s[8 + run % 4] >> 2 * (run / 4) & 3;
        return (low | high << 4) - 32;
    }

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block + 108);
        for (int run = 0; run < 16; ++run) {
            const float scale = d * float(scale_of(block + 96, run));
            const uint8_t *h = block + run % 2 * 16, *q = h + 32 + run / 8 * 32;
            const int shift = run % 8 / 2 * 2, bit = run / 2;
            for (int i = 0; i < 16; ++i) {
                const int three = (q[i] >> shift & 3) | (h[i] >> bit & 1) << 2;
                out[16 * run + i] = scale * float(three - 4);
            }
        }
    }
};

// d * scale * q - dmin * min; eight runs of 32, two of them in the halves of a byte
template <bool FIFTH>
struct Q45K {
    static constexpr int SIZE = 256, BYTES = FIFTH ? 176 : 144;

    static int scale_of(const uint8_t* s, int run) {
        if (run < 4) return s[run] & 63;
        return (s[run + 4] & 15) | s[run - 4] >> 6 << 4;
    }

    static int min_of(const uint8_t* s, int run) {
        if (run < 4) return s[run + 4] & 63;
        return s[run + 4] >> 4 | s[run] >> 6 << 4;
    }

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block), dmin = half_at(block + 2);
        for (int run = 0; run < 8; ++run) {
            const float scale = d * float(scale_of(block + 4, run));
            const float min = dmin * float(min_of(block + 4, run));
            const uint8_t *h = block + 16, *q = block + BYTES - 128 + run / 2 * 32;
            const int shift = run % 2 * 4;
            for (int i = 0; i < 32; ++i) {
                const int fifth = FIFTH ? (h[i] >> run & 1) << 4 : 0;
                out[32 * run + i] = scale * float((q[i] >> shift & 15) | fifth) - min;
            }
        }
    }
};

// d * scale * (q - 32), four bits of each q in low and two in high
struct Q6K {
    static constexpr int SIZE = 256, BYTES = 210;

    static void decode(const uint8_t* block, float* __restrict out) {
        const float d = half_at(block + 208);
        for (int run = 0; run < 16; ++run) {
            const float scale = d * float(int8_t(block[192 + run]));
            const int half = run / 8, group = run % 8 / 2, first = run % 2 * 16;
            const uint8_t* low = block + 64 * half + group % 2 * 32 + first;
            const uint8_t* high = block + 128 + 32 * half + first;
            const int shift = group / 2 * 4;
            for (int i = 0; i < 16; ++i) {
                const int q = (low[i] >> shift & 15) | (high[i] >> 2 * group & 3) << 4;
                out[16 * run + i] = scale * float(q - 32);
            }
        }
    }
};

template <class Block>
void decode_blocks(const uint8_t* row, int64_t K, float* out) {
    for (int64_t k = 0; k < K; k += Block::SIZE, row += Block::BYTES) Block::decode(row, out + k);
}

template <class T>
void decode_numbers(const uint8_t* row, int64_t K, float* out) {
    each_vec<T>(K, [&](int64_t i, int, auto part) {
        put(out + i, natural(load(reinterpret_cast<const T*>(row) + i, part), T{}));
    });
}

void decode_codes(const uint8_t* row, int64_t K, const float* table, bool halves,
                  float* __restrict out) {
    if (!halves) {
        for (int64_t k = 0; k < K; ++k) out[k] = table[row[k]];
        return;
    }
    for (int64_t k = 0; k < K; k += 2) {
        out[k] = table[row[k / 2] >> 4];
        out[k + 1] = table[row[k / 2] & 15];
    }
}

void decode(const StoredRows& from, const uint8_t* row, float* out) {
    switch (from.encoding) {
        case Encoding::f32: return decode_numbers<float>(row, from.K, out);
        case Encoding::f16: return decode_numbers<f16>(row, from.K, out);
        case Encoding::bf16: return decode_numbers<bf16>(row, from.K, out);
        case Encoding::codes8: return decode_codes(row, from.K, from.table, false, out);
        case Encoding::codes4: return decode_codes(row, from.K, from.table, true, out);
        case Encoding::q4_0: return decode_blocks<Q4<false>>(row, from.K, out);
        case Encoding::q4_1: return decode_blocks<Q4<true>>(row, from.K, out);
        case Encoding::q5_0: return decode_blocks<Q5<false>>(row, from.K, out);
        case Encoding::q5_1: return decode_blocks<Q5<true>>(row, from.K, out);
        case Encoding::q8_0: return decode_blocks<Q8>(row, from.K, out);
        case Encoding::q2_k: return decode_blocks<Q2K>(row, from.K, out);
        case Encoding::q3_k: return decode_blocks<Q3K>(row, from.K, out);
        case Encoding::q4_k: return decode_blocks<Q45K<false>>(row, from.K, out);
        case Encoding::q5_k: return decode_blocks<Q45K<true>>(row, from.K, out);
        case Encoding::q6_k: return decode_blocks<Q6K>(row, from.K, out);
    }
}

void fill_row(const StoredRows& from, int64_t n, float* out) {
    decode(from, from.data + n * from.stride, out);
    if (from.scale != nullptr) {
        const float* scale = from.scale + n * from.scale_stride;
        for (int64_t k = 0; k < from.K; k += from.group, ++scale) {
            const int64_t end = k + from.group < from.K ? k + from.group : from.K;
            for (int64_t i = k; i < end; ++i) out[i] *= *scale;
        }
    }
    if (from.rotation > 0) rotate(out, from.K, from.rotation);
}

// NaN where the row holds a NaN or an infinity
float largest_of(const float* row, int64_t K) {
    Vec most = {}, poison = {};
    each_vec<float>(K, [&](int64_t i, int, auto part) {
        const Vec v = load(row + i, part);
        most = larger(most, larger(v, Vec{} - v));
        poison = poison + (v - v);
    });
    float found = total(poison.a + poison.b);
    for (int i = 0; i < REG; ++i) {
        found = most.a[i] > found ? most.a[i] : found;
        found = most.b[i] > found ? most.b[i] : found;
    }
    return found;
}

FLUXKERN_INLINE Bytes nearest_within_127(Reg v) {  // ties to even, |v| < 2^22
    Ints q = bit_cast<Ints>(v + 0x1.8p23f) - 0x4b400000;
    q = q > 127 ? 127 - Ints{} : q;
    q = q < -127 ? -127 - Ints{} : q;
    return __builtin_convertvector(q, Bytes);
}

// The scale of the row, as ops.quantize_int8 has it.
float quantise_row(const float* row, int64_t K, int8_t* out) {
    const float scale = largest_of(row, K) / 127;
    if (!(scale >= 0x1p-126f)) {
        __builtin_memset(out, 0, K);
        return scale < 1 ? 0 : scale;
    }
    const Vec inverse = all(1 / scale);
    each_vec<float>(K, [&](int64_t i, int, auto part) {
        const Vec v = product(load(row + i, part), inverse);
        int8_t q[WIDTH];
        put(q, nearest_within_127(v.a)), put(q + REG, nearest_within_127(v.b));
        __builtin_memcpy(out + i, q, K - i < WIDTH ? K - i : WIDTH);
    });
    return scale;
}

// body(n, the row) for every row
template <class Body>
void each_row(const StoredRows& from, const Context& context, const Body& body) {
    parallel(context, from.N, GRAIN / (from.K + 1) + 1, [&](int64_t begin, int64_t end) {
        const Buffer row(from.K);
        for (int64_t n = begin; n < end; ++n) {
            fill_row(from, n, row.data);
            body(n, row.data);
        }
    });
}

}  // namespace

void dequantise(DType dtype, const StoredRows& from, Rows out, float* largest,
                const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        each_row(from, context, [&](int64_t n, const float* row) {
            const Out<T> to = {static_cast<T*>(out.data) + n * out.stride_b, false};
            each_vec<T>(from.K, [&](int64_t i, int, auto part) {
                to.store(i, ordered_as(load(row + i), T{}), part);
            });
            largest[n] = largest_of(row, from.K);
        });
    });
}

void requantise_int8(const StoredRows& from, Rows out, float* scale, const Context& context) {
    each_row(from, context, [&](int64_t n, const float* row) {
        scale[n] = quantise_row(row, from.K, static_cast<int8_t*>(out.data) + n * out.stride_b);
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
