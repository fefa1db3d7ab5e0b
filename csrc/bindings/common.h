// What stands between torch and a kernel: checks that leave nothing to doubt of what kernels.h
// takes for granted, and the table of a family's ops, whose schemas Python declares.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <span>
#include <string>

#include "../views.h"

namespace fluxkern::bindings {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::span<const int64_t>;

inline std::string text_of(Numbers numbers) {
    std::string text;
    for (const int64_t n : numbers) text += (text.empty() ? "" : ", ") + std::to_string(n);
    return "[" + text + "]";
}

template <class T>
T asked(AOTITorchError (*ask)(AtenTensorHandle, T*), const Tensor& t) {
    T answer;
    TORCH_ERROR_CODE_CHECK(ask(t.get(), &answer));
    return answer;
}

// A tensor, everything asked for once; all of it lies in its storage, which may have been freed.
struct View {
    const char* const name;
    void* const data;
    const Numbers sizes, strides;
    const ScalarType dtype;
    const int32_t device_type, device_index;
    const int64_t numel, element;  // bytes of one

    View(const char* name, const Tensor& t)
        : name(name),
          data(t.data_ptr()),
          sizes(t.sizes().data(), size_t(t.dim())),
          strides(t.strides().data(), size_t(t.dim())),
          dtype(t.scalar_type()),
          device_type(asked(aoti_torch_get_device_type, t)),
          device_index(t.get_device_index()),
          numel(t.numel()),
          element(int64_t(t.element_size())) {
        const int64_t end = (t.storage_offset() + extent()) * element;
        STD_TORCH_CHECK(numel == 0 || end <= asked(aoti_torch_get_storage_size, t), name,
                        " reaches beyond its storage, which was freed or resized");
    }

    int64_t dim() const {
        return int64_t(sizes.size());
    }
    int64_t extent() const {  // elements from the first to behind the last
        int64_t end = 1;
        for (size_t d = 0; d < sizes.size(); ++d) end += (sizes[d] - 1) * strides[d];
        return numel == 0 ? 0 : end;
    }

    const View& is(ScalarType type) const {
        STD_TORCH_CHECK(dtype == type, name, " must be ", torch::headeronly::toString(type),
                        ", got ", torch::headeronly::toString(dtype));
        return *this;
    }
    const View& beside(const View& x) const {
        STD_TORCH_CHECK(device_type == x.device_type && device_index == x.device_index, name,
                        " must be on the device of ", x.name);
        return *this;
    }
    const View& has(Numbers shape) const {
        bool same = sizes.size() == shape.size();
        for (size_t d = 0; same && d < shape.size(); ++d) same = sizes[d] == shape[d];
        STD_TORCH_CHECK(same, name, " must be ", text_of(shape), ", got ", text_of(sizes));
        return *this;
    }
    const View& has(std::initializer_list<int64_t> shape) const {
        return has(Numbers(shape.begin(), shape.size()));
    }
    const View& rows() const {  // without gaps
        STD_TORCH_CHECK(dim() >= 1 && (sizes.back() <= 1 || strides.back() == 1), name,
                        " must be contiguous on its last axis");
        return *this;
    }
    const View& contiguous() const {
        int64_t stride = 1;
        bool all = true;
        for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) {
            all &= sizes[d] == 1 || strides[d] == stride;
        }
        STD_TORCH_CHECK(all || numel == 0, name, " must be contiguous");
        return *this;
    }
    const View& like(const View& x) const {
        return is(x.dtype).beside(x).rows();
    }

    const View& apart_from(const View& x) const {  // as torch has it: interleaved views are trusted
        const auto begin = uint64_t(data), x_begin = uint64_t(x.data);
        const bool apart =
            begin + extent() * element <= x_begin || x_begin + x.extent() * x.element <= begin;
        const bool interleaved = extent() != numel || x.extent() != x.numel;
        STD_TORCH_CHECK(apart || (interleaved && begin != x_begin), name, " must not overlap ",
                        x.name);
        return *this;
    }
};

inline View output(const char* name, const Tensor& t) {
    const View v(name, t);
    bool apart = true;
    for (size_t d = 0; d < v.sizes.size(); ++d) apart &= v.sizes[d] <= 1 || v.strides[d] != 0;
    STD_TORCH_CHECK(apart || v.numel == 0, name, " must not overlap itself");
    return v;
}

// A vector of n elements like x.
inline void* vector_of(const View& v, int64_t n, const View& x) {
    v.like(x).has({n});
    return v.data;
}

inline DType dtype_of(const View& x) {
    STD_TORCH_CHECK(x.dtype == ScalarType::Float || x.dtype == ScalarType::BFloat16 ||
                        x.dtype == ScalarType::Half,
                    x.name, " must be float32, bfloat16 or float16, got ",
                    torch::headeronly::toString(x.dtype));
    if (x.dtype == ScalarType::Float) return DType::f32;
    return x.dtype == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

// fp32 memory beside x while it lives
struct Scratch {
    const Tensor memory;

    Scratch(const Tensor& x, int64_t count)
        : memory(torch::stable::new_empty(x, {count}, ScalarType::Float)) {}
    float* floats() const {
        return static_cast<float*>(memory.data_ptr());
    }
};

struct Op {
    const char* name;
    void (*run)(StableIValue*, uint64_t, uint64_t);
};

template <size_t... COUNTS>
void implement(torch::stable::detail::StableLibrary& library, const Op (&... families)[COUNTS]) {
    const auto implement_all = [&](const auto& ops) {
        for (const Op& op : ops) library.impl(op.name, op.run);
    };
    (implement_all(families), ...);
}

}  // namespace
}  // namespace fluxkern::bindings
