// out = silu(z), z = (x - mean) rstd weight + bias, statistics over a group's channels; backward.
// Parallel: planes over groups; channels-last over blocks of pixels.
// Bytes: forward 2 B C P elements, and x once more for the statistics; backward 3, and x, x, dy.
// Accumulation: fp32 in blocks about the mean so far, merged in fp64; sums in a fixed order.
// Limits: contiguous or channels-last.
#include "buffer.h"
#include "rows.h"
#include "silu.h"

namespace fluxkern::cpu::FLUXKERN_ISA {
namespace {

struct Moments {
    double count = 0, mean = 0, squares = 0;  // about the mean

    void merge(double n, double other_mean, double other_squares) {
        if (n == 0) return;
        const double all = count + n, d = other_mean - mean;
        squares += other_squares + d * d * count * n / all;
        mean += d * n / all;
        count = all;
    }
    float rstd(float eps) const {
        return float(1 / __builtin_sqrt(squares / count + double(eps)));
    }
};

// What z and its gradients take for one Vec: of one channel, or of the channels side by side.
template <class T>
struct Affine {
    Vec mean, rstd, weight, bias;

    FLUXKERN_INLINE Vec n(Vec x) const {
        return (x - mean) * rstd;
    }
    FLUXKERN_INLINE Vec z(Vec x) const {
        return n(x) * weight + bias;
    }
    FLUXKERN_INLINE Vec dz(Vec dy, Vec x) const {
        return dy * silu_slope(z(x), T{});
    }
    FLUXKERN_INLINE Vec dx(Vec dy, Vec x, Vec mean_dn, Vec mean_dn_n) const {
        return rstd * (dz(dy, x) * weight - mean_dn - n(x) * mean_dn_n);
    }
};

template <class T>
bool streams_images(const ImageSizes& sizes, const Images& out) {
    const int64_t row = sizes.channels_last ? sizes.C : sizes.P;
    return streams<T>({sizes.B, sizes.C * sizes.P / (row ? row : 1), row, 0},
                      {out.data, out.stride_b, row});
}

template <class T>
T* row_of(const Images& x, int64_t b, int64_t row, const ImageSizes& sizes) {
    return static_cast<T*>(x.data) + b * x.stride_b +
           row * (sizes.channels_last ? x.stride_p : x.stride_c);
}

// planes: a row is a channel

constexpr int64_t BLOCK = 4096;

// body(first, pixels)
template <class Body>
FLUXKERN_INLINE void each_block_of_pixels(int64_t P, const Body& body) {
    for (int64_t p = 0; p < P; p += BLOCK) body(p, P - p < BLOCK ? P - p : BLOCK);
}

// The first block about its own mean, each further one about the mean of those before it: the merge
// adds at least half of what that is off, so nothing cancels.
template <class T>
Moments moments_of(const T* x, int64_t channels, int64_t P) {
    Moments moments;
    each_block_of_pixels(channels * P, [&](int64_t p, int64_t pixels) {
        const auto sum_of = [&](float pivot) {
            Sum sum;
            each_vec<T>(pixels, [&](int64_t i, int lane, auto part) {
                sum.add(lane, keep(load(x + p + i, part) - pivot, part));
            });
            return sum.total();
        };
        const float pivot = p == 0 ? sum_of(0) / float(pixels) : float(moments.mean);
        Sum sum, squares;
        each_vec<T>(pixels, [&](int64_t i, int lane, auto part) {
            const Vec d = keep(load(x + p + i, part) - pivot, part);
            sum.add(lane, d);
            squares.add(lane, d * d);
        });
        const double off = double(sum.total()) / double(pixels);
        moments.merge(double(pixels), double(pivot) + off,
                      double(squares.total()) - double(pixels) * off * off);
    });
    return moments;
}

// body(b, first channel, channels, moments, rstd)
template <class T, class Body>
void each_group_of_planes(const Context& context, const Images& x, const ImageSizes& sizes,
                          float eps, const Body& body) {
    const int64_t channels = sizes.C / sizes.groups;
    const int64_t grain = GRAIN / (channels * sizes.P + 1) + 1;
    parallel(context, sizes.B * sizes.groups, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / sizes.groups, c = i % sizes.groups * channels;
            const Moments m = moments_of(row_of<const T>(x, b, c, sizes), channels, sizes.P);
            body(b, c, channels, float(m.mean), m.rstd(eps));
        }
    });
}

