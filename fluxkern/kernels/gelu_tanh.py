"""GELU in its tanh form, x * sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), and its slope.

Grid: 1024 elements of a row a program; a contiguous tensor is one row.
Moves a read and a write; backward two reads and a write.
fp32 in registers, one rounding.
At most two strides beside the last axis, after axes that lie behind each other are merged.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._rows import MAX_B

BLOCK_C = 1024  # 4 warps, 8 elements a thread


def merged(*tensors: Tensor) -> tuple[list[int], list[list[int]]]:
    """Sizes and, for each tensor, strides of as few axes as show the same elements in order."""
    sizes, strides = [1], [[1] for _ in tensors]
    for axis in reversed(range(tensors[0].ndim)):
        size = tensors[0].shape[axis]
        if size == 1:
            continue
        steps = [t.stride(axis) for t in tensors]
        if all(step == s[0] * sizes[0] for step, s in zip(steps, strides, strict=True)):
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            for s, step in zip(strides, steps, strict=True):
                s.insert(0, step)
    return sizes, strides


def unsupported(name: str, *args: object) -> str | None:
    sizes, _ = merged(*(t for t in args if isinstance(t, Tensor)))
    if len(sizes) > 3 or len(sizes) == 3 and sizes[0] > MAX_B:
        return f"takes views of three axes, {MAX_B} of the first, at most, got {sizes}"
    return None


@triton.jit
def slope_of_gate(x):
    """-> (s, ds / dx) of s = sigmoid(2 u)"""
    u2 = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
    s = tl.sigmoid(u2)  # sigmoid(-u2) is 1 - s without its cancellation
    slope = s * tl.sigmoid(-u2) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return s, tl.where(tl.abs(x) < 16, slope, 0.0)  # x * x may overflow where s is 0 or 1


@triton.jit(do_not_specialize=("L",))
def gelu_tanh_kernel(
    x_ptr,
    dy_ptr,  # None: forward
    out_ptr,
    x_stride_a,
    x_stride_l,
    dy_stride_a,
    dy_stride_l,
    L,
    C,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(C, BLOCK_C)
    row, a = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    x = tl.load(x_ptr + a * x_stride_a + row * x_stride_l + cols, mask=mask).to(tl.float32)
    s, slope = slope_of_gate(x)
    if dy_ptr is None:
        out = x * s
    else:
        dy = tl.load(dy_ptr + a * dy_stride_a + row * dy_stride_l + cols, mask=mask)
        out = dy.to(tl.float32) * (s + x * slope)
    tl.store(out_ptr + (a * L + row) * C + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def launch(x: Tensor, dy: Tensor | None, out: Tensor) -> None:
    sizes, strides = merged(x) if dy is None else merged(x, dy)
    rows, length, channels = [1] * (3 - len(sizes)) + sizes
    steps = [s for each in strides for s in ([0] * (3 - len(each)) + each)[:2]]
    gelu_tanh_kernel[(triton.cdiv(channels, BLOCK_C) * length, rows)](
        x, dy, out, *steps, *([0, 0] if dy is None else []), length, channels, BLOCK_C, num_warps=4
    )


def gelu_tanh(x: Tensor, out: Tensor) -> None:
    launch(x, None, out)


def gelu_tanh_backward(dy: Tensor, x: Tensor, dx: Tensor) -> None:
    launch(x, dy, dx)
