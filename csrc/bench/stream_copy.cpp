// target = source with stores past the caches: the ceiling that benchmarks measure.
// Parallel: over blocks of 128 bytes.
// Bytes: 2 x bytes.
// Accumulation: none.
// Limits: source and target aligned to 64 bytes, bytes a multiple of 128.
#include "stream_copy.h"

#include "../cpu/vec.h"

namespace fluxkern::cpu::FLUXKERN_ISA {

void stream_copy(const void* source, void* target, int64_t bytes, const Context& context) {
    parallel(context, bytes / (4 * PAD), 2048, [&](int64_t begin, int64_t end) {
        const Out<float> out = {static_cast<float*>(target), true};
        for (int64_t i = begin * PAD; i < end * PAD; i += WIDTH) {
            out.store(i, load(static_cast<const float*>(source) + i), Whole{});
        }
    });
}

}  // namespace fluxkern::cpu::FLUXKERN_ISA