template <class T>
Affine<T> affine_of(const void* weight, const void* bias, int64_t c, float mean, float rstd) {
    return {all(mean), all(rstd), all(scalar<T>(weight, c)), all(scalar<T>(bias, c))};
}

template <class T>
void forward_planes(const Images& x, const void* weight, const void* bias, const Images& out,
                    const ImageSizes& sizes, float eps, const Context& context) {
    const bool streaming = streams_images<T>(sizes, out);
    each_group_of_planes<T>(
        context, x, sizes, eps,
        [&](int64_t b, int64_t first, int64_t channels, float mean, float rstd) {
            for (int64_t c = first; c < first + channels; ++c) {
                const T* row = row_of<const T>(x, b, c, sizes);
                const Out<T> out_row = {row_of<T>(out, b, c, sizes), streaming};
                const Vec scale = all(rstd * scalar<T>(weight, c)), shift = all(scalar<T>(bias, c));
                each_vec<T>(sizes.P, [&](int64_t i, int, auto part) {
                    const Vec z = (load(row + i, part) - mean) * scale + shift;
                    out_row.store(i, silu(z, T{}), part);
                });
            }
        });
}

struct ChannelSums {
    double dz = 0, dz_n = 0;
};

template <class T>
ChannelSums channel_sums(const T* dy, const T* x, const Affine<T>& affine, int64_t P) {
    ChannelSums sums;
    each_block_of_pixels(P, [&](int64_t p, int64_t pixels) {
        Sum dz_sum, dz_n_sum;
        each_vec<T>(pixels, [&](int64_t i, int lane, auto part) {
            const Vec v = load(x + p + i, part), dz = affine.dz(load(dy + p + i, part), v);
            dz_sum.add(lane, dz);
            dz_n_sum.add(lane, dz * affine.n(v));
        });
        sums.dz += dz_sum.total();
        sums.dz_n += dz_n_sum.total();
    });
    return sums;
}

// sums [B, 2, padded(C)] of dz n and dz, over the batch into dweight and dbias
template <class T>
void add_batch(const float* sums, void* dweight, void* dbias, const ImageSizes& sizes,
               bool natural_order) {
    const int64_t C = padded(sizes.C);
    void* const out[] = {dweight, dbias};
    for (int which = 0; which < 2; ++which) {
        const Out<T> row = {static_cast<T*>(out[which]), false};
        each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
            Vec sum = {};
            for (int64_t b = 0; b < sizes.B; ++b) sum = sum + load(sums + (2 * b + which) * C + i);
            row.store(i, natural_order ? ordered_as(sum, T{}) : sum, part);
        });
    }
}

template <class T>
void backward_planes(const Images& dy, const Images& x, const void* weight, const void* bias,
                     const Images& dx, void* dweight, void* dbias, const ImageSizes& sizes,
                     float eps, float* scratch, const Context& context) {
    const bool streaming = streams_images<T>(sizes, dx);
    const int64_t C = padded(sizes.C);
    each_group_of_planes<T>(
        context, x, sizes, eps,
        [&](int64_t b, int64_t first, int64_t channels, float mean, float rstd) {
            double dn = 0, dn_n = 0;
            for (int64_t c = first; c < first + channels; ++c) {
                const Affine<T> affine = affine_of<T>(weight, bias, c, mean, rstd);
                const ChannelSums sums = channel_sums(row_of<const T>(dy, b, c, sizes),
                                                      row_of<const T>(x, b, c, sizes), affine,
                                                      sizes.P);
                scratch[2 * b * C + c] = float(sums.dz_n);
                scratch[(2 * b + 1) * C + c] = float(sums.dz);
                dn += sums.dz * affine.weight.a[0];
                dn_n += sums.dz_n * affine.weight.a[0];
            }
            const double count = double(channels * sizes.P);
            const Vec mean_dn = all(float(dn / count)), mean_dn_n = all(float(dn_n / count));
            for (int64_t c = first; c < first + channels; ++c) {
                const T* row = row_of<const T>(x, b, c, sizes);
                const T* dy_row = row_of<const T>(dy, b, c, sizes);
                const Out<T> out = {row_of<T>(dx, b, c, sizes), streaming};
                const Affine<T> affine = affine_of<T>(weight, bias, c, mean, rstd);
                each_vec<T>(sizes.P, [&](int64_t i, int, auto part) {
                    const Vec g = load(dy_row + i, part), v = load(row + i, part);
                    out.store(i, affine.dx(g, v, mean_dn, mean_dn_n), part);
                });
            }
        });
    add_batch<T>(scratch, dweight, dbias, sizes, true);
}

