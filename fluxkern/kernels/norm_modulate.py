"""LayerNorm without weights, times 1 + scale, plus shift; text and image rows in one launch.

Grid: a row a program; backward 18 rows a program, then sums of partials over their programs.
Moves a read and a write of [B, L, C]; backward two reads and a write.
fp32 in registers, statistics in two passes, one rounding; sums in a fixed order.
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
    mul_add,
    normalize,
    normalize_backward,
    rows_of_part,
    store_row,
    stream_of,
    unsupported,
    zero_row,
)

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def norm_modulate_kernel(x, scale, shift, h, txt_len, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, _ = normalize(load_row(x, b, row, C, BLOCK_C), eps, C, BLOCK_C)
    stream = stream_of(row, txt_len)
    scale, shift = load_row(scale, b, stream, C, BLOCK_C), load_row(shift, b, stream, C, BLOCK_C)
    store_row(h, b, row, modulate(n, scale, shift), C, BLOCK_C)


@triton.jit(do_not_specialize=("L", "txt_len"))
def norm_modulate_backward_kernel(
    dh,
    x,
    scale,
    dx,
    partials,  # [B, runs of rows x 2, C]: dscale, dshift
    L,
    txt_len,
    eps,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, rows, stream = rows_of_part(part, L, txt_len, ROWS)
    dscale, dshift = zero_row(C, BLOCK_C), zero_row(C, BLOCK_C)
    for i in range(rows):
        row = first + i
        n, rstd = normalize(load_row(x, b, row, C, BLOCK_C), eps, C, BLOCK_C)
        dh_row = load_row(dh, b, row, C, BLOCK_C)
        dscale, dshift = mul_add(dh_row, n, dscale), add(dshift, dh_row)
        dx_row = normalize_backward(dh_row, n, rstd, load_row(scale, b, stream, C, BLOCK_C), C)
        store_row(dx, b, row, dx_row, C, BLOCK_C)
    store_row(partials, b, part * 2, dscale, C, BLOCK_C)
    store_row(partials, b, part * 2 + 1, dshift, C, BLOCK_C)


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, txt_len: int, eps: float, h: Tensor
) -> None:
    launch_rows(norm_modulate_kernel, (x, scale, shift, h), txt_len, eps)


def norm_modulate_backward(
    dh: Tensor,
    x: Tensor,
    scale: Tensor,
    txt_len: int,
    eps: float,
    dx: Tensor,
    *dvectors: Tensor,  # dscale, dshift
) -> None:
    launch_row_sums(norm_modulate_backward_kernel, (dh, x, scale, dx), dvectors, txt_len, eps)
