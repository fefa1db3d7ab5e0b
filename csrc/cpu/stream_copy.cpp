// target = source with stores past the caches: the ceiling that benchmarks measure.
// Parallel: over blocks of 64 bytes.
// Bytes: 2 x bytes.
// Accumulation: none.
// Limits: source and target aligned to 64 bytes, bytes a multiple of 64.
#include "vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void stream_copy(const void* source, void* target, int64_t bytes, const Context& context) {
    constexpr int64_t FLOATS = 16;
    parallel(context, bytes / 64, 4096, [&](int64_t begin, int64_t end) {
        const float* from = static_cast<const float*>(source);
        const Out<float> to = {static_cast<float*>(target), true};
        for (int64_t i = begin * FLOATS; i < end * FLOATS; i += WIDTH) {
            to.store(i, load(from + i, Whole{}), Whole{});
        }
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
