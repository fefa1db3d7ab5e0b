// Views of queries, keys and values, and of the table of rotations; as views.h, without torch.
#pragma once

#include "views.h"

namespace fluxkern {

struct Heads {  // [B, L, H, D], last axis contiguous; no data: not asked for
    void* data;
    int64_t stride_b, stride_l, stride_h;
};

struct Angles {  // cos or sin, fp32 [L, D / 2]
    const float* data;
    int64_t stride_l, stride_d;
};

struct HeadSizes {
    int64_t B, L, H, D, txt_len;  // L tokens of both streams, the first txt_len of them text
};

struct AttentionSizes {
    int64_t B, L, M, H, D;  // L queries, M keys
};

}  // namespace fluxkern
