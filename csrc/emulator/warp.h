// What csrc/cuda/mma.cuh finds instead of the instructions of a GPU: a warp's lanes meet, see what
// each of them brought, and each works out its own part.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

namespace fluxkern::emulator {

// What every lane brought; valid until the warp meets again.
template <class T>
struct Gathered {
    const T& operator[](int lane) const {
        return *static_cast<const T*>(brought(lane));
    }
};

template <class T>
Gathered<T> gather(const T& mine, Site site) {
    static_assert(sizeof(T) <= sizeof(uint64_t[WORDS]));
    uint64_t words[WORDS] = {};
    std::memcpy(words, &mine, sizeof(T));
    meet(words, site);
    return {};
}

inline bool any_lane(bool v, Site site = Site::here()) {
    const auto votes = gather(v, site);
    bool any = false;
    for (int l = 0; l < WARP; ++l) any |= votes[l];
    return any;
}

inline uint16_t element(const void* row, int i) {
    uint16_t bits;
    std::memcpy(&bits, static_cast<const char*>(row) + 2 * i, sizeof(bits));
    return bits;
}

inline uint32_t pair(uint16_t low, uint16_t high) {
    return low | uint32_t(high) << 16;
}

inline void load_matrices(uint32_t (&out)[4], const void* row, Site site = Site::here()) {
    const auto rows = gather(row, site);
    const int g = lane() / 4, t = lane() % 4;
    for (int m = 0; m < 4; ++m) {
        const void* const from = rows[8 * m + g];
        out[m] = pair(element(from, 2 * t), element(from, 2 * t + 1));
    }
}

inline void load_transposed(uint32_t (&out)[4], const void* row, Site site = Site::here()) {
    const auto rows = gather(row, site);
    const int g = lane() / 4, t = lane() % 4;
    for (int m = 0; m < 4; ++m) {
        out[m] = pair(element(rows[8 * m + 2 * t], g), element(rows[8 * m + 2 * t + 1], g));
    }
}

struct Operands {
    uint32_t a[4], b[2];
};

// `widen` makes two floats, x and y, of a register.
template <class Widen>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen,
                  Site site = Site::here()) {
    const auto all = gather(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, site);
    const int g = lane() / 4, t = lane() % 4;
    for (int half = 0; half < 2; ++half) {  // of the 16 that a sum is over
        for (int i = 0; i < 4; ++i) {
            for (int row = 0; row < 2; ++row) {
                const auto x = widen(all[4 * g + i].a[2 * half + row]);
                for (int column = 0; column < 2; ++column) {
                    const auto y = widen(all[4 * (2 * t + column) + i].b[half]);
                    c[2 * row + column] += x.x * y.x + x.y * y.y;
                }
            }
        }
    }
}

}  // namespace fluxkern::emulator