// channels-last: a row is a pixel; tables and sums [padded(C)] are in the order of T

struct Tables {  // [B, 2, padded(C)] each
    float *moments, *mean_rstd, *partials, *sums, *means;

    Tables(float* scratch, const ImageSizes& sizes) {
        const int64_t row = sizes.B * 2 * padded(sizes.C);
        moments = scratch;  // [B, blocks, groups, 2]
        mean_rstd = moments + sizes.B * blocks_of(sizes, STATISTICS_PIXELS) * sizes.groups * 2;
        sums = mean_rstd + row;
        means = sums + row;
        partials = means + row;  // [B, partials, 2, padded(C)]
    }
};

template <class T>
void reorder(float* table, int64_t C) {  // natural to that of T
    for (int64_t i = 0; i < padded(C); i += WIDTH) {
        store(table + i, ordered_as(load(table + i), T{}));
    }
}

// body(b, block, first pixel, end)
template <class Body>
void each_block_of_rows(const Context& context, const ImageSizes& sizes, int64_t pixels,
                        const Body& body) {
    const int64_t blocks = blocks_of(sizes, pixels);
    parallel(context, sizes.B * blocks, GRAIN / (pixels * sizes.C + 1) + 1,
             [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                     const int64_t block = i % blocks, p = block * pixels;
                     body(i / blocks, block, p, p + pixels < sizes.P ? p + pixels : sizes.P);
                 }
             });
}

// sums[c] = sum over the pixels of term(x)
template <class T, class Term>
void sum_pixels(const Images& x, int64_t b, int64_t p, int64_t end, const ImageSizes& sizes,
                float* sums, const Term& term) {
    __builtin_memset(sums, 0, padded(sizes.C) * sizeof(float));
    for (; p < end; ++p) {
        const T* row = row_of<const T>(x, b, p, sizes);
        each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
            store(sums + i, load(sums + i) + term(load(row + i, part), i));
        });
    }
}

template <class T>
double sum_of_group(const float* sums, int64_t group, int64_t channels, float* naturally) {
    double sum = 0;
    const int64_t first = group * channels, aligned = first / WIDTH * WIDTH;
    for (int64_t i = aligned; i < first + channels; i += WIDTH) {
        store(naturally + i, natural(load(sums + i), T{}));
    }
    for (int64_t c = first; c < first + channels; ++c) sum += naturally[c];
    return sum;
}

template <class T>
void block_moments(const Context& context, const Images& x, const ImageSizes& sizes,
                   float* moments) {
    const int64_t channels = sizes.C / sizes.groups;
    const int64_t blocks = blocks_of(sizes, STATISTICS_PIXELS);
    const auto body = [&](int64_t b, int64_t block, int64_t p, int64_t end) {
        const Buffer sums(sizes.C), means(sizes.C), naturally(sizes.C);
        float* out = moments + (b * blocks + block) * sizes.groups * 2;
        const double count = double((end - p) * channels);
        sum_pixels<T>(x, b, p, end, sizes, sums.data, [](Vec v, int64_t) { return v; });
        for (int64_t g = 0; g < sizes.groups; ++g) {
            const double sum = sum_of_group<T>(sums.data, g, channels, naturally.data);
            out[2 * g] = float(sum / count);
            for (int64_t c = 0; c < channels; ++c) means.data[g * channels + c] = out[2 * g];
        }
        reorder<T>(means.data, sizes.C);
        sum_pixels<T>(x, b, p, end, sizes, sums.data, [&](Vec v, int64_t i) {
            const Vec d = v - load(means.data + i);
            return d * d;
        });
        for (int64_t g = 0; g < sizes.groups; ++g) {
            out[2 * g + 1] = float(sum_of_group<T>(sums.data, g, channels, naturally.data));
        }
    };
    each_block_of_rows(context, sizes, STATISTICS_PIXELS, body);
}

