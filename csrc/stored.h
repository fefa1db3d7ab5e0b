// Weights as files hold them: rows of codes with scales; without torch.
#pragma once

#include <cstdint>

namespace fluxkern {

// codes8 and codes4 are indices into a table, of 4 bits the high half of a byte first; the others
// are blocks of ggml, a row a whole number of them.
enum class Encoding {
    f32, f16, bf16, codes8, codes4, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k
};

struct StoredRows {  // [N, K]
    Encoding encoding;
    const uint8_t* data;
    int64_t stride;          // bytes from row to row
    const float* table;      // what each code stands for: 256 or 16
    const float* scale;      // scale[row * scale_stride + column / group]; none: 1
    int64_t scale_stride, group;
    int64_t rotation;        // columns that ConvRot has turned together, a power of 4; 0: none
    int64_t N, K;
};

}  // namespace fluxkern
