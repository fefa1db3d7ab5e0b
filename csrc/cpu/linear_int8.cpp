// out = activation(scale * weight_scale * (q - zero) weight^T + bias), q the 8 bits of a row of x,
// which ConvRot may turn before.
// Parallel: rows of x; then blocks of rows of the weight, packed once a thread, by chunks of x.
// Bytes: N K of the weight, S B (K + N) elements; q, S B K, from the caches once a block.
// Accumulation: int32, exact, so the same on every instruction set; fp32 after it, rounded once.
// Limits: K <= 65536, where int32 ends; few rows are multiplied with the weight as it lies.
#include <type_traits>

#include "buffer.h"
#include "convrot.h"
#include "gelu.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * REG)));
template <class Number>
using Numbers __attribute__((vector_size(REG * sizeof(Number)))) = Number;

constexpr int64_t LINE = 64;                 // bytes
constexpr int64_t CHUNK = 768;               // rows of x that take a packed block together
constexpr int64_t BLOCK = int64_t(3) << 16;  // bytes of a packed block, for the second level
constexpr int64_t FEW = 8;                   // rows of x that are not worth packing for
constexpr int64_t ROWS = 12;                 // of x, a multiple of every engine's

// x = scale * (q - zero), |q| <= 127; a scale of NaN where x is not finite
struct Row {
    float scale;
    int32_t zero, sum;  // of q
};

float smallest(Vec v) {
    float low = 0;
    for (int i = 0; i < REG; ++i) {
        low = v.a[i] < low ? v.a[i] : low;
        low = v.b[i] < low ? v.b[i] : low;
    }
    return low;
}

FLUXKERN_INLINE Reg to_float(Ints v) {
    return __builtin_convertvector(v, Reg);
}

// To nearest, ties to even, for |v| < 2^22.
FLUXKERN_INLINE Ints to_integer(Reg v) {
    return bit_cast<Ints>(v + 0x1.8p23f) - 0x4b400000;
}

template <class Number>
FLUXKERN_INLINE void put_within_127(Number* to, Ints v) {
    v = v > 127 ? 127 - Ints{} : v;
    v = v < -127 ? -127 - Ints{} : v;
    put(to, __builtin_convertvector(v, Numbers<Number>));
}

template <class Number>
int32_t sum_of(const Number* values, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
}

// q [stride], zeros behind K
template <class T, class Number>
Row quantise(const T* x, int64_t K, Number* q, int64_t stride) {
    Vec low = {}, high = {}, poison = {};
    each_vec<T>(K, [&](int64_t i, int, auto part) {
        const Vec v = load(x + i, part);
        low = {smaller(low.a, v.a), smaller(low.b, v.b)};
        high = larger(high, v);
        poison = poison + (v - v);  // 0, or NaN
    });
    const float least = smallest(low), most = -smallest(Vec{} - high);
    const float scale = most / 254 - least / 254 + total(poison.a + poison.b);
    __builtin_memset(q, 0, stride * sizeof(Number));
    if (!(scale >= 0x1p-126f)) return {scale < 1 ? 0 : scale, 0, 0};
    const Vec inverse = all(1 / scale);
    const int32_t zero = -127 - to_integer(least / scale - Reg{})[0];
    each_vec<T>(K, [&](int64_t i, int, auto part) {
        const Vec v = product(natural(load(x + i, part), T{}), inverse);
        put_within_127(q + i, to_integer(v.a) + zero);
        put_within_127(q + i + REG, to_integer(v.b) + zero);
    });
    __builtin_memset(q + K, 0, (stride - K) * sizeof(Number));
    return {scale, zero, sum_of(q, K)};
}

// WIDTH rows of the weight: what the end of a product needs of them
struct Columns {
    float scale[WIDTH], bias[WIDTH];
    int32_t sum[WIDTH];
};

template <class T>
struct Product {
    Tokens out;
    const Row* rows;
    const MatrixSizes& sizes;
    bool gelu, add;

