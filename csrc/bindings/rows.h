// Tensors of one shape [..., C] as rows [B, L, C] of two strides.
#pragma once

#include <array>
#include <vector>

#include "common.h"

namespace fluxkern::bindings {
namespace {

template <size_t N>
struct Axis {
    int64_t size = 1;
    std::array<int64_t, N> strides = {};
};

// The axes before the last from the inner one on, at least two; those that lie behind each other in
// every tensor are one.
template <size_t N>
std::vector<Axis<N>> axes_of(const std::array<const View*, N>& all) {
    std::vector<Axis<N>> axes;
    for (int64_t d = all[0]->dim() - 2; d >= 0; --d) {
        Axis<N> axis = {all[0]->sizes[d], {}};
        if (axis.size == 1) continue;
        bool behind = !axes.empty();
        for (size_t i = 0; i < N; ++i) {
            axis.strides[i] = all[i]->strides[d];
            behind = behind && axis.strides[i] == axes.back().strides[i] * axes.back().size;
        }
        if (behind) axes.back().size *= axis.size;
        if (!behind) axes.push_back(axis);
    }
    while (axes.size() < 2) axes.push_back({});
    return axes;
}

// Calls body(Tokens (&)[N], Sizes, rows before) until all rows are done: the two innermost axes at
// a time, so once but for tensors that lie across each other.
template <size_t N, class Body>
void each_rows(const std::array<const View*, N>& all, const Body& body) {
    if (all[0]->numel == 0) return;
    const auto axes = axes_of(all);
    const Sizes sizes = {axes[1].size, axes[0].size, all[0]->sizes.back(), 0};
    int64_t calls = 1;
    for (size_t a = 2; a < axes.size(); ++a) calls *= axes[a].size;
    for (int64_t call = 0; call < calls; ++call) {
        Tokens tokens[N];
        for (size_t i = 0; i < N; ++i) {
            int64_t offset = 0, rest = call;
            for (size_t a = 2; a < axes.size(); rest /= axes[a++].size) {
                offset += rest % axes[a].size * axes[a].strides[i];
            }
            tokens[i] = {static_cast<char*>(all[i]->data) + offset * all[i]->element,
                         axes[1].strides[i], axes[0].strides[i]};
        }
        body(tokens, sizes, call * sizes.B * sizes.L);
    }
}

}  // namespace
}  // namespace fluxkern::bindings
