// The private torch op that reads weights as files hold them. `kernels` declares dequantise and
// requantise_int8.
#pragma once

#include "bindings.h"
#include "matrices.h"
#include "stored.h"

namespace fluxkern::bindings {
namespace {

struct Format {
    const char* name;
    Encoding encoding;
    int64_t size, bytes;  // elements of a block and its bytes
    int64_t codes;        // entries of the table
};

constexpr Format FORMATS[] = {
    {"f32", Encoding::f32, 1, 4, 0},          {"f16", Encoding::f16, 1, 2, 0},
    {"bf16", Encoding::bf16, 1, 2, 0},        {"codes8", Encoding::codes8, 1, 1, 256},
    {"codes4", Encoding::codes4, 2, 1, 16},   {"q4_0", Encoding::q4_0, 32, 18, 0},
    {"q4_1", Encoding::q4_1, 32, 20, 0},      {"q5_0", Encoding::q5_0, 32, 22, 0},
    {"q5_1", Encoding::q5_1, 32, 24, 0},      {"q8_0", Encoding::q8_0, 32, 34, 0},
    {"q2_k", Encoding::q2_k, 256, 84, 0},     {"q3_k", Encoding::q3_k, 256, 110, 0},
    {"q4_k", Encoding::q4_k, 256, 144, 0},    {"q5_k", Encoding::q5_k, 256, 176, 0},
    {"q6_k", Encoding::q6_k, 256, 210, 0},
};

const Format& format_of(const std::string& name) {
    for (const Format& format : FORMATS) {
        if (name == format.name) return format;
    }
    STD_TORCH_CHECK(false, "encoding must be one of those of stored.h, got ", name);
    return FORMATS[0];
}

const float* floats(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.is_cpu(), name,
                    " must be contiguous float32 on the CPU");
    return static_cast<const float*>(t.data_ptr());
}

void add_scale(StoredRows& rows, const Tensor& scale) {
    rows.scale = floats("scale", scale);
    STD_TORCH_CHECK(scale.dim() == 2 && (scale.size(0) == rows.N || scale.size(0) == 1) &&
                        scale.size(1) >= 1 && rows.K % scale.size(1) == 0,
                    "scale must be [N, groups] or [1, groups] with groups that divide K");
    rows.scale_stride = scale.size(0) == 1 ? 0 : scale.size(1);
    rows.group = rows.K / scale.size(1);
}

StoredRows stored_rows(const Format& format, const Tensor& stored, const Tensor& out) {
    const int64_t N = out.size(0), K = out.size(1);
    STD_TORCH_CHECK(stored.scalar_type() == ScalarType::Byte && stored.is_cpu() &&
                        stored.dim() == 2 && stored.size(0) == N && K % format.size == 0 &&
                        stored.size(1) == K / format.size * format.bytes &&
                        (stored.size(1) <= 1 || stored.stride(1) == 1),
                    "stored must be uint8 [N, bytes of K], contiguous on its last axis");
    return {format.encoding, static_cast<const uint8_t*>(stored.data_ptr()), stored.stride(0),
            nullptr, nullptr, 0, K, 0, N, K};
}

void dequantise(std::string encoding, const Tensor& stored, std::optional<Tensor> table,
                std::optional<Tensor> scale, int64_t rotation, const Tensor& out,
                const Tensor& largest) {
    const Format& format = format_of(encoding);
    STD_TORCH_CHECK(out.dim() == 2 && out.is_cpu() && (out.size(1) <= 1 || out.stride(1) == 1),
                    "out must be [N, K] on the CPU, contiguous on its last axis");
    StoredRows rows = stored_rows(format, stored, out);
    STD_TORCH_CHECK(table.has_value() == (format.codes > 0) &&
                        (!table || table->numel() == format.codes),
                    "table must hold ", format.codes, " numbers");
    if (table) rows.table = floats("table", *table);
    if (scale) add_scale(rows, *scale);
    STD_TORCH_CHECK(is_rotation(rotation, rows.K), "rotation must be 0 or a power of 4 that divides K, got ", rotation);
    rows.rotation = rotation;
    STD_TORCH_CHECK(largest.dim() == 1 && largest.size(0) == rows.N, "largest must be [N]");
    float* const found = const_cast<float*>(floats("largest", largest));
    if (rows.N == 0 || rows.K == 0) return;
    const Rows to = {out.data_ptr(), out.stride(0)};
    run(out, [&](const kernels::Context& context) {
        if (out.scalar_type() == ScalarType::Char) {
            kernels::requantise_int8(rows, to, found, context);
        } else {
            kernels::dequantise(dtype_of(out), rows, to, found, context);
        }
    });
}

const Op STORED_OPS[] = {
    {"dequantise",
     "str encoding, Tensor stored, Tensor? table, Tensor? scale, int rotation, Tensor(a!) out, "
     "Tensor(b!) largest",
     TORCH_BOX(&dequantise)},
};

}  // namespace
}  // namespace fluxkern::bindings
