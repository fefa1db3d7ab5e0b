"""RMSNorm of q and k over the head dim, then the rotation of pairs; joint form and in place too.

Grid: a token a program, cos, sin and weights in registers over its heads; backward 16 tokens a
program, then sums of partials over the programs.
Moves a read and a write of q and k (and v in the joint form); backward two reads and a write.
fp32 in registers from load to store, one rounding; sums in a fixed order. D <= 512, B <= 65535.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import MAX_B, View, parts_of, row_ptr, rows_of_part, sum_partials, view

MAX_D = 512
TILES = 4  # of heads, at most: loads of all are in flight together
TOKENS = 16  # of one backward program: 512 + 4096 tokens are 288 programs


def unsupported(name: str, *args: object) -> str | None:
    batch, _, heads, dim = args[0].shape
    if heads == 0 or not 0 < dim <= MAX_D:
        return f"takes heads of 1 to {MAX_D} dims, got {heads} of {dim}"
    return f"takes at most {MAX_B} batch elements, got {batch}" if batch > MAX_B else None


def heads_config(H: int, D: int) -> dict[str, int]:
    """Tiles of heads and warps: 8 elements a thread and tile."""
    block_h, block_d = triton.next_power_of_2(triton.cdiv(H, TILES)), triton.next_power_of_2(D)
    num_warps = min(8, max(1, block_h * block_d // 256))
    return {"H": H, "D": D, "BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": num_warps}


def table(cos: Tensor, sin: Tensor) -> tuple[Tensor, int, Tensor, int]:
    return cos, cos.stride(0), sin, sin.stride(0)


@triton.jit
def stream_token(is_txt, b, row, img_row, txt, img):
    """-> (pointer to the heads of a token, head stride)"""
    ptr = tl.where(is_txt, row_ptr(txt, b, row), row_ptr(img, b, img_row))
    return ptr, tl.where(is_txt, txt[3], img[3])


@triton.jit
def load_heads(
    token,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[H, D] of a token as tiles [BLOCK_H, BLOCK_D], 0 outside."""
    ptr, stride_h = token
    tiles = ()
    for start in tl.static_range(0, H, BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        tiles += (tl.load(ptr + h * stride_h + d, mask=(h < H) & (d < D), other=0.0),)
    return tiles


@triton.jit
def store_head_tile(
    token,
    tile,
    i: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ptr, stride_h = token
    h = (i * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    out = tile.to(ptr.dtype.element_ty)
    tl.store(ptr + h * stride_h + d, out, mask=(h < H) & (d < D))


@triton.jit
def load_rotation(
    table, row, COS_STRIDE_D: tl.constexpr, SIN_STRIDE_D: tl.constexpr, D, BLOCK_D: tl.constexpr
):
    """-> cos, sin [1, BLOCK_D / 2] of a token"""
    cos_ptr, cos_stride_l, sin_ptr, sin_stride_l = table
    i = tl.arange(0, BLOCK_D // 2)[None, :]
    mask = i < D // 2
    cos = tl.load(cos_ptr + row * cos_stride_l + i * COS_STRIDE_D, mask=mask, other=0.0)
    return cos, tl.load(sin_ptr + row * sin_stride_l + i * SIN_STRIDE_D, mask=mask, other=0.0)


@triton.jit
def load_weight(ptr, D, BLOCK_D: tl.constexpr):
    """[1, BLOCK_D], fp32"""
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def rotate(x, cos, sin):
    """Rotates the pairs (2i, 2i + 1) of [rows, D] by tables [rows or 1, D / 2]."""
    x0, x1 = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(cos * x0 - sin * x1, sin * x0 + cos * x1), x.shape)


@triton.jit
def inverse_rms(x, eps, D: tl.constexpr):
    """[rows, D] -> [rows, 1]"""
    return tl.rsqrt(tl.sum(x * x, 1) * (1 / D) + eps)[:, None]


@triton.jit
def norm_rope(x, weight, cos, sin, eps, D: tl.constexpr):
    x = x.to(tl.float32)
    return rotate(x * inverse_rms(x, eps, D) * weight, cos, sin)


@triton.jit
def norm_rope_backward(dy, x, weight, cos, sin, eps, D: tl.constexpr):
    """-> (dx, dweight of every row)"""
    x = x.to(tl.float32)
    dn = rotate(dy.to(tl.float32), cos, -sin)
    r = inverse_rms(x, eps, D)
    n, g = x * r, dn * weight
    return r * (g - n * (tl.sum(g * n, 1)[:, None] * (1 / D))), dn * n


@triton.jit(do_not_specialize=("txt_len", "img_first"))
def qk_norm_rope_kernel(
    txt,  # tensors; as many as have a weight are normed and rotated, the others copied
    img,
    outs,
    txt_weights,
    img_weights,
    rotation,
    txt_len,
    img_first,  # token that stands first in img
    eps,
    COS_STRIDE_D: tl.constexpr,
    SIN_STRIDE_D: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_txt, img_row = row < txt_len, row - img_first
    x = ()
    for n in tl.static_range(len(txt_weights)):
        token = stream_token(is_txt, b, row, img_row, txt[n], img[n])
        x += (load_heads(token, H, D, BLOCK_H, BLOCK_D),)
    cos, sin = load_rotation(rotation, row, COS_STRIDE_D, SIN_STRIDE_D, D, BLOCK_D)
    for n in tl.static_range(len(txt_weights)):
        weight = load_weight(tl.where(is_txt, txt_weights[n], img_weights[n]), D, BLOCK_D)
        for i in tl.static_range(len(x[n])):
            y = norm_rope(x[n][i], weight, cos, sin, eps, D)
            store_head_tile((row_ptr(outs[n], b, row), outs[n][3]), y, i, H, D, BLOCK_H, BLOCK_D)
    for n in tl.static_range(len(txt_weights), len(txt)):
        token = stream_token(is_txt, b, row, img_row, txt[n], img[n])
        v = load_heads(token, H, D, BLOCK_H, BLOCK_D)
        for i in tl.static_range(len(v)):
            store_head_tile((row_ptr(outs[n], b, row), outs[n][3]), v[i], i, H, D, BLOCK_H, BLOCK_D)


@triton.jit(do_not_specialize=("L", "txt_len"))
def qk_norm_rope_backward_kernel(
    dq_out,
    dk_out,
    txt,  # q, k, dq, dk
    img,
    txt_weights,
    img_weights,
    rotation,
    partials_ptr,
    L,
    txt_len,
    eps,
    TOKENS: tl.constexpr,
    COS_STRIDE_D: tl.constexpr,
    SIN_STRIDE_D: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, rows, stream = rows_of_part(part, L, txt_len, TOKENS)
    is_txt = stream == 0
    q_weight = load_weight(tl.where(is_txt, txt_weights[0], img_weights[0]), D, BLOCK_D)
    k_weight = load_weight(tl.where(is_txt, txt_weights[1], img_weights[1]), D, BLOCK_D)
    dq_weight = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    dk_weight = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for i in range(rows):
        row = first + i
        img_row = row - txt_len
        token = stream_token(is_txt, b, row, img_row, txt[0], img[0])
        q = load_heads(token, H, D, BLOCK_H, BLOCK_D)
        dq = load_heads((row_ptr(dq_out, b, row), dq_out[3]), H, D, BLOCK_H, BLOCK_D)
        token = stream_token(is_txt, b, row, img_row, txt[1], img[1])
        k = load_heads(token, H, D, BLOCK_H, BLOCK_D)
        dk = load_heads((row_ptr(dk_out, b, row), dk_out[3]), H, D, BLOCK_H, BLOCK_D)
        cos, sin = load_rotation(rotation, row, COS_STRIDE_D, SIN_STRIDE_D, D, BLOCK_D)
        q_token = stream_token(is_txt, b, row, img_row, txt[2], img[2])
        k_token = stream_token(is_txt, b, row, img_row, txt[3], img[3])
        for j in tl.static_range(len(q)):
            dx, dw = norm_rope_backward(dq[j], q[j], q_weight, cos, sin, eps, D)
            store_head_tile(q_token, dx, j, H, D, BLOCK_H, BLOCK_D)
            dq_weight += dw
            dx, dw = norm_rope_backward(dk[j], k[j], k_weight, cos, sin, eps, D)
            store_head_tile(k_token, dx, j, H, D, BLOCK_H, BLOCK_D)
            dk_weight += dw
    d = tl.arange(0, BLOCK_D)
    partial_ptr = partials_ptr + (part * tl.num_programs(1) + b) * 2 * D
    tl.store(partial_ptr + d, tl.sum(dq_weight, 0), mask=d < D)
    tl.store(partial_ptr + D + d, tl.sum(dk_weight, 0), mask=d < D)


def views(*tensors: Tensor) -> tuple[View, ...]:
    return tuple(map(view, tensors))


def launch(
    txt: tuple[Tensor, ...],
    img: tuple[Tensor, ...],
    outs: tuple[Tensor, ...],
    txt_weights: tuple[Tensor, ...],
    img_weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    txt_len: int,
    img_first: int,
    eps: float,
) -> None:
    """txt, img, outs: tensors of which as many as there are weights are normed and rotated."""
    batch, length, heads, dim = outs[0].shape
    qk_norm_rope_kernel[(length, batch)](
        views(*txt),
        views(*img),
        views(*outs),
        txt_weights,
        img_weights,
        table(cos, sin),
        txt_len,
        img_first,
        eps,
        COS_STRIDE_D=cos.stride(1),
        SIN_STRIDE_D=sin.stride(1),
        **heads_config(heads, dim),
    )


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    new_q: Tensor,
    new_k: Tensor,
) -> None:
    weights = (q_weight, k_weight)
    launch((q, k), (q, k), (new_q, new_k), weights, weights, cos, sin, 0, 0, eps)


def qk_norm_rope_(
    q: Tensor,
    k: Tensor,
    txt_q_weight: Tensor,
    txt_k_weight: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_len: int,
    eps: float,
) -> None:
    txt_weights, img_weights = (txt_q_weight, txt_k_weight), (img_q_weight, img_k_weight)
    launch((q, k), (q, k), (q, k), txt_weights, img_weights, cos, sin, txt_len, 0, eps)


def joint_qk_norm_rope(
    txt_q: Tensor,
    txt_k: Tensor,
    txt_v: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_q_weight: Tensor,
    txt_k_weight: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None:
    txt, img, txt_len = (txt_q, txt_k, txt_v), (img_q, img_k, img_v), txt_q.shape[1]
    txt_weights, img_weights = (txt_q_weight, txt_k_weight), (img_q_weight, img_k_weight)
    launch(txt, img, (q, k, v), txt_weights, img_weights, cos, sin, txt_len, txt_len, eps)


def joint_qk_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    txt_q: Tensor,
    txt_k: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    txt_q_weight: Tensor,
    txt_k_weight: Tensor,
    img_q_weight: Tensor,
    img_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    txt_dq: Tensor,
    txt_dk: Tensor,
    img_dq: Tensor,
    img_dk: Tensor,
    *dweights: Tensor,  # of q and k of the text, then of the image
) -> None:
    batch, length, heads, dim = dq_out.shape
    txt_len = length - img_q.shape[1]
    txt_parts, parts = parts_of(length, txt_len, TOKENS)
    partials = dq_out.new_empty((1, parts * batch, 2, dim), dtype=torch.float32)
    qk_norm_rope_backward_kernel[(parts, batch)](
        *views(dq_out, dk_out),
        views(txt_q, txt_k, txt_dq, txt_dk),
        views(img_q, img_k, img_dq, img_dk),
        (txt_q_weight, txt_k_weight),
        (img_q_weight, img_k_weight),
        table(cos, sin),
        partials,
        length,
        txt_len,
        eps,
        TOKENS=TOKENS,
        COS_STRIDE_D=cos.stride(1),
        SIN_STRIDE_D=sin.stride(1),
        **heads_config(heads, dim),
    )
    sum_partials(partials, txt_parts * batch, dweights)


def qk_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    dq: Tensor,
    dk: Tensor,
    *dweights: Tensor,  # of q and k
) -> None:
    inputs, weights, grads = (q, k) * 2, (q_weight, k_weight) * 2, (dq, dk) * 2
    joint_qk_norm_rope_backward(dq_out, dk_out, *inputs, *weights, cos, sin, eps, *grads, *dweights)
