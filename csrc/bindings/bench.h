// What benchmarks call beside the ops.
#pragma once

#include "../bench/stream_copy.h"
#include "backend.h"
#include "common.h"

namespace fluxkern::bindings {
namespace {

void stream_copy(const Tensor& source, const Tensor& target) {
    const View from("source", source), to = output("target", target);
    from.contiguous();
    to.is(from.dtype).beside(from).has(from.sizes).contiguous().apart_from(from);
    const int64_t bytes = from.numel * from.element;
    STD_TORCH_CHECK(bytes % 128 == 0, "source must be a multiple of 128 bytes, got ", bytes);
    const auto place = uint64_t(from.data) | uint64_t(to.data);
    STD_TORCH_CHECK(place % 64 == 0, "source and target must be aligned to 64 bytes");
    run(source, [&](const kernels::Context& context) {
        kernels::stream_copy(from.data, to.data, bytes, context);
    });
}

const Op BENCH[] = {{"_stream_copy", TORCH_BOX(&stream_copy)}};

}  // namespace
}  // namespace fluxkern::bindings
