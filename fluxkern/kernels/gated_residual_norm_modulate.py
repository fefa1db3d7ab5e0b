"""`gated_residual` and `norm_modulate` in one pass; text and image rows in one launch.

Grid: a row a program; backward 18 rows a program, then sums of partials over their programs.
Moves two reads and two writes of [B, L, C]; backward four reads and two writes.
fp32 in registers; x_new is rounded before its statistics in two passes; sums in a fixed order.
C <= 12288; 128-bit accesses where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    add,
    launch_row_sums,
    launch_rows,
    load_row,
    modulate,
    mul,
    mul_add,
    normalize,
    normalize_backward,
    rounded,
    rows_of_part,
    store_row,
    stream_of,
    unsupported,
    zero_row,
)

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def gated_residual_norm_modulate_kernel(
    x, y, gate, scale, shift, x_new, h, txt_len, eps, C: tl.constexpr, BLOCK_C: tl.constexpr
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    stream = stream_of(row, txt_len)
    x_row, y_row = load_row(x, b, row, C, BLOCK_C), load_row(y, b, row, C, BLOCK_C)
    x_row = mul_add(load_row(gate, b, stream, C, BLOCK_C), y_row, x_row)
    x_row = rounded(x_row, x_new[0].dtype.element_ty)
    store_row(x_new, b, row, x_row, C, BLOCK_C)
    n, _ = normalize(x_row, eps, C, BLOCK_C)
    scale, shift = load_row(scale, b, stream, C, BLOCK_C), load_row(shift, b, stream, C, BLOCK_C)
    store_row(h, b, row, modulate(n, scale, shift), C, BLOCK_C)


@triton.jit(do_not_specialize=("L", "txt_len"))
def gated_residual_norm_modulate_backward_kernel(
    dx_new,
    dh,
    x_new,
    y,
    gate,
    scale,
    dx,
    dy,
    partials,  # [B, runs of rows x 3, C]: dgate, dscale, dshift
    L,
    txt_len,
    eps,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, rows, stream = rows_of_part(part, L, txt_len, ROWS)
    dgate, dscale, dshift = zero_row(C, BLOCK_C), zero_row(C, BLOCK_C), zero_row(C, BLOCK_C)
    for i in range(rows):
        row = first + i
        x_row, dh_row = load_row(x_new, b, row, C, BLOCK_C), load_row(dh, b, row, C, BLOCK_C)
        n, rstd = normalize(x_row, eps, C, BLOCK_C)
        dscale, dshift = mul_add(dh_row, n, dscale), add(dshift, dh_row)
        dn = normalize_backward(dh_row, n, rstd, load_row(scale, b, stream, C, BLOCK_C), C)
        dx_row = add(load_row(dx_new, b, row, C, BLOCK_C), dn)
        store_row(dx, b, row, dx_row, C, BLOCK_C)
        dgate = mul_add(dx_row, load_row(y, b, row, C, BLOCK_C), dgate)
        store_row(dy, b, row, mul(load_row(gate, b, stream, C, BLOCK_C), dx_row), C, BLOCK_C)
    store_row(partials, b, part * 3, dgate, C, BLOCK_C)
    store_row(partials, b, part * 3 + 1, dscale, C, BLOCK_C)
    store_row(partials, b, part * 3 + 2, dshift, C, BLOCK_C)


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    txt_len: int,
    eps: float,
    x_new: Tensor,
    h: Tensor,
) -> None:
    tensors = (x, y, gate, scale, shift, x_new, h)
    launch_rows(gated_residual_norm_modulate_kernel, tensors, txt_len, eps)


def gated_residual_norm_modulate_backward(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    txt_len: int,
    eps: float,
    dx: Tensor,
    dy: Tensor,
    *dvectors: Tensor,  # dgate, dscale, dshift
) -> None:
    tensors = (dx_new, dh, x_new, y, gate, scale, dx, dy)
    launch_row_sums(gated_residual_norm_modulate_backward_kernel, tensors, dvectors, txt_len, eps)
