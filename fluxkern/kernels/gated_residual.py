"""x + gate * y; text and image rows in one launch.

Grid: a row a program; backward 18 rows a program, then sums of partials over their programs.
Moves two reads and a write of [B, L, C], forward and backward (dx is dx_new itself).
fp32 in registers, one rounding; sums in a fixed order.
C <= 12288; 128-bit accesses where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    launch_row_sums,
    launch_rows,
    load_row,
    mul,
    mul_add,
    rows_of_part,
    store_row,
    stream_of,
    unsupported,
    zero_row,
)

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def gated_residual_kernel(x, y, gate, x_new, txt_len, C: tl.constexpr, BLOCK_C: tl.constexpr):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    gate_row = load_row(gate, b, stream_of(row, txt_len), C, BLOCK_C)
    x_row, y_row = load_row(x, b, row, C, BLOCK_C), load_row(y, b, row, C, BLOCK_C)
    store_row(x_new, b, row, mul_add(gate_row, y_row, x_row), C, BLOCK_C)


@triton.jit(do_not_specialize=("L", "txt_len"))
def gated_residual_backward_kernel(
    dx_new,
    y,
    gate,
    dy,
    partials,  # [B, runs of rows, C]: dgate
    L,
    txt_len,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, rows, stream = rows_of_part(part, L, txt_len, ROWS)
    gate_row, dgate = load_row(gate, b, stream, C, BLOCK_C), zero_row(C, BLOCK_C)
    for i in range(rows):
        row = first + i
        dx_row = load_row(dx_new, b, row, C, BLOCK_C)
        y_row = load_row(y, b, row, C, BLOCK_C)
        store_row(dy, b, row, mul(gate_row, dx_row), C, BLOCK_C)
        dgate = mul_add(dx_row, y_row, dgate)
    store_row(partials, b, part, dgate, C, BLOCK_C)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, txt_len: int, x_new: Tensor) -> None:
    launch_rows(gated_residual_kernel, (x, y, gate, x_new), txt_len)


def gated_residual_backward(
    dx_new: Tensor, y: Tensor, gate: Tensor, txt_len: int, dy: Tensor, dgate: Tensor
) -> None:
    launch_row_sums(gated_residual_backward_kernel, (dx_new, y, gate, dy), (dgate,), txt_len)