// mean and rstd of every channel
template <class T>
void statistics_tables(const Context& context, const Images& x, const ImageSizes& sizes, float eps,
                       const Tables& tables) {
    block_moments<T>(context, x, sizes, tables.moments);
    const int64_t channels = sizes.C / sizes.groups, C = padded(sizes.C);
    const int64_t blocks = blocks_of(sizes, STATISTICS_PIXELS);
    parallel(context, sizes.B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            float *mean = tables.mean_rstd + 2 * b * C, *rstd = mean + C;
            for (int64_t g = 0; g < sizes.groups; ++g) {
                Moments m;
                for (int64_t i = 0; i < blocks; ++i) {
                    const int64_t p = i * STATISTICS_PIXELS, left = sizes.P - p;
                    const int64_t pixels = left < STATISTICS_PIXELS ? left : STATISTICS_PIXELS;
                    const float* one = tables.moments + ((b * blocks + i) * sizes.groups + g) * 2;
                    m.merge(double(pixels * channels), one[0], one[1]);
                }
                for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
                    mean[c] = float(m.mean);
                    rstd[c] = m.rstd(eps);
                }
            }
            reorder<T>(mean, sizes.C);
            reorder<T>(rstd, sizes.C);
        }
    });
}

template <class T>
struct AffineRow {  // of one picture
    const float *mean, *rstd;
    const T *weight, *bias;

    AffineRow(const Tables& tables, const void* weight, const void* bias, int64_t b, int64_t C)
        : mean(tables.mean_rstd + 2 * b * padded(C)),
          rstd(mean + padded(C)),
          weight(static_cast<const T*>(weight)),
          bias(static_cast<const T*>(bias)) {}

    template <class Extent>
    FLUXKERN_INLINE Affine<T> at(int64_t i, const Extent& part) const {
        return {load(mean + i), load(rstd + i), load(weight + i, part), load(bias + i, part)};
    }
};

template <class T>
void forward_rows(const Images& x, const void* weight, const void* bias, const Images& out,
                  const ImageSizes& sizes, float eps, float* scratch, const Context& context) {
    const bool streaming = streams_images<T>(sizes, out);
    const Tables tables(scratch, sizes);
    statistics_tables<T>(context, x, sizes, eps, tables);
    const auto body = [&](int64_t b, int64_t, int64_t p, int64_t end) {
        const AffineRow<T> affine(tables, weight, bias, b, sizes.C);
        for (; p < end; ++p) {
            const T* row = row_of<const T>(x, b, p, sizes);
            const Out<T> out_row = {row_of<T>(out, b, p, sizes), streaming};
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec z = affine.at(i, part).z(load(row + i, part));
                out_row.store(i, silu(z, T{}), part);
            });
        }
    };
    each_block_of_rows(context, sizes, pixels_of_a_partial(sizes), body);
}

// sums [B, 2, padded(C)] of dz n and dz over the pixels
template <class T>
void sum_gradients(const Context& context, const Images& dy, const Images& x, const void* weight,
                   const void* bias, const ImageSizes& sizes, const Tables& tables) {
    const int64_t C = padded(sizes.C), pixels = pixels_of_a_partial(sizes);
    const int64_t partials = blocks_of(sizes, pixels);
    const auto body = [&](int64_t b, int64_t at, int64_t p, int64_t end) {
        const AffineRow<T> affine(tables, weight, bias, b, sizes.C);
        float *dz_n = tables.partials + (b * partials + at) * 2 * C, *dz_sum = dz_n + C;
        __builtin_memset(dz_n, 0, 2 * C * sizeof(float));
        for (; p < end; ++p) {
            const T* row = row_of<const T>(x, b, p, sizes);
            const T* dy_row = row_of<const T>(dy, b, p, sizes);
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Affine<T> here = affine.at(i, part);
                const Vec v = load(row + i, part), dz = here.dz(load(dy_row + i, part), v);
                store(dz_n + i, load(dz_n + i) + dz * here.n(v));
                store(dz_sum + i, load(dz_sum + i) + dz);
            });
        }
    };
    each_block_of_rows(context, sizes, pixels, body);
    for (int64_t b = 0; b < sizes.B; ++b) {
        for (int64_t i = 0; i < 2 * C; i += WIDTH) {
            Vec sum = {};
            for (int64_t at = 0; at < partials; ++at) {
                sum = sum + load(tables.partials + (b * partials + at) * 2 * C + i);
            }
            store(tables.sums + 2 * b * C + i, sum);
        }
    }
}

