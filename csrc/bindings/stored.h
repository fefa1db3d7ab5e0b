// Weights as files hold them, read to numbers or to int8.
#pragma once

#include <optional>

#include "../matrices.h"
#include "../stored.h"
#include "backend.h"
#include "common.h"

namespace fluxkern::bindings {
namespace {

struct Format {
    const char* name;
    Encoding encoding;
    int64_t size, bytes;  // elements of a block and its bytes
    int64_t codes;        // entries of the table
};

constexpr Format FORMATS[] = {
    {"f32", Encoding::f32, 1, 4, 0},        {"f16", Encoding::f16, 1, 2, 0},
    {"bf16", Encoding::bf16, 1, 2, 0},      {"codes8", Encoding::codes8, 1, 1, 256},
    {"codes4", Encoding::codes4, 2, 1, 16}, {"q4_0", Encoding::q4_0, 32, 18, 0},
    {"q4_1", Encoding::q4_1, 32, 20, 0},    {"q5_0", Encoding::q5_0, 32, 22, 0},
    {"q5_1", Encoding::q5_1, 32, 24, 0},    {"q8_0", Encoding::q8_0, 32, 34, 0},
    {"q2_k", Encoding::q2_k, 256, 84, 0},   {"q3_k", Encoding::q3_k, 256, 110, 0},
    {"q4_k", Encoding::q4_k, 256, 144, 0},  {"q5_k", Encoding::q5_k, 256, 176, 0},
    {"q6_k", Encoding::q6_k, 256, 210, 0},
};

const Format& format_of(const std::string& name) {
    for (const Format& format : FORMATS) {
        if (name == format.name) return format;
    }
    STD_TORCH_CHECK(false, "encoding must be one of those of stored.h, got ", name);
    return FORMATS[0];
}

float* floats(const View& v, const View& out) {
    v.is(ScalarType::Float).beside(out).contiguous();
    return static_cast<float*>(v.data);
}

void add_scale(StoredRows& rows, const View& scale, const View& out) {
    rows.scale = floats(scale, out);
    STD_TORCH_CHECK(scale.dim() == 2 && (scale.sizes[0] == rows.N || scale.sizes[0] == 1) &&
                        scale.sizes[1] >= 1 && rows.K % scale.sizes[1] == 0,
                    "scale must be [N, groups] or [1, groups] with groups that divide K, got ",
                    text_of(scale.sizes));
    rows.scale_stride = scale.sizes[0] == 1 ? 0 : scale.sizes[1];
    rows.group = rows.K / scale.sizes[1];
}

StoredRows stored_rows(const Format& format, const View& stored, const View& out) {
    const int64_t N = out.sizes[0], K = out.sizes[1];
    STD_TORCH_CHECK(K % format.size == 0, "out must have whole blocks of ", format.size,
                    " columns, got ", K);
    stored.is(ScalarType::Byte).beside(out).has({N, K / format.size * format.bytes}).rows();
    return {format.encoding,
            static_cast<const uint8_t*>(stored.data),
            stored.strides[0],
            nullptr,
            nullptr,
            0,
            K,
            0,
            N,
            K};
}

void dequantise(std::string encoding, const Tensor& stored, std::optional<Tensor> table,
                std::optional<Tensor> scale, int64_t rotation, const Tensor& out,
                const Tensor& largest) {
    const Format& format = format_of(encoding);
    const View to = output("out", out), most = output("largest", largest);
    STD_TORCH_CHECK(to.rows().dim() == 2, "out must be [N, K], got ", text_of(to.sizes));
    StoredRows rows = stored_rows(format, {"stored", stored}, to);
    STD_TORCH_CHECK(table.has_value() == (format.codes > 0), "table must be given for codes alone");
    if (table) rows.table = floats(View("table", *table).has({format.codes}), to);
    if (scale) add_scale(rows, {"scale", *scale}, to);
    STD_TORCH_CHECK(is_rotation(rotation, rows.K),
                    "rotation must be 0 or a power of 4 that divides K, got ", rotation);
    rows.rotation = rotation;
    float* const found = floats(most.has({rows.N}), to);
    const bool to_int8 = to.dtype == ScalarType::Char;
    const DType dtype = to_int8 ? DType::f32 : dtype_of(to);
    if (to.numel == 0) return;
    run(out, [&](const kernels::Context& context) {
        if (to_int8) {
            kernels::requantise_int8(rows, Rows{to.data, to.strides[0]}, found, context);
        } else {
            kernels::dequantise(dtype, rows, Rows{to.data, to.strides[0]}, found, context);
        }
    });
}

const Op STORED[] = {{"dequantise", TORCH_BOX(&dequantise)}};

}  // namespace
}  // namespace fluxkern::bindings
