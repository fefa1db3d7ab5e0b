"""What the row kernels share: a row of C channels in registers, as fp32 tiles of BLOCK_C.

Tiles, not one power of two: 3072 = 3 x 1024 leaves no lane idle, and 8 elements a thread and tile
are one 128-bit load in half precision. Vectors of text and image come as two pointers each.
Sums over tokens: a program adds a run of rows of one batch element and one stream in fp32 and
writes a partial; a second kernel adds the partials in a fixed order. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = (1024, 2048, 4096)  # channels of a tile, where a row needs more than one
MAX_TILES = 3  # 24 elements a thread: three sums and three rows of them fill 144 registers
ROWS = 18  # of one backward program: 512 + 4096 tokens are 257 programs, 2 for each of 132 SMs
MAX_B = 65535  # of a grid's second axis


def unsupported(name: str, *args: object) -> str | None:
    batch, _, hidden = args[0].shape
    if hidden > MAX_TILES * BLOCKS[-1]:
        return f"takes at most {MAX_TILES * BLOCKS[-1]} channels, got {hidden}"
    return f"takes at most {MAX_B} batch elements, got {batch}" if batch > MAX_B else None


def row_config(C: int) -> dict[str, int]:
    """Tile and warps for rows of C channels: 8 elements a thread and tile."""
    block = next((b for b in BLOCKS if MAX_TILES * b >= C), BLOCKS[-1])
    block = min(block, triton.next_power_of_2(C))
    return {"C": C, "BLOCK_C": block, "num_warps": max(1, block // 256)}


def token_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Batch and token stride of each [B, L, C]."""
    return tuple(stride for t in tensors for stride in t.stride()[:2])


def batch_strides(*vectors: Tensor) -> tuple[int, ...]:
    return tuple(vec.stride(0) for vec in vectors)


@triton.jit
def load_row(ptr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[C] as fp32 tiles, 0 beyond C."""
    row = ()
    for start in tl.static_range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        row += (tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32),)
    return row


@triton.jit
def store_row(ptr, row, C: tl.constexpr, BLOCK_C: tl.constexpr):
    for i in tl.static_range(len(row)):
        cols = i * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(ptr + cols, row[i].to(ptr.dtype.element_ty), mask=cols < C)


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
def stream_vector(is_txt, b, txt_ptr, txt_stride_b, img_ptr, img_stride_b):
    """Pointer to the vector of this batch element and stream."""
    return tl.where(is_txt, txt_ptr + b * txt_stride_b, img_ptr + b * img_stride_b)


# sums over tokens


@triton.jit
def rows_of_program(L, txt_len, ROWS: tl.constexpr):
    """-> (first row, number of rows, whether they are text) of program_id(0)."""
    part = tl.program_id(0).to(tl.int64)
    txt_parts = tl.cdiv(txt_len, ROWS)
    is_txt = part < txt_parts
    first = tl.where(is_txt, part * ROWS, txt_len + (part - txt_parts) * ROWS)
    stop = tl.minimum(first + ROWS, tl.where(is_txt, txt_len, L))
    return first, (stop - first).to(tl.int32), is_txt


def new_partials(x: Tensor, txt_len: int, vectors: int) -> tuple[Tensor, int]:
    """-> (fp32 [B, programs of a batch element, vectors, C], programs of the text)."""
    batch, length, hidden = x.shape
    txt_parts = triton.cdiv(txt_len, ROWS)
    parts = txt_parts + triton.cdiv(length - txt_len, ROWS)
    return x.new_empty((batch, parts, vectors, hidden), dtype=torch.float32), txt_parts


@triton.jit(do_not_specialize=("txt_parts", "parts"))
def sum_partials_kernel(
    partials_ptr,
    out_ptrs,  # [B, C] each: the text's vectors, if asked for, then the image's
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
    tl.store(out_ptr + b * C + cols, out, mask=cols < C)


def sum_partials(partials: Tensor, txt_parts: int, outs: tuple[Tensor, ...]) -> None:
    """Adds the partials of each stream into outs: text vectors (or none), then image vectors."""
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
