// Views of pictures, as views.h; without torch.
#pragma once

#include "views.h"

namespace fluxkern {

struct Images {  // [B, C, P] of P pixels: planes (stride_p is 1) or channels-last (stride_c is 1)
    void* data;
    int64_t stride_b, stride_c, stride_p;
};

struct ImageSizes {
    int64_t B, C, P, groups;
    bool channels_last;
};

}  // namespace fluxkern