    // out[row, n .. n + WIDTH] of the sums of q and the weight, plus `excess` times the sum of q
    FLUXKERN_INLINE void write(const int32_t* sums, int32_t excess, const Columns& columns,
                               int64_t row, int64_t n) const {
        const Row& of = rows[row];
        Ints a, b, column_a, column_b;
        get(sums, a), get(sums + REG, b);
        get(columns.sum, column_a), get(columns.sum + REG, column_b);
        a = a - excess * of.sum - column_a * of.zero;
        b = b - excess * of.sum - column_b * of.zero;
        Vec v = Vec{to_float(a), to_float(b)} * (load(columns.scale) * of.scale);
        v = v + load(columns.bias);
        v = ordered_as(gelu ? FLUXKERN_ISA::gelu(v, T{}) : v, T{});
        T* to = static_cast<T*>(out.data) + row / sizes.B * out.stride_b +
                row % sizes.B * out.stride_l;
        const int64_t left = sizes.N - n;
        if (left >= WIDTH) return finish(to + n, v, Whole{});
        finish(to + n, v, first<T>(int(left)));
    }

    template <class Extent>
    FLUXKERN_INLINE void finish(T* to, Vec v, const Extent& extent) const {
        if (add) v = v + load(to, extent);
        Out<T>{to, false}.store(0, v, extent);
    }
};

// engines: sums [ROWS, WIDTH] of ROWS rows of q, as Numbers, with WIDTH rows of the weight

FLUXKERN_INLINE int32_t word(const void* p) {
    int32_t bits;
    get(p, bits);
    return bits;
}

// The weight as it lies.
struct Unpacked {
    using Number = int16_t;
    static constexpr int ROWS = 4;

    template <int R>
    static void multiply(const Number* q, int64_t stride, const int8_t* weight, int64_t K,
                         int32_t* sums) {
        int32_t found[R] = {};
        for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) found[r] += q[r * stride + k] * int16_t(weight[k]);
        }
        for (int r = 0; r < R; ++r) sums[r * WIDTH] = found[r];
    }
};

#ifdef __AVX2__
// Packed [K / 2, WIDTH, 2]. Products of 8 bits, maddubs with psignb, were slower: 145 to 170 GOP/s.
struct In16Bits {
    using Number = int16_t;
    static constexpr int ROWS = 6, EXCESS = 0;

#ifdef __AVX512F__
    using Lanes = __m512i;
    static FLUXKERN_INLINE Lanes all(int32_t v) {
        return _mm512_set1_epi32(v);
    }
    static FLUXKERN_INLINE Lanes add_product(Lanes sum, Lanes w, Lanes q) {
        return _mm512_add_epi32(sum, _mm512_madd_epi16(w, q));
    }
#else
    using Lanes = __m256i;
    static FLUXKERN_INLINE Lanes all(int32_t v) {
        return _mm256_set1_epi32(v);
    }
    static FLUXKERN_INLINE Lanes add_product(Lanes sum, Lanes w, Lanes q) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w, q));
    }
#endif

    static void multiply(const Number* q, int64_t stride, const Number* panel, int64_t K,
                         int32_t* out) {
        Lanes sums[ROWS][2] = {};
        const Number* groups[ROWS / 3];
        for (int g = 0; g < ROWS / 3; ++g) groups[g] = q + 3 * g * stride;
        for (int64_t k = 0; k < K; k += 2, panel += 2 * WIDTH) {
            Lanes w[2];
            get(panel, w[0]), get(panel + WIDTH, w[1]);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r) {
                const Lanes here = all(word(groups[r / 3] + r % 3 * stride + k));
                sums[r][0] = add_product(sums[r][0], w[0], here);
                sums[r][1] = add_product(sums[r][1], w[1], here);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < 2 * ROWS; ++i) put(out + REG * i, sums[i / 2][i % 2]);
    }

    static FLUXKERN_INLINE Number packed(int8_t w) {
        return w;
    }
};

// n rows of the weight to [K / (4 / bytes of a number), WIDTH, 4 / bytes], zeros behind them and K
template <class Engine>
void pack(const int8_t* weight, int64_t stride, int64_t n, int64_t K,
          typename Engine::Number* out) {
    using Number = typename Engine::Number;
    constexpr int64_t STEP = 4 / sizeof(Number);
    for (int64_t k = 0; k < K; k += LINE, out += LINE * WIDTH) {
        const int64_t left = K - k < LINE ? K - k : LINE;
        for (int64_t i = 0; i < WIDTH; ++i) {
            int8_t line[LINE] = {};
            Number numbers[LINE];
            if (i < n && left == LINE) __builtin_memcpy(line, weight + i * stride + k, LINE);
            else if (i < n) __builtin_memcpy(line, weight + i * stride + k, left);
            for (int64_t j = 0; j < LINE; ++j) numbers[j] = Engine::packed(line[j]);
            for (int64_t j = 0; j < LINE; j += STEP) {
                put(out + j * WIDTH + i * STEP, word(numbers + j));
            }
        }
    }
}
#endif

