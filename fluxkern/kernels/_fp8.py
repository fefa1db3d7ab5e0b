"""A row in e4m3 with one scale, x = q * scale, written as bytes.

GPUs from sm_89 round in hardware. Others, and the interpreter, round by whole numbers: adding half
of what is cut off, and one less where the last bit that stays is even.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import row_ptr
from .attention import architecture

MOST = tl.constexpr(448.0)
TINY = tl.constexpr(1.1754943508222875e-38)  # the least scale whose inverse is finite


@triton.jit
def magnitude(v):
    """Bits of |v|: they order as numbers do, with infinity and then NaN on top."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_fp8(v, HARDWARE: tl.constexpr):
    """fp32 -> the byte of the nearest e4m3; |v| at most 448 and some rounding."""
    if HARDWARE:
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = magnitude(v)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    wide = tl.abs(v) + 16384.0  # whose last bit is 2^-9, that of a subnormal
    subnormal = wide.to(tl.int32, bitcast=True) & 0xF
    byte = tl.where(tl.abs(v) < 0.015625, subnormal, normal)
    byte = tl.where(bits > 0x7F800000, 0x7F, byte)
    return (byte | ((v.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_fp8_row(
    out, row_scale_ptr, b, row, tiles, C: tl.constexpr, BLOCK_C: tl.constexpr, HARDWARE
):
    """Tiles that are zero beyond C; row_scale_ptr: [B, L], of a program a row."""
    top = tl.max(magnitude(tiles[0]), 0)
    for i in tl.static_range(1, len(tiles)):
        top = tl.maximum(top, tl.max(magnitude(tiles[i]), 0))
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), MOST)
    scale = tl.where(scale < TINY, 0.0, scale)
    inverse = tl.where(scale == 0, 0.0, tl.div_rn(1.0, scale))
    tl.store(row_scale_ptr + b * tl.num_programs(0) + row, scale)
    ptr = row_ptr(out, b, row)
    for i in tl.static_range(len(tiles)):
        cols = i * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(ptr + cols, to_fp8(tiles[i] * inverse, HARDWARE), mask=cols < C)


def rounds_in_hardware() -> bool:
    return architecture() >= 89


def as_rows(x: Tensor) -> Tensor:
    """[..., C] of up to three axes as [B, L, C]."""
    return x.view((1,) * (3 - x.ndim) + tuple(x.shape))


def as_bytes(q: Tensor) -> Tensor:
    return q.view(torch.uint8)
