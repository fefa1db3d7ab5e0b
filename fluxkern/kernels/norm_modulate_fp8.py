"""LayerNorm without weights, times 1 + scale, plus shift, in e4m3 with a scale a row.

Grid: a row a program; text and image rows in one launch.
Moves a read of [B, L, C], a write of as many bytes and a float a row.
fp32 in registers, statistics in two passes, one rounding, to e4m3.
C <= 12288; 128-bit loads where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._fp8 import as_bytes, rounds_in_hardware, store_fp8_row
from ._rows import launch_rows, load_row, modulate, normalize, stream_of, unsupported

__all__ = ["unsupported"]


@triton.jit(do_not_specialize=("txt_len",))
def norm_modulate_fp8_kernel(
    x,
    scale,
    shift,
    h,
    row_scale_ptr,
    txt_len,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n, _ = normalize(load_row(x, b, row, C, BLOCK_C), eps, C, BLOCK_C)
    stream = stream_of(row, txt_len)
    scale, shift = load_row(scale, b, stream, C, BLOCK_C), load_row(shift, b, stream, C, BLOCK_C)
    store_fp8_row(h, row_scale_ptr, b, row, modulate(n, scale, shift), C, BLOCK_C, HARDWARE)


def norm_modulate_fp8(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    txt_len: int,
    eps: float,
    h: Tensor,
    row_scale: Tensor,
) -> None:
    tensors, rounding = (x, scale, shift, as_bytes(h)), {"HARDWARE": rounds_in_hardware()}
    launch_rows(norm_modulate_fp8_kernel, tensors, row_scale, txt_len, eps, **rounding)
