"""What the row kernels share: a row of C channels in registers, as fp32 tiles of BLOCK_C.

Tiles, not one power of two: 3072 = 3 x 1024 leaves no lane idle, and 8 elements a thread and tile
are one 128-bit load in half precision. Vectors are [B, S, C]: row 0 is the text's and row 1 the
image's; with S = 1 both are row 0.
Sums over tokens: a program adds a run of rows of one batch element and one stream in fp32 and
writes a partial; a second kernel adds the partials in a fixed order. No atomics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = (1024, 2048, 4096)  # channels of a tile, where a row needs more than one
MAX_TILES = 3  # 24 elements a thread: three sums and three rows of them fill 144 registers
ROWS = 18  # of one backward program: 512 + 4096 tokens are 257 programs, 2 for each of 132 SMs
MAX_B = 65535  # of a grid's second axis

View = tuple[Tensor, *tuple[int, ...]]  # tensor, strides of its axes but the last


def unsupported(name: str, *args: object) -> str | None:
    batch, _, hidden = args[0].shape
    if not 0 < hidden <= MAX_TILES * BLOCKS[-1]:
        return f"takes 1 to {MAX_TILES * BLOCKS[-1]} channels, got {hidden}"
    return f"takes at most {MAX_B} batch elements, got {batch}" if batch > MAX_B else None


def row_config(C: int) -> dict[str, int]:
    """Tile and warps for rows of C channels: 8 elements a thread and tile."""
    block = next((b for b in BLOCKS if MAX_TILES * b >= C), BLOCKS[-1])
    block = min(block, triton.next_power_of_2(C))
    return {"C": C, "BLOCK_C": block, "num_warps": max(1, block // 256)}


def view(t: Tensor) -> View:
    """What a kernel takes of a tensor; the stride of an axis of one is 0, where torch has any."""
    return (t, *(s if n > 1 else 0 for n, s in zip(t.shape[:-1], t.stride(), strict=False)))


def launch_rows(kernel, tensors: Sequence[Tensor], *more: Tensor | float, **constants: int) -> None:
    """A program a row of tensors[0], [B, L, C]."""
    batch, length, hidden = tensors[0].shape
    kernel[(length, batch)](*map(view, tensors), *more, **constants, **row_config(hidden))


@triton.jit
def row_ptr(view, b, row):
    """b, row: 64 bits"""
    return view[0] + b * view[1] + row * view[2]


@triton.jit
def load_row(view, b, row, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[C] as fp32 tiles, 0 beyond C."""
    tiles = ()
    for start in tl.static_range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        tiles += (tl.load(row_ptr(view, b, row) + cols, mask=cols < C, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_row(view, b, row, tiles, C: tl.constexpr, BLOCK_C: tl.constexpr):
    ptr = row_ptr(view, b, row)
    for i in tl.static_range(len(tiles)):
        cols = i * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(ptr + cols, tiles[i].to(ptr.dtype.element_ty), mask=cols < C)


@triton.jit
def zero_row(C: tl.constexpr, BLOCK_C: tl.constexpr):
    row = ()
    for _ in tl.static_range(0, C, BLOCK_C):
        row += (tl.zeros((BLOCK_C,), tl.float32),)
    return row


@triton.jit
def add(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out += (a[i] + b[i],)
    return out


@triton.jit
def mul(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out += (a[i] * b[i],)
    return out


@triton.jit
def mul_add(a, b, c):
    """a * b + c"""
    out = ()
    for i in tl.static_range(len(a)):
        out += (a[i] * b[i] + c[i],)
    return out


@triton.jit
def rounded(row, dtype: tl.constexpr):
    """What a reader of the stored row sees."""
    out = ()
    for i in tl.static_range(len(row)):
        out += (row[i].to(dtype).to(tl.float32),)
    return out


@triton.jit
def mean(row, C: tl.constexpr):
    total = row[0]
    for i in tl.static_range(1, len(row)):
        total += row[i]
    return tl.sum(total, 0) * (1 / C)


@triton.jit
def normalize(x, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm in two passes over registers -> (n, 1 / std)."""
    x_mean = mean(x, C)
    centred = ()
    for i in tl.static_range(len(x)):
        cols = i * BLOCK_C + tl.arange(0, BLOCK_C)
        centred += (tl.where(cols < C, x[i] - x_mean, 0.0),)
    rstd = tl.rsqrt(mean(mul(centred, centred), C) + eps)
    n = ()
    for i in tl.static_range(len(x)):
        n += (centred[i] * rstd,)
    return n, rstd


@triton.jit
def modulate(n, scale, shift):
    out = ()
    for i in tl.static_range(len(n)):
        out += (n[i] * (1 + scale[i]) + shift[i],)
    return out


@triton.jit
def normalize_backward(dh, n, rstd, scale, C: tl.constexpr):
    """Gradient of x from that of h = n * (1 + scale) + shift."""
    dn = ()
    for i in tl.static_range(len(n)):
        dn += (dh[i] * (1 + scale[i]),)
    dn_mean = mean(dn, C)
    dn_n_mean = mean(mul(dn, n), C)
    dx = ()
    for i in tl.static_range(len(n)):
        dx += (rstd * (dn[i] - dn_mean - n[i] * dn_n_mean),)
    return dx


@triton.jit
def stream_of(row, txt_len):
    return (row >= txt_len).to(tl.int64)


# sums over tokens


@triton.jit
def rows_of_part(part, L, txt_len, ROWS: tl.constexpr):
    """-> (first row, number of rows, stream) of a run of rows; part: 64 bits"""
    txt_parts = tl.cdiv(txt_len, ROWS)
    is_txt = part < txt_parts
    first = tl.where(is_txt, part * ROWS, txt_len + (part - txt_parts) * ROWS)
    stop = tl.minimum(first + ROWS, tl.where(is_txt, txt_len, L))
    return first, (stop - first).to(tl.int32), stream_of(part, txt_parts)


def parts_of(length: int, txt_len: int, rows: int) -> tuple[int, int]:
    """-> (runs of rows of the text, of both streams)"""
    txt_parts = triton.cdiv(txt_len, rows)
    return txt_parts, txt_parts + triton.cdiv(length - txt_len, rows)


@triton.jit(do_not_specialize=("txt_parts", "parts"))
def sum_partials_kernel(
    partials_ptr,
    out_ptrs,  # the text's vectors, if asked for, then the image's
    txt_parts,
    parts,
    VECTORS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_txt = which < len(out_ptrs) - VECTORS
    stop = tl.where(is_txt, txt_parts, parts)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(tl.where(is_txt, 0, txt_parts), stop, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        row = (b * parts + part) * VECTORS + which % VECTORS
        mask = (part < stop) & (cols < C)[None, :]
        total += tl.load(partials_ptr + row * C + cols[None, :], mask=mask, other=0.0)
    out_ptr = out_ptrs[0]
    for i in tl.static_range(1, len(out_ptrs)):
        out_ptr = tl.where(which == i, out_ptrs[i], out_ptr)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + b * (len(out_ptrs) // VECTORS * C) + cols, out, mask=cols < C)


def sum_partials(partials: Tensor, txt_parts: int, outs: tuple[Tensor, ...]) -> None:
    """Adds the partials [B, parts, vectors, C] of each stream into outs.

    outs: the text's vectors (or none), then the image's, [C] each, or cut from [B, S, C].
    """
    batch, parts, vectors, hidden = partials.shape
    sum_partials_kernel[(triton.cdiv(hidden, 32), len(outs), batch)](
        partials,
        outs,
        txt_parts,
        parts,
        VECTORS=vectors,
        C=hidden,
        BLOCK_P=64,
        BLOCK_C=32,
        num_warps=4,
    )


def launch_row_sums(
    kernel, tensors: Sequence[Tensor], dvectors: Sequence[Tensor], txt_len: int, *scalars: float
) -> None:
    """A program a run of rows of tensors[0], [B, L, C], then their sums into dvectors [B, S, C]."""
    batch, length, hidden = tensors[0].shape
    txt_parts, parts = parts_of(length, txt_len, ROWS)
    shape = (batch, parts, len(dvectors), hidden)
    partials = tensors[0].new_empty(shape, dtype=torch.float32)
    kernel[(parts, batch)](
        *map(view, (*tensors, partials.flatten(1, 2))),
        length,
        txt_len,
        *scalars,
        ROWS=ROWS,
        **row_config(hidden),
    )
    streams = zip(*(d.unbind(1) for d in dvectors), strict=True)
    sum_partials(partials, txt_parts, tuple(d for stream in streams for d in stream))
