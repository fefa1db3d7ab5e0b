// Sizes of a product of matrices, as views.h; without torch.
#pragma once

#include "views.h"

namespace fluxkern {

struct MatrixSizes {
    int64_t S, B, N, K;  // S * B rows of K take a weight [N, K]
};

}  // namespace fluxkern
