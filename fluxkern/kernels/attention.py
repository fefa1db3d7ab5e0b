"""Flash attention, no mask: softmax(q k^T / sqrt D) v, its log-sum-exp, and the backward.

Grid: a tile of queries, a head, a batch element; backward one kernel over tiles of keys for dk, dv,
one over tiles of queries for dq, so that nothing is added atomically.
Moves q, k, v, out once and k, v again for every tile of queries, from L2.
fp32 softmax and sums, products in the dtype of q; D <= 256; TMA from sm_90 where strides allow.
"""

import os

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _tiles
from ._rows import MAX_B, view
from .qk_norm_rope import inverse_rms, load_weight, rotate, table

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it at the import
MAX_D = 256
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def unsupported(name: str, *args: object) -> str | None:
    q = args[2] if name == "attention_backward" else args[0]
    batch, _, heads, dim = q.shape
    if not 0 < dim <= MAX_D:
        return f"takes a head dim of 1 to {MAX_D}, got {dim}"
    if max(batch, heads) > MAX_B:
        return f"takes at most {MAX_B} batch elements and heads, got {batch} and {heads}"
    return None


def architecture() -> int:
    """80, 89, 90, 100 or 120; 80 in the interpreter."""
    if INTERPRETING:
        return 80
    return triton.runtime.driver.active.get_current_target().arch


def configured(kernel: str, q: Tensor, tile: str | None) -> dict[str, int]:
    """The named or the default tile of a kernel on this machine, as what it takes."""
    dim, chosen = q.shape[-1], _tiles.chosen(kernel, architecture(), q, tile)
    return {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))} | chosen._asdict()


# tiles


def takes_tma(t: Tensor) -> bool:
    """Whether base and strides are what a TMA descriptor asks for."""
    aligned = all(0 < s * t.itemsize < 2**40 and s * t.itemsize % 16 == 0 for s in t.stride()[:3])
    return t.numel() > 0 and t.stride(3) == 1 and aligned and t.data_ptr() % 16 == 0


def sources(kernel: str, config: dict[str, int], *tiles: tuple[Tensor, str]) -> list:
    """What load_tile takes for each tensor and name of its tile; `config` for TMA or without."""
    if config["TMA"] and not all(takes_tma(t) for t, _ in tiles):
        config |= _tiles.by_pointers(kernel, architecture())._asdict()
    if not config["TMA"]:
        return [view(t) for t, _ in tiles]
    blocks = [[1, config[tile], 1, config["BLOCK_D"]] for _, tile in tiles]
    return [TensorDescriptor.from_tensor(t, b) for (t, _), b in zip(tiles, blocks, strict=True)]


