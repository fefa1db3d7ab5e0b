// What a kernel knows of its tensors: pointers, sizes and strides in elements; no torch.
#pragma once

#include <cstdint>

namespace fluxkern {

enum class DType { f32, bf16, f16 };

struct Tokens {  // [B, L, C], last axis contiguous
    void* data;
    int64_t stride_b, stride_l;
};

struct Rows {  // [B, C], last axis contiguous; no data: not asked for
    void* data;
    int64_t stride_b;
};

// [B, S, C], last axis contiguous: a row of text and one of image, or one of all with stride_s = 0.
struct Vectors {
    void* data;
    int64_t stride_b, stride_s;
};

struct Sizes {
    int64_t B, L, C, txt_len;  // the first txt_len tokens are text, 0 where all share their vectors
};

}  // namespace fluxkern
