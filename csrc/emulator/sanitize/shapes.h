// Sizes for the ops over [B, L, C]: vectors of one and two a thread, odd and misaligned rows, rows
// too wide to keep, streams without rows, no rows at all.
#pragma once

#include "buffers.h"

namespace fluxkern::sanitize {

const Shape SHAPES[] = {
    {2, 7, 64, 3, 8, 0},  {2, 5, 37, 2, 5, 0},   {1, 3, 1, 1, 2, 1},  {1, 4, 72, 0, 8, 1},
    {2, 3, 40, 3, 16, 0}, {1, 2, 3080, 1, 8, 0}, {1, 2, 6200, 1, 1, 0}, {0, 3, 16, 1, 0, 0},
    {2, 0, 16, 0, 0, 0},
};

template <class Run>
void over_shapes(Run run) {
    over_dtypes([&](DType dtype) {
        for (const Shape& shape : SHAPES) run(dtype, shape);
    });
}

}  // namespace fluxkern::sanitize