// means [B, 2, padded(C)] of dn n and dn over the group of a channel
template <class T>
void mean_gradients(const void* weight, const ImageSizes& sizes, const Tables& tables) {
    const int64_t channels = sizes.C / sizes.groups, C = padded(sizes.C);
    const Buffer weighted(sizes.C), naturally(sizes.C);
    for (int64_t row = 0; row < 2 * sizes.B; ++row) {
        const float* sums = tables.sums + row * C;
        float* means = tables.means + row * C;
        each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
            const Vec w = load(static_cast<const T*>(weight) + i, part);
            store(weighted.data + i, load(sums + i) * w);
        });
        for (int64_t g = 0; g < sizes.groups; ++g) {
            const double sum = sum_of_group<T>(weighted.data, g, channels, naturally.data);
            for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
                means[c] = float(sum / double(channels * sizes.P));
            }
        }
        reorder<T>(means, sizes.C);
    }
}

template <class T>
void backward_rows(const Images& dy, const Images& x, const void* weight, const void* bias,
                   const Images& dx, void* dweight, void* dbias, const ImageSizes& sizes, float eps,
                   float* scratch, const Context& context) {
    const bool streaming = streams_images<T>(sizes, dx);
    const Tables tables(scratch, sizes);
    statistics_tables<T>(context, x, sizes, eps, tables);
    sum_gradients<T>(context, dy, x, weight, bias, sizes, tables);
    mean_gradients<T>(weight, sizes, tables);
    add_batch<T>(tables.sums, dweight, dbias, sizes, false);
    const int64_t C = padded(sizes.C);
    const auto body = [&](int64_t b, int64_t, int64_t p, int64_t end) {
        const AffineRow<T> affine(tables, weight, bias, b, sizes.C);
        const float *dn_n = tables.means + 2 * b * C, *dn = dn_n + C;
        for (; p < end; ++p) {
            const T* row = row_of<const T>(x, b, p, sizes);
            const T* dy_row = row_of<const T>(dy, b, p, sizes);
            const Out<T> out = {row_of<T>(dx, b, p, sizes), streaming};
            each_vec<T>(sizes.C, [&](int64_t i, int, auto part) {
                const Vec g = load(dy_row + i, part), v = load(row + i, part);
                out.store(i, affine.at(i, part).dx(g, v, load(dn + i), load(dn_n + i)), part);
            });
        }
    };
    each_block_of_rows(context, sizes, pixels_of_a_partial(sizes), body);
}

}  // namespace

void group_norm_silu(DType dtype, Images x, const void* weight, const void* bias, Images out,
                     const ImageSizes& sizes, float eps, float* scratch, const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        if (sizes.channels_last) {
            return forward_rows<T>(x, weight, bias, out, sizes, eps, scratch, context);
        }
        forward_planes<T>(x, weight, bias, out, sizes, eps, context);
    });
}

void group_norm_silu_backward(DType dtype, Images dy, Images x, const void* weight,
                              const void* bias, Images dx, void* dweight, void* dbias,
                              const ImageSizes& sizes, float eps, float* scratch,
                              const Context& context) {
    with_dtype(dtype, [&]<class T>(T) {
        if (sizes.channels_last) {
            return backward_rows<T>(dy, x, weight, bias, dx, dweight, dbias, sizes, eps, scratch,
                                    context);
        }
        backward_planes<T>(dy, x, weight, bias, dx, dweight, dbias, sizes, eps, scratch, context);
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
