// As attention.cpp; tiles of keys to go round the stages twice, tails of rows, keys and columns.
#include "../../cuda/qk_norm_rope.cu"
#include "attention.h"

using namespace fluxkern;
using namespace fluxkern::sanitize;

const AttentionShape SHAPES[] = {
    {1, 130, 600, 1, 128, 8, 0, false}, {1, 3, 1100, 1, 64, 0, 0, false},
    {2, 66, 129, 2, 72, 16, 8, false},  {1, 70, 70, 2, 128, 0, 0, true},
    {2, 5, 3, 1, 24, 8, 0, false},      {0, 3, 3, 1, 64, 0, 0, false},
    {1, 0, 3, 1, 64, 0, 0, false},
};

int main() {
    for (const DType dtype : {DType::bf16, DType::f16}) {
#ifdef __SANITIZE_THREAD__  // threads do the same in both
        if (dtype == DType::f16) continue;
#endif
        for (const AttentionShape& shape : SHAPES) {
            AttentionCall{shape, dtype, cuda::attention_wgmma}.run(CONTEXT);
        }
    }
}