#ifdef __AVX512F__
// Packed [K / 4, WIDTH, 4] as w + 128, unsigned.
struct Vnni {
    using Number = int8_t;
    static constexpr int ROWS = 12, EXCESS = 128;

    __attribute__((target("avx512vnni"))) static void multiply(const Number* q, int64_t stride,
                                                               const Number* panel, int64_t K,
                                                               int32_t* out) {
        __m512i sums[ROWS][2] = {};
        const Number* groups[ROWS / 3];
        for (int g = 0; g < ROWS / 3; ++g) groups[g] = q + 3 * g * stride;
        for (int64_t k = 0; k < K; k += 4, panel += 4 * WIDTH) {
            const __m512i w[2] = {_mm512_loadu_si512(panel), _mm512_loadu_si512(panel + 64)};
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r) {
                const __m512i here = _mm512_set1_epi32(word(groups[r / 3] + r % 3 * stride + k));
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w[0], here);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w[1], here);
            }
        }
#pragma GCC unroll 24
        for (int i = 0; i < 2 * ROWS; ++i) put(out + 16 * i, sums[i / 2][i % 2]);
    }

    static FLUXKERN_INLINE Number packed(int8_t w) {
        return w ^ -128;
    }
};
#endif

constexpr int64_t rounded_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

// One call.
template <class T, class Engine>
struct Linear {
    using Number = typename Engine::Number;

    Tokens x;
    Rows weight;
    const float* weight_scale;
    const void* bias;
    const MatrixSizes& sizes;
    const int64_t M, K, stride;  // rows of x; K rounded up to lines; numbers from one q to the next
    const int64_t rotation;
    const Buffer q, rows;
    const Product<T> product;

    Linear(Tokens x, Rows weight, const float* weight_scale, const void* bias, bool gelu, bool add,
           int64_t rotation, Tokens out, const MatrixSizes& sizes)
        : x(x),
          weight(weight),
          weight_scale(weight_scale),
          bias(bias),
          sizes(sizes),
          M(sizes.S * sizes.B),
          K(rounded_up(sizes.K, LINE)),
          stride(K + LINE),  // of no power of 2, so that rows do not meet in one set of a cache
          rotation(rotation),
          q(rounded_up(M, ROWS) * stride * int64_t(sizeof(Number)) / 4),
          rows(M * int64_t(sizeof(Row)) / 4),
          product{out, reinterpret_cast<Row*>(rows.data), sizes, gelu, add} {}

    Number* q_of(int64_t row) const {
        return reinterpret_cast<Number*>(q.data) + row * stride;
    }

    const int8_t* weight_of(int64_t n) const {
        return static_cast<const int8_t*>(weight.data) + n * weight.stride_b;
    }

    void quantise_rows(const Context& context) const {
        Row* found = reinterpret_cast<Row*>(rows.data);
        parallel(context, M, GRAIN / (sizes.K + 1) + 1, [&](int64_t begin, int64_t end) {
            const Buffer turned(rotation > 0 ? sizes.K : 1);
            for (int64_t i = begin; i < end; ++i) {
                const T* row = row_of<T>(x, {i / sizes.B, i % sizes.B, false});
                if (rotation == 0) {
                    found[i] = quantise(row, sizes.K, q_of(i), stride);
                    continue;
                }
                each_vec<T>(sizes.K, [&](int64_t k, int, auto part) {
                    put(turned.data + k, natural(load(row + k, part), T{}));
                });
                rotate(turned.data, sizes.K, rotation);
                found[i] = quantise(turned.data, sizes.K, q_of(i), stride);
            }
        });
        const int64_t spare = rounded_up(M, ROWS) - M;
        __builtin_memset(q_of(M), 0, spare * stride * sizeof(Number));
    }

    Columns columns(int64_t n) const {
        Columns found = {};
        for (int64_t i = 0; i < WIDTH && n + i < sizes.N; ++i) {
            found.scale[i] = weight_scale[n + i];
            found.bias[i] = bias == nullptr ? 0 : scalar<T>(bias, n + i);
            found.sum[i] = sum_of(weight_of(n + i), sizes.K);
        }
        return found;
    }

