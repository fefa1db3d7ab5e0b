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
from ._rows import launch_rows, load_row
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
    x, y, row_scale_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE: tl.constexpr
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x_row = load_row(x, b, row, C, BLOCK_C)
    y_row = ()
    for i in tl.static_range(len(x_row)):
        gate, _ = slope_of_gate(x_row[i])
        y_row += (x_row[i] * gate,)
    store_fp8_row(y, row_scale_ptr, b, row, y_row, C, BLOCK_C, HARDWARE)


def gelu_tanh_fp8(x: Tensor, y: Tensor, row_scale: Tensor) -> None:
    tensors = (as_rows(x), as_rows(as_bytes(y)))
    launch_rows(gelu_tanh_fp8_kernel, tensors, row_scale, HARDWARE=rounds_in_hardware())
