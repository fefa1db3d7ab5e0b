"""GELU in its tanh form, in e4m3 with a scale a row.

Grid: a row a program.
Moves a read, a write of as many bytes and a float a row.
fp32 in registers, one rounding, to e4m3.
C <= 16384; 128-bit loads where C, strides and pointers are multiples of 16.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _rows
from ._fp8 import as_bytes, as_rows, rounds_in_hardware, store_fp8_row
from ._rows import load_row
from .gelu_tanh import slope_of_gate

MAX_C = 4 * _rows.BLOCKS[-1]  # 32 elements a thread


def unsupported(name: str, x: Tensor) -> str | None:
    batch, _, channels = as_rows(x).shape
    if channels > MAX_C:
        return f"takes at most {MAX_C} channels, got {channels}"
    return (
        f"takes at most {_rows.MAX_B} batch elements, got {batch}" if batch > _rows.MAX_B else None
    )


@triton.jit
def gelu_tanh_fp8_kernel(
    x_ptr,
    y_ptr,
    row_scale_ptr,
    x_stride_b,
    x_stride_l,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x = load_row(x_ptr + b * x_stride_b + row * x_stride_l, C, BLOCK_C)
    y = ()
    for i in tl.static_range(len(x)):
        gate, _ = slope_of_gate(x[i])
        y += (x[i] * gate,)
    out = b * tl.num_programs(0) + row
    store_fp8_row(y_ptr + out * C, row_scale_ptr + out, y, C, BLOCK_C, HARDWARE)


def gelu_tanh_fp8(x: Tensor, y: Tensor, row_scale: Tensor) -> None:
    x = as_rows(x)
    batch, length, hidden = x.shape
    gelu_tanh_fp8_kernel[(length, batch)](
        x,
        as_bytes(y),
        row_scale,
        *_rows.token_strides(x),
        HARDWARE=rounds_in_hardware(),
        **_rows.row_config(hidden),
    )
