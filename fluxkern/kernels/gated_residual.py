"""x + gate * y; text and image rows in one launch.

Grid: a row a program; backward 18 rows a program, then sums of partials over their programs.
Moves two reads and a write of [B, L, C], forward and backward (dx is dx_new itself).
fp32 in registers, one rounding; sums in a fixed order.
C <= 12288; 128-bit accesses where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._rows import (
    load_row,
    mul,
    mul_add,
    rows_of_program,
    store_row,
    stream_vector,
    unsupported,
    zero_row,
)

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def gated_residual_kernel(
    x_ptr,
    y_ptr,
    txt_gate_ptr,
    img_gate_ptr,
    x_new_ptr,
    x_stride_b,
    x_stride_l,
    y_stride_b,
    y_stride_l,
    txt_gate_stride_b,
    img_gate_stride_b,
    txt_len,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    gate_ptr = stream_vector(
        row < txt_len, b, txt_gate_ptr, txt_gate_stride_b, img_gate_ptr, img_gate_stride_b
    )
    x = load_row(x_ptr + b * x_stride_b + row * x_stride_l, C, BLOCK_C)
    y = load_row(y_ptr + b * y_stride_b + row * y_stride_l, C, BLOCK_C)
    x_new = mul_add(load_row(gate_ptr, C, BLOCK_C), y, x)
    store_row(x_new_ptr + (b * tl.num_programs(0) + row) * C, x_new, C, BLOCK_C)


@triton.jit(do_not_specialize=("L", "txt_len"))
def gated_residual_backward_kernel(
    dx_new_ptr,
    y_ptr,
    txt_gate_ptr,
    img_gate_ptr,
    dy_ptr,
    partials_ptr,
    dx_new_stride_b,
    dx_new_stride_l,
    y_stride_b,
    y_stride_l,
    txt_gate_stride_b,
    img_gate_stride_b,
    L,
    txt_len,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first, rows, is_txt = rows_of_program(L, txt_len, ROWS)
    b = tl.program_id(1).to(tl.int64)
    gate_ptr = stream_vector(
        is_txt, b, txt_gate_ptr, txt_gate_stride_b, img_gate_ptr, img_gate_stride_b
    )
    gate, dgate = load_row(gate_ptr, C, BLOCK_C), zero_row(C, BLOCK_C)
    for i in range(rows):
        row = first + i
        dx_new = load_row(dx_new_ptr + b * dx_new_stride_b + row * dx_new_stride_l, C, BLOCK_C)
        y = load_row(y_ptr + b * y_stride_b + row * y_stride_l, C, BLOCK_C)
        store_row(dy_ptr + (b * L + row) * C, mul(gate, dx_new), C, BLOCK_C)
        dgate = mul_add(dx_new, y, dgate)
    partial = b * tl.num_programs(0) + tl.program_id(0)
    store_row(partials_ptr + partial * C, dgate, C, BLOCK_C)


def joint_gated_residual(
    x: Tensor, y: Tensor, txt_gate: Tensor, img_gate: Tensor, txt_len: int, x_new: Tensor
) -> None:
    batch, length, hidden = x.shape
    gated_residual_kernel[(length, batch)](
        x,
        y,
        txt_gate,
        img_gate,
        x_new,
        *_rows.token_strides(x, y),
        *_rows.batch_strides(txt_gate, img_gate),
        txt_len,
        **_rows.row_config(hidden),
    )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, x_new: Tensor) -> None:
    joint_gated_residual(x, y, gate, gate, 0, x_new)


def joint_gated_residual_backward(
    dx_new: Tensor,
    y: Tensor,
    txt_gate: Tensor,
    img_gate: Tensor,
    txt_len: int,
    dy: Tensor,
    *dgates: Tensor,  # of the text, of the image
) -> None:
    batch, length, hidden = y.shape
    partials, txt_parts = _rows.new_partials(y, txt_len, 1)
    gated_residual_backward_kernel[(partials.shape[1], batch)](
        dx_new,
        y,
        txt_gate,
        img_gate,
        dy,
        partials,
        *_rows.token_strides(dx_new, y),
        *_rows.batch_strides(txt_gate, img_gate),
        length,
        txt_len,
        ROWS=_rows.ROWS,
        **_rows.row_config(hidden),
    )
    _rows.sum_partials(partials, txt_parts, dgates)


def gated_residual_backward(
    dx_new: Tensor, y: Tensor, gate: Tensor, dy: Tensor, dgate: Tensor
) -> None:
    joint_gated_residual_backward(dx_new, y, gate, gate, 0, dy, dgate)
