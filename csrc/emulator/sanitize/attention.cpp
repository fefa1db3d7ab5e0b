// Beside what buffers.h asks for, results are compared with sums in double.
#include "attention.h"

#include "../../cuda/qk_norm_rope.cu"

using namespace fluxkern;
using namespace fluxkern::sanitize;

const AttentionShape SHAPES[] = {
    {1, 130, 70, 1, 64, 8, 0, false}, {1, 3, 130, 1, 128, 0, 0, false},
    {2, 5, 5, 2, 40, 8, 0, true},     {1, 3, 3, 1, 128, 0, 0, true},
    {1, 33, 40, 2, 10, 3, 1, false},  {1, 3, 3, 1, 64, 3, 1, true},
    {1, 2, 35, 1, 136, 0, 0, false},  {1, 3, 0, 1, 64, 0, 0, false},
    {0, 3, 3, 1, 64, 0, 0, true},     {1, 0, 3, 1, 64, 0, 0, false},
};
const cuda::Context CONTEXTS[] = {{nullptr, 3, 100 << 10}, {nullptr, 3, 164 << 10}};

int main() {
    over_dtypes([](DType dtype) {
        for (const AttentionShape& shape : SHAPES) {
            for (const cuda::Context& context : CONTEXTS) {
                AttentionCall{shape, dtype, cuda::attention}.run(context);
            }
        }
    });
}
