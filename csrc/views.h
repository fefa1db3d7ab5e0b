// Tensors as every kernel takes them: pointers, sizes and strides in elements, without torch.
#pragma once

#include <cstdint>

namespace fluxkern {

enum class DType { f32, bf16, f16 };

struct Tokens {  // [B, L, C], last axis contiguous
    void* data;
    int64_t stride_b, stride_l;
};

struct Rows {  // [B, C], last axis contiguous
    void* data;
    int64_t stride_b;
};

struct Sizes {
    int64_t B, L, C;
    int64_t txt_len;  // the first tokens, which take the text vectors
};

}  // namespace fluxkern
