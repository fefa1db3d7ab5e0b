// softmax(q k^T / sqrt(D)) v and its log-sum-exp; q and k normed and rotated on their way if asked.
// Parallel: over tiles of TILE queries; a thread packs keys and values once for each of its heads.
// Bytes: 4 B L H D elements; keys and values of a head, fp32, from the caches once a tile.
// Accumulation: fp32, the softmax block by block of KEYS keys; rounded once.
// Limits: 8 M D bytes of scratch a thread; scores lie transposed, so that queries fill the vectors.
#include "buffer.h"
#include "exp.h"
#include "products.h"
#include "rotation.h"
#include "rows.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

constexpr int64_t TILE = 96;   // queries; a multiple of ROWS and WIDTH
constexpr int64_t KEYS = 192;  // of a block; a multiple of ROWS
constexpr int64_t CHAIN = 32;  // products of a score that are added in one chain
constexpr int64_t AHEAD = 2;   // tokens that are fetched before they are read
constexpr float LOG2_E = 0x1.715476p0f;

constexpr int64_t rounded_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

// One head of one thread: its keys [M, stride], values [D / WIDTH, M, WIDTH], and one tile: queries
// as they are read [TILE, D] and as they are multiplied [TILE / WIDTH, D, WIDTH], scores
// [KEYS, TILE], results [TILE, D].
struct Attention {
    const AttentionSizes& sizes;
    const int64_t D, stride;  // D rounded up to whole vectors
    const Buffer keys, values, rows, queries, scores, results, top, sum, shrink;

    Attention(const AttentionSizes& sizes, int64_t stride)
        : sizes(sizes),
          D(rounded_up(sizes.D, WIDTH)),
          stride(stride),
          keys(rounded_up(sizes.M, ROWS) * stride),
          values(sizes.M * D),
          rows(TILE * D),
          queries(TILE * D),
          scores(KEYS * TILE),
          results(TILE * D),
          top(TILE),
          sum(TILE),
          shrink(TILE) {
        const int64_t end = rounded_up(sizes.M, ROWS) * stride;
        for (int64_t i = sizes.M * stride; i < end; ++i) keys.data[i] = 0;
        for (int64_t i = 0; i < TILE * D; ++i) rows.data[i] = 0;
    }

    void transpose_queries(int64_t panel) const {
        const float* in = rows.data + panel * WIDTH * D;
        float* out = queries.data + panel * WIDTH * D;
        for (int64_t q = 0; q < WIDTH; q += 4) {
            for (int64_t d = 0; d < D; d += 4) {
                transpose_4x4(in + q * D + d, D, out + d * WIDTH + q, WIDTH);
            }
        }
    }

    // scores of `panel`, WIDTH queries, with n keys from `first`; the largest so far
    template <class Stride>
    FLUXKERN_INLINE Vec score(int64_t panel, int64_t first, int64_t n, Stride row_stride) const {
        Vec most = load(top.data + panel * WIDTH);
        for (int64_t key = 0; key < n; key += ROWS) {
            Vec sums[ROWS] = {};
            const float* row = keys.data + (first + key) * stride;
            for (int64_t d = 0; d < D; d += CHAIN) {
                Vec part[ROWS] = {};
                multiply_add(part, row + d, row_stride, 1,
                             queries.data + (panel * D + d) * WIDTH,
                             D - d < CHAIN ? D - d : CHAIN);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + part[r];
            }
            float* out = scores.data + key * TILE + panel * WIDTH;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                store(out + r * TILE, sums[r]);
                if (key + r < n) most = larger(most, sums[r]);
            }
        }
        return most;
    }

    // scores to exp(score - most), and what they and the sums before them come to
    FLUXKERN_INLINE void exponentiate(int64_t panel, int64_t n, Vec most) const {
        const int64_t column = panel * WIDTH;
        const Vec change = exp2(at_least(-126, (load(top.data + column) - most) * LOG2_E));
        Vec total = {};
        float* at = scores.data + column;
        for (int64_t key = 0; key < n; ++key, at += TILE) {
            const Vec e = exp2(at_least(-126, (load(at) - most) * LOG2_E));
            store(at, e);
            total = total + e;
        }
        store(top.data + column, most);
        store(sum.data + column, total + load(sum.data + column) * change);
        store(shrink.data + column, change);
    }

    // results = results * shrink + scores^T values, of n keys from `first`
    FLUXKERN_INLINE void accumulate(int64_t queries_here, int64_t first, int64_t n) const {
        for (int64_t d = 0; d < D; d += WIDTH) {
            const float* panel = values.data + d * sizes.M + first * WIDTH;
            for (int64_t q = 0; q < queries_here; q += ROWS) {
                Vec sums[ROWS] = {};
                multiply_add(sums, scores.data + q, Fixed<1>{}, TILE, panel, n);
                float* out = results.data + q * D + d;
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; ++r) {
                    if (first) sums[r] = sums[r] + load(out + r * D) * shrink.data[q + r];
                    store(out + r * D, sums[r]);
                }
            }
        }
    }

    template <class Stride>
    void attend(int64_t queries_here, Stride row_stride) const {
        for (int64_t i = 0; i < TILE; ++i) top.data[i] = -__builtin_inff(), sum.data[i] = 0;
        for (int64_t i = 0; !sizes.M && i < TILE * D; ++i) results.data[i] = 0;
        for (int64_t panel = 0; panel * WIDTH < queries_here; ++panel) transpose_queries(panel);
        for (int64_t first = 0; first < sizes.M; first += KEYS) {
            const int64_t n = sizes.M - first < KEYS ? sizes.M - first : KEYS;
            for (int64_t panel = 0; panel * WIDTH < queries_here; ++panel) {
                exponentiate(panel, n, score(panel, first, n, row_stride));
            }
            accumulate(queries_here, first, n);
        }
    }

    void attend(int64_t queries_here) const {
        if (stride == 64) return attend(queries_here, Fixed<64>{});
        if (stride == 128) return attend(queries_here, Fixed<128>{});
        attend(queries_here, stride);
    }
};

