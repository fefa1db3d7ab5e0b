// Sizes of a product of matrices, as views.h; without torch.
#pragma once

#include "views.h"

namespace fluxkern {

struct MatrixSizes {
    int64_t S, B, N, K;  // S * B rows of K take a weight [N, K]
};

// Whether ConvRot can turn groups of n columns of K.
inline bool is_rotation(int64_t n, int64_t K) {
    if (n == 0) return true;
    const int64_t given = n;
    while (n > 1 && n % 4 == 0) n /= 4;
    return n == 1 && K % given == 0;
}

}  // namespace fluxkern
