"""LayerNorm without weights, times 1 + scale, plus shift; text and image rows in one launch.

Grid: a row a program; backward 18 rows a program, then sums of partials over their programs.
Moves a read and a write of [B, L, C]; backward two reads and a write.
fp32 in registers, statistics in two passes, one rounding; sums in a fixed order.
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
    mul_add,
    normalize,
    normalize_backward,
    rows_of_program,
    store_row,
    stream_vector,
    unsupported,
    zero_row,
)

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def norm_modulate_kernel(
    x_ptr,
    txt_scale_ptr,
    txt_shift_ptr,
    img_scale_ptr,
    img_shift_ptr,
    h_ptr,
    x_stride_b,
    x_stride_l,
    txt_scale_stride_b,
    txt_shift_stride_b,
    img_scale_stride_b,
    img_shift_stride_b,
    txt_len,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x = load_row(x_ptr + b * x_stride_b + row * x_stride_l, C, BLOCK_C)
    n, _ = normalize(x, eps, C, BLOCK_C)
    is_txt = row < txt_len
    scale_ptr = stream_vector(
        is_txt, b, txt_scale_ptr, txt_scale_stride_b, img_scale_ptr, img_scale_stride_b
    )
    shift_ptr = stream_vector(
        is_txt, b, txt_shift_ptr, txt_shift_stride_b, img_shift_ptr, img_shift_stride_b
    )
    h = modulate(n, load_row(scale_ptr, C, BLOCK_C), load_row(shift_ptr, C, BLOCK_C))
    store_row(h_ptr + (b * tl.num_programs(0) + row) * C, h, C, BLOCK_C)


@triton.jit(do_not_specialize=("L", "txt_len"))
def norm_modulate_backward_kernel(
    dh_ptr,
    x_ptr,
    txt_scale_ptr,
    img_scale_ptr,
    dx_ptr,
    partials_ptr,
    dh_stride_b,
    dh_stride_l,
    x_stride_b,
    x_stride_l,
    txt_scale_stride_b,
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
    scale_ptr = stream_vector(
        is_txt, b, txt_scale_ptr, txt_scale_stride_b, img_scale_ptr, img_scale_stride_b
    )
    dscale, dshift = zero_row(C, BLOCK_C), zero_row(C, BLOCK_C)
    for i in range(rows):
        row = first + i
        x = load_row(x_ptr + b * x_stride_b + row * x_stride_l, C, BLOCK_C)
        dh = load_row(dh_ptr + b * dh_stride_b + row * dh_stride_l, C, BLOCK_C)
        n, rstd = normalize(x, eps, C, BLOCK_C)
        dscale, dshift = mul_add(dh, n, dscale), add(dshift, dh)
        dx = normalize_backward(dh, n, rstd, load_row(scale_ptr, C, BLOCK_C), C)
        store_row(dx_ptr + (b * L + row) * C, dx, C, BLOCK_C)
    partial = (b * tl.num_programs(0) + tl.program_id(0)) * 2
    store_row(partials_ptr + partial * C, dscale, C, BLOCK_C)
    store_row(partials_ptr + (partial + 1) * C, dshift, C, BLOCK_C)


def joint_norm_modulate(
    x: Tensor,
    txt_scale: Tensor,
    txt_shift: Tensor,
    img_scale: Tensor,
    img_shift: Tensor,
    txt_len: int,
    eps: float,
    h: Tensor,
) -> None:
    batch, length, hidden = x.shape
    vectors = (txt_scale, txt_shift, img_scale, img_shift)
    norm_modulate_kernel[(length, batch)](
        x,
        *vectors,
        h,
        *_rows.token_strides(x),
        *_rows.batch_strides(*vectors),
        txt_len,
        eps,
        **_rows.row_config(hidden),
    )


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float, h: Tensor) -> None:
    joint_norm_modulate(x, scale, shift, scale, shift, 0, eps, h)


def joint_norm_modulate_backward(
    dh: Tensor,
    x: Tensor,
    txt_scale: Tensor,
    img_scale: Tensor,
    txt_len: int,
    eps: float,
    dx: Tensor,
    *dvectors: Tensor,  # dscale, dshift of the text, then of the image
) -> None:
    batch, length, hidden = x.shape
    partials, txt_parts = _rows.new_partials(x, txt_len, 2)
    norm_modulate_backward_kernel[(partials.shape[1], batch)](
        dh,
        x,
        txt_scale,
        img_scale,
        dx,
        partials,
        *_rows.token_strides(dh, x),
        *_rows.batch_strides(txt_scale, img_scale),
        length,
        txt_len,
        eps,
        ROWS=_rows.ROWS,
        **_rows.row_config(hidden),
    )
    _rows.sum_partials(partials, txt_parts, dvectors)


def norm_modulate_backward(
    dh: Tensor, x: Tensor, scale: Tensor, eps: float, dx: Tensor, dscale: Tensor, dshift: Tensor
) -> None:
    joint_norm_modulate_backward(dh, x, scale, scale, 0, eps, dx, dscale, dshift)