// The norm and rotation of one tensor of heads, if it has one; its table [tokens, padded(D)].
template <class T>
struct Rotary {
    const T* weight;
    const float* table;
    int64_t D;
    float eps, factor;

    // one head times `factor`, D rounded up to whole vectors, in the order of pairs
    FLUXKERN_INLINE void read(const T* x, const T* next, int64_t l, float* out) const {
        const auto take = [&](int64_t i, Vec v, const auto&) {
            store(out + i, v * factor);
            prefetch(next + i);
        };
        if (weight == nullptr) {
            return each_vec<T>(
                D, [&](int64_t i, int, auto part) { take(i, load(x + i, part), part); });
        }
        const float* cos = table + l * padded(D);
        turned(x, weight, Rotation{cos, cos + padded(D) / 2}, D, eps, take);
    }
};

template <class T>
void pack(const Attention& a, const Rotary<T>& rotary, const Heads& k, const Heads& v, int64_t b,
          int64_t h) {
    for (int64_t m = 0; m < a.sizes.M; ++m) {
        const T* key = head_of<T>(k, b, m, h);
        const T* value = head_of<T>(v, b, m, h);
        rotary.read(key, key + AHEAD * k.stride_l, m, a.keys.data + m * a.stride);
        each_vec<T>(a.sizes.D, [&](int64_t d, int, auto part) {
            store(a.values.data + d * a.sizes.M + m * WIDTH, load(value + d, part));
            prefetch(value + AHEAD * v.stride_l + d);
        });
    }
}

template <class T>
void write(const Attention& a, const Heads& out, float* lse, int64_t b, int64_t h, int64_t first,
           int64_t n) {
    for (int64_t q = 0; q < n; ++q) {
        const float total = a.sum.data[q], inverse = total == 0 ? 0 : 1 / total;
        const Out<T> row = {head_of<T>(out, b, first + q, h), false};
        each_vec<T>(a.sizes.D, [&](int64_t d, int, auto part) {
            row.store(d, load(a.results.data + q * a.D + d) * inverse, part);
        });
        if (lse != nullptr) {
            lse[(b * a.sizes.L + first + q) * a.sizes.H + h] =
                a.top.data[q] + __builtin_logf(total);
        }
    }
}

}  // namespace

void attention(DType dtype, Heads q, Heads k, Heads v, const void* q_weight, const void* k_weight,
               Angles cos, Angles sin, Heads out, float* lse, const AttentionSizes& sizes,
               float eps, float* scratch, const Context& context) {
    const int64_t D = sizes.D, tiles = (sizes.L + TILE - 1) / TILE;
    const int64_t stride = D <= 64 ? 64 : D <= 128 ? 128 : rounded_up(D, WIDTH);
    const float factor = 1 / __builtin_sqrtf(float(D));
    if (q_weight != nullptr) {
        parallel(context, sizes.L, GRAIN / (D + 1) + 1, [&](int64_t begin, int64_t end) {
            for (int64_t l = begin; l < end; ++l) {
                rotation_of(cos, sin, l, D, scratch + l * padded(D));
            }
        });
    }
    with_dtype(dtype, [&]<class T>(T) {
        const Rotary<T> queries = {static_cast<const T*>(q_weight), scratch, D, eps, factor};
        const Rotary<T> keys = {static_cast<const T*>(k_weight), scratch, D, eps, 1};
        parallel(context, sizes.B * sizes.H * tiles, 1, [&](int64_t begin, int64_t end) {
            const Attention a(sizes, stride);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t b = i / tiles / sizes.H, h = i / tiles % sizes.H;
                const int64_t first = i % tiles * TILE;
                const int64_t n = sizes.L - first < TILE ? sizes.L - first : TILE;
                if (i == begin || first == 0) pack(a, keys, k, v, b, h);
                for (int64_t l = 0; l < n; ++l) {
                    const T* query = head_of<T>(q, b, first + l, h);
                    queries.read(query, query + AHEAD * q.stride_l, first + l,
                                 a.rows.data + l * a.D);
                }
                a.attend(n);
                write<T>(a, out, lse, b, h, first, n);
            }
        });
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