    void run_unpacked(const Context& context) const {
        const int64_t panels = (sizes.N + WIDTH - 1) / WIDTH;
        const int64_t grain = GRAIN / (WIDTH * sizes.K + 1) + 1;
        parallel(context, panels, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) multiply_unpacked(i * WIDTH);
        });
    }

    void multiply_unpacked(int64_t n) const {
        const Columns of = columns(n);
        for (int64_t row = 0; row < M; row += Engine::ROWS) {
            int32_t sums[Engine::ROWS * WIDTH] = {};
            for (int64_t i = 0; i < WIDTH && n + i < sizes.N; ++i) {
                const int8_t* w = weight_of(n + i);
                if (row + 1 == M) {
                    Engine::template multiply<1>(q_of(row), stride, w, sizes.K, sums + i);
                } else {
                    Engine::template multiply<Engine::ROWS>(q_of(row), stride, w, sizes.K,
                                                            sums + i);
                }
            }
            for (int r = 0; r < Engine::ROWS && row + r < M; ++r) {
                product.write(sums + r * WIDTH, 0, of, row + r, n);
            }
        }
    }

    // blocks of panels of WIDTH rows of the weight
    void run_packed(const Context& context) const {
        constexpr int64_t MOST = 16;
        const int64_t fit = BLOCK / (K * WIDTH * int64_t(sizeof(Number)));
        const int64_t panels = fit < 1 ? 1 : fit < MOST ? fit : MOST;
        const int64_t blocks = (sizes.N + panels * WIDTH - 1) / (panels * WIDTH);
        const int64_t chunks = (M + CHUNK - 1) / CHUNK;
        parallel(context, blocks * chunks, 1, [&](int64_t begin, int64_t end) {
            const Buffer memory(panels * K * WIDTH * int64_t(sizeof(Number)) / 4);
            Number* const block = reinterpret_cast<Number*>(memory.data);
            Columns of[MOST];
            for (int64_t i = begin; i < end; ++i) {
                const int64_t n = i / chunks * panels * WIDTH, row = i % chunks * CHUNK;
                const int64_t left = (sizes.N - n + WIDTH - 1) / WIDTH;
                const int64_t here = left < panels ? left : panels;
                if (i == begin || row == 0) pack_block(n, here, block, of);
                multiply_block(row, row + CHUNK < M ? row + CHUNK : M, n, here, block, of);
            }
        });
    }

    void pack_block(int64_t n, int64_t panels, Number* block, Columns* of) const {
        for (int64_t p = 0; p < panels; ++p, n += WIDTH, block += K * WIDTH) {
            of[p] = columns(n);
            pack<Engine>(weight_of(n), weight.stride_b, sizes.N - n, sizes.K, block);
        }
    }

    void multiply_block(int64_t row, int64_t end, int64_t n, int64_t panels, const Number* block,
                        const Columns* of) const {
        for (; row < end; row += Engine::ROWS) {
            for (int64_t p = 0; p < panels; ++p) {
                int32_t sums[Engine::ROWS * WIDTH];
                Engine::multiply(q_of(row), stride, block + p * K * WIDTH, K, sums);
                for (int r = 0; r < Engine::ROWS && row + r < end; ++r) {
                    product.write(sums + r * WIDTH, Engine::EXCESS, of[p], row + r, n + p * WIDTH);
                }
            }
        }
    }
};

}  // namespace

void linear_int8(DType dtype, Tokens x, Rows weight, const float* weight_scale, const void* bias,
                 bool gelu, bool add, int64_t rotation, Tokens out, const MatrixSizes& sizes,
                 const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        const auto call = [&]<class Engine>(Engine) {
            const Linear<T, Engine> linear(x, weight, weight_scale, bias, gelu, add, rotation, out,
                                           sizes);
            linear.quantise_rows(context);
            if constexpr (std::is_same_v<Engine, Unpacked>) linear.run_unpacked(context);
            else linear.run_packed(context);
        };
        if (sizes.S * sizes.B <= FEW) return call(Unpacked{});
#ifdef __AVX512F__
        if (context.vnni) return call(Vnni{});
#endif
#ifdef __AVX2__
        call(In16Bits{});
#else
        call(Unpacked{});
#endif
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