@triton.jit
def load_tile(
    source,
    b,
    start,
    h,
    L,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK, BLOCK_D] of a head from token `start`, 0 outside."""
    if TMA:
        return source.load([b, start, h, 0]).reshape(BLOCK, BLOCK_D)
    else:
        tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        ptr = head_ptr(source, b, h) + tokens * source[2] + d
        return tl.load(ptr, mask=(tokens < L) & (d < D), other=0.0)


@triton.jit
def head_ptr(view, b, h):
    return view[0] + b.to(tl.int64) * view[1] + h.to(tl.int64) * view[3]


@triton.jit
def store_tile(
    view, tile, b, start, h, L, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    tokens = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    ptr = head_ptr(view, b, h) + tokens * view[2] + d
    tl.store(ptr, tile.to(view[0].dtype.element_ty), mask=(tokens < L) & (d < D))


# forward


@triton.jit
def attend(
    q,
    k,
    v,
    out,
    total,
    top,
    columns,  # keys left from the start of the tile
    log2_scale,
    MASKED: tl.constexpr,
):
    """One tile of keys: the running sums of exp2(scores - top)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale
    if MASKED:
        scores = tl.where((tl.arange(0, k.shape[0]) < columns)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
    return out, total, new_top


@triton.jit(do_not_specialize=("L", "M"))
def attention_kernel(
    q_source,
    k_source,
    v_source,
    out_view,
    lse_ptr,  # [B, L, H] fp32, or None
    q_weight_ptr,  # None: q is taken as it is
    rotation,
    L,
    M,
    scale,
    eps,
    COS_STRIDE_D: tl.constexpr,
    SIN_STRIDE_D: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    q = load_tile(q_source, b, start, h, L, TMA, D, BLOCK_M, BLOCK_D)
    if q_weight_ptr is not None:
        q = norm_rope_tile(q, q_weight_ptr, rotation, start, L, eps, COS_STRIDE_D, SIN_STRIDE_D, D)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = M // BLOCK_N * BLOCK_N
    for n in range(0, whole, BLOCK_N):
        k = load_tile(k_source, b, n, h, M, TMA, D, BLOCK_N, BLOCK_D)
        v = load_tile(v_source, b, n, h, M, TMA, D, BLOCK_N, BLOCK_D)
        out, total, top = attend(q, k, v, out, total, top, M - n, scale * LOG2_E, False)
    if whole < M:
        k = load_tile(k_source, b, whole, h, M, TMA, D, BLOCK_N, BLOCK_D)
        v = load_tile(v_source, b, whole, h, M, TMA, D, BLOCK_N, BLOCK_D)
        out, total, top = attend(q, k, v, out, total, top, M - whole, scale * LOG2_E, True)
    total = tl.where(total == 0, 1, total)  # no keys at all: zeros
    store_tile(out_view, out / total[:, None], b, start, h, L, D, BLOCK_M, BLOCK_D)
    if lse_ptr is not None:
        rows = start + tl.arange(0, BLOCK_M)
        at = (b.to(tl.int64) * L + rows) * tl.num_programs(1) + h
        tl.store(lse_ptr + at, top * LN_2 + tl.log(total), mask=rows < L)


@triton.jit
def norm_rope_tile(
    x,
    weight_ptr,
    rotation,
    start,
    L,
    eps,
    COS_STRIDE_D: tl.constexpr,
    SIN_STRIDE_D: tl.constexpr,
    D: tl.constexpr,
):
    """RMSNorm and rotation of the tokens of a tile [tokens, BLOCK_D], in its dtype."""
    BLOCK_D: tl.constexpr = x.shape[1]
    tokens = (start + tl.arange(0, x.shape[0])).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK_D // 2)[None, :]
    mask = (tokens < L) & (i < D // 2)
    cos_ptr, cos_stride_l, sin_ptr, sin_stride_l = rotation
    cos = tl.load(cos_ptr + tokens * cos_stride_l + i * COS_STRIDE_D, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + tokens * sin_stride_l + i * SIN_STRIDE_D, mask=mask, other=0.0)
    weight = load_weight(weight_ptr, D, BLOCK_D)
    wide = x.to(tl.float32)
    return rotate(wide * inverse_rms(wide, eps, D) * weight, cos, sin).to(x.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    q_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 0.0,
    tile: str | None = None,
) -> None:
    """Attention of q, which is normed and rotated first where a weight is given."""
    batch, length, heads, dim = q.shape
    config = configured("attention", q, tile)
    inputs = sources("attention", config, (q, "BLOCK_M"), (k, "BLOCK_N"), (v, "BLOCK_N"))
    rope = q_weight is not None
    attention_kernel[(triton.cdiv(length, config["BLOCK_M"]), heads, batch)](
        *inputs,
        view(out),
        lse,
        q_weight,
        table(cos, sin) if rope else None,
        length,
        k.shape[1],
        dim**-0.5,
        eps,
        COS_STRIDE_D=cos.stride(1) if rope else 1,
        SIN_STRIDE_D=sin.stride(1) if rope else 1,
        **config,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, tile: str | None = None) -> None:
    forward(q, k, v, out, None, tile=tile)


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tile: str | None = None
) -> None:
    forward(q, k, v, out, lse, tile=tile)


# backward


@triton.jit(do_not_specialize=("L",))
def attention_delta_kernel(
    out,
    dout,
    lse,
    dlse,  # None: none
    rows_ptr,  # [2, B, H, L] fp32: lse in base 2, delta
    L,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = sum(dout * out) - dlse, what the gradient of the softmax takes off."""
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    o = load_tile(out, b, start, h, L, False, D, BLOCK_M, BLOCK_D).to(tl.float32)
    do = load_tile(dout, b, start, h, L, False, D, BLOCK_M, BLOCK_D).to(tl.float32)
    rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask = rows < L
    delta = tl.sum(o * do, 1)
    if dlse is not None:
        delta -= tl.load(head_ptr(dlse, b, h) + rows * dlse[2], mask=mask, other=0.0)
    lse_rows = tl.load(head_ptr(lse, b, h) + rows * lse[2], mask=mask, other=0.0)
    heads = tl.num_programs(1).to(tl.int64)
    ptr = rows_ptr + (b * heads + h) * L + rows
    tl.store(ptr, lse_rows * LOG2_E, mask=mask)
    tl.store(ptr + tl.num_programs(2) * heads * L, delta, mask=mask)


@triton.jit
def load_softmax_rows(rows_ptr, b, start, h, L, BLOCK: tl.constexpr):
    """-> (lse in base 2, infinite outside; delta) of a tile of queries"""
    heads = tl.num_programs(1).to(tl.int64)
    rows = start + tl.arange(0, BLOCK)
    ptr = rows_ptr + (b * heads + h) * L + rows
    lse = tl.load(ptr, mask=rows < L, other=float("inf"))
    return lse, tl.load(ptr + tl.num_programs(2) * heads * L, mask=rows < L, other=0.0)


@triton.jit(do_not_specialize=("L", "M"))
def attention_backward_keys_kernel(
    q_source,
    k_source,
    v_source,
    dout_source,
    rows_ptr,
    dk_view,
    dv_view,
    L,
    M,
    scale,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, h, b = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    k = load_tile(k_source, b, start, h, M, TMA, D, BLOCK_N, BLOCK_D)
    v = load_tile(v_source, b, start, h, M, TMA, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for m in range(0, L, BLOCK_M):
        q = load_tile(q_source, b, m, h, L, TMA, D, BLOCK_M, BLOCK_D)
        dout = load_tile(dout_source, b, m, h, L, TMA, D, BLOCK_M, BLOCK_D)
        lse, delta = load_softmax_rows(rows_ptr, b, m, h, L, BLOCK_M)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)
        p = tl.exp2(scores - lse[None, :])  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_tile(dk_view, dk * scale, b, start, h, M, D, BLOCK_N, BLOCK_D)
    store_tile(dv_view, dv, b, start, h, M, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=("L", "M"))
def attention_backward_queries_kernel(
    q_source,
    k_source,
    v_source,
    dout_source,
    rows_ptr,
    dq_view,
    L,
    M,
    scale,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start, h, b = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    q = load_tile(q_source, b, start, h, L, TMA, D, BLOCK_M, BLOCK_D)
    dout = load_tile(dout_source, b, start, h, L, TMA, D, BLOCK_M, BLOCK_D)
    lse, delta = load_softmax_rows(rows_ptr, b, start, h, L, BLOCK_M)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in range(0, M, BLOCK_N):
        k = load_tile(k_source, b, n, h, M, TMA, D, BLOCK_N, BLOCK_D)
        v = load_tile(v_source, b, n, h, M, TMA, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        p = tl.exp2(scores - lse[:, None])
        p = tl.where((n + tl.arange(0, BLOCK_N) < M)[None, :], p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_tile(dq_view, dq * scale, b, start, h, L, D, BLOCK_M, BLOCK_D)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    keys_tile: str | None = None,
    queries_tile: str | None = None,
) -> None:
    batch, length, heads, dim = q.shape
    keys = k.shape[1]
    block_d = max(16, triton.next_power_of_2(dim))
    rows = lse.new_empty((2, batch, heads, length))
    attention_delta_kernel[(triton.cdiv(length, 32), heads, batch)](
        view(out),
        view(dout),
        (lse, *lse.stride()),
        None if dlse is None else (dlse, *dlse.stride()),
        rows,
        length,
        D=dim,
        BLOCK_D=block_d,
        BLOCK_M=32,
        num_warps=4,
    )

    def launch(kernel, tile: str | None, tokens: int, block: str, *grads: Tensor) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        config = configured(name, q, tile)
        tiles = ((q, "BLOCK_M"), (k, "BLOCK_N"), (v, "BLOCK_N"), (dout, "BLOCK_M"))
        inputs = sources(name, config, *tiles)
        kernel[(triton.cdiv(tokens, config[block]), heads, batch)](
            *inputs, rows, *map(view, grads), length, keys, dim**-0.5, **config
        )

    launch(attention_backward_keys_kernel, keys_tile, keys, "BLOCK_N", dk, dv)
    launch(attention_backward_queries_kernel, queries_tile, length, "BLOCK_M", dq)
