"""`gated_residual` and `norm_modulate` in one pass; text and image rows in one launch.

Grid: a row a program; backward 18 rows a program, then sums of partials over their programs.
Moves two reads and two writes of [B, L, C]; backward four reads and two writes.
fp32 in registers; x_new is rounded before its statistics in two passes; sums in a fixed order.
C <= 12288; 128-bit accesses where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._rows import (
    add,
    load_row,
    modulate,
    mul,
    mul_add,
    normalize,
    normalize_backward,
    rounded,
    rows_of_program,
    store_row,
    stream_vector,
    unsupported,
    zero_row,
)

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def gated_residual_norm_modulate_kernel(
    x_ptr,
    y_ptr,
    txt_gate_ptr,
    txt_scale_ptr,
    txt_shift_ptr,
    img_gate_ptr,
    img_scale_ptr,
    img_shift_ptr,
    x_new_ptr,
    h_ptr,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    txt_gate_stride_b,
    txt_scale_stride_b,
    txt_shift_stride_b,
    img_gate_stride_b,
    img_scale_stride_b,
    img_shift_stride_b,
    txt_len,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_txt = row < txt_len
    gate_ptr = stream_vector(
        is_txt, b, txt_gate_ptr, txt_gate_stride_b, img_gate_ptr, img_gate_stride_b
    )
    x = load_row(x_ptr + b * x_stride_b + row * x_stride_l, C, BLOCK_C)
    y = load_row(y_ptr + b * y_stride_b + row * y_stride_l, C, BLOCK_C)
    x_new = mul_add(load_row(gate_ptr, C, BLOCK_C), y, x)
    x_new = rounded(x_new, x_new_ptr.dtype.element_ty)
    out = (b * tl.num_programs(0) + row) * C
    store_row(x_new_ptr + out, x_new, C, BLOCK_C)
    n, _ = normalize(x_new, eps, C, BLOCK_C)
    scale_ptr = stream_vector(
        is_txt, b, txt_scale_ptr, txt_scale_stride_b, img_scale_ptr, img_scale_stride_b
    )
    shift_ptr = stream_vector(
        is_txt, b, txt_shift_ptr, txt_shift_stride_b, img_shift_ptr, img_shift_stride_b
    )
    h = modulate(n, load_row(scale_ptr, C, BLOCK_C), load_row(shift_ptr, C, BLOCK_C))
    store_row(h_ptr + out, h, C, BLOCK_C)


@triton.jit(do_not_specialize=("L", "txt_len"))
def gated_residual_norm_modulate_backward_kernel(
    dx_new_ptr,
    dh_ptr,
    x_new_ptr,
    y_ptr,
    txt_gate_ptr,
    txt_scale_ptr,
    img_gate_ptr,
    img_scale_ptr,
    dx_ptr,
    dy_ptr,
    partials_ptr,
    dx_new_stride_b,
    dx_new_stride_l,
    dh_stride_b,
    dh_stride_l,
    x_new_stride_b,
    x_new_stride_l,
    y_stride_b,
    y_stride_l,
    txt_gate_stride_b,
    txt_scale_stride_b,
    img_gate_stride_b,
    img_scale_stride_b,
    L,
    txt_len,
    eps,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, rows, is_txt = rows_of_program(L, txt_len, ROWS)
    b = tl.program_id(1).to(tl.int64)
    gate_ptr = stream_vector(
        is_txt, b, txt_gate_ptr, txt_gate_stride_b, img_gate_ptr, img_gate_stride_b
    )
    scale_ptr = stream_vector(
        is_txt, b, txt_scale_ptr, txt_scale_stride_b, img_scale_ptr, img_scale_stride_b
    )
    dgate, dscale, dshift = zero_row(C, BLOCK_C), zero_row(C, BLOCK_C), zero_row(C, BLOCK_C)
    for i in range(rows):
        row = first + i
        x_new = load_row(x_new_ptr + b * x_new_stride_b + row * x_new_stride_l, C, BLOCK_C)
        dh = load_row(dh_ptr + b * dh_stride_b + row * dh_stride_l, C, BLOCK_C)
        n, rstd = normalize(x_new, eps, C, BLOCK_C)
        dscale, dshift = mul_add(dh, n, dscale), add(dshift, dh)
        dn = normalize_backward(dh, n, rstd, load_row(scale_ptr, C, BLOCK_C), C)
        dx_new = load_row(dx_new_ptr + b * dx_new_stride_b + row * dx_new_stride_l, C, BLOCK_C)
        dx = add(dx_new, dn)
        store_row(dx_ptr + (b * L + row) * C, dx, C, BLOCK_C)
        y = load_row(y_ptr + b * y_stride_b + row * y_stride_l, C, BLOCK_C)
        dgate = mul_add(dx, y, dgate)
        dy = mul(load_row(gate_ptr, C, BLOCK_C), dx)
        store_row(dy_ptr + (b * L + row) * C, dy, C, BLOCK_C)
    partial = (b * tl.num_programs(0) + tl.program_id(0)) * 3
    store_row(partials_ptr + partial * C, dgate, C, BLOCK_C)
    store_row(partials_ptr + (partial + 1) * C, dscale, C, BLOCK_C)
    store_row(partials_ptr + (partial + 2) * C, dshift, C, BLOCK_C)


def joint_gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    txt_gate: Tensor,
    txt_scale: Tensor,
    txt_shift: Tensor,
    img_gate: Tensor,
    img_scale: Tensor,
    img_shift: Tensor,
    txt_len: int,
    eps: float,
    x_new: Tensor,
    h: Tensor,
) -> None:
    batch, length, hidden = x.shape
    vectors = (txt_gate, txt_scale, txt_shift, img_gate, img_scale, img_shift)
    gated_residual_norm_modulate_kernel[(length, batch)](
        x,
        y,
        *vectors,
        x_new,
        h,
        *_rows.token_strides(x, y),
        *_rows.batch_strides(*vectors),
        txt_len,
        eps,
        **_rows.row_config(hidden),
    )


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    x_new: Tensor,
    h: Tensor,
) -> None:
    vectors = (gate, scale, shift)
    joint_gated_residual_norm_modulate(x, y, *vectors, *vectors, 0, eps, x_new, h)


def joint_gated_residual_norm_modulate_backward(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    txt_gate: Tensor,
    txt_scale: Tensor,
    img_gate: Tensor,
    img_scale: Tensor,
    txt_len: int,
    eps: float,
    dx: Tensor,
    dy: Tensor,
    *dvectors: Tensor,  # dgate, dscale, dshift of the text, then of the image
) -> None:
    batch, length, hidden = y.shape
    vectors = (txt_gate, txt_scale, img_gate, img_scale)
    partials, txt_parts = _rows.new_partials(y, txt_len, 3)
    gated_residual_norm_modulate_backward_kernel[(partials.shape[1], batch)](
        dx_new,
        dh,
        x_new,
        y,
        *vectors,
        dx,
        dy,
        partials,
        *_rows.token_strides(dx_new, dh, x_new, y),
        *_rows.batch_strides(*vectors),
        length,
        txt_len,
        eps,
        ROWS=_rows.ROWS,
        **_rows.row_config(hidden),
    )
    _rows.sum_partials(partials, txt_parts, dvectors)


def gated_residual_norm_modulate_backward(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    eps: float,
    dx: Tensor,
    dy: Tensor,
    dgate: Tensor,
    dscale: Tensor,
    dshift: Tensor,
) -> None:
    joint_gated_residual_norm_modulate_backward(
        dx_new, dh, x_new, y, gate, scale, gate, scale, 0, eps, dx, dy, dgate, dscale, dshift
    )
