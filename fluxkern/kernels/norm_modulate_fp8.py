"""LayerNorm without weights, times 1 + scale, plus shift, in e4m3 with a scale a row.

Grid: a row a program.
Moves a read of [B, L, C], a write of as many bytes and a float a row.
fp32 in registers, statistics in two passes, one rounding, to e4m3.
C <= 12288; 128-bit loads where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._fp8 import as_bytes, rounds_in_hardware, store_fp8_row
from ._rows import load_row, modulate, normalize, unsupported

__all__ = ["unsupported"]


@triton.jit
def norm_modulate_fp8_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    h_ptr,
    row_scale_ptr,
    x_stride_b,
    x_stride_l,
    scale_stride_b,
    shift_stride_b,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x = load_row(x_ptr + b * x_stride_b + row * x_stride_l, C, BLOCK_C)
    n, _ = normalize(x, eps, C, BLOCK_C)
    scale = load_row(scale_ptr + b * scale_stride_b, C, BLOCK_C)
    h = modulate(n, scale, load_row(shift_ptr + b * shift_stride_b, C, BLOCK_C))
    out = b * tl.num_programs(0) + row
    store_fp8_row(h_ptr + out * C, row_scale_ptr + out, h, C, BLOCK_C, HARDWARE)


def norm_modulate_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, h: Tensor, row_scale: Tensor
) -> None:
    batch, length, hidden = x.shape
    norm_modulate_fp8_kernel[(length, batch)](
        x,
        scale,
        shift,
        as_bytes(h),
        row_scale,
        *_rows.token_strides(x),
        *_rows.batch_strides(scale, shift),
        eps,
        HARDWARE=rounds_in_hardware(),
        **_rows.row_config(hidden),
    )
