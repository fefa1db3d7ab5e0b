"""What every op means, in plain PyTorch.

Sizes: B batch, L tokens, C hidden, H heads, D head dim. A fused op is literally the composition of
smaller ones. Low-precision inputs round after every step here, as eager PyTorch does; run in fp64,
these functions are the truth that every backend is measured against.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor


def _in_fp32(backward: Callable) -> Callable:
    """A gradient is summed in fp32 at least and rounded once, as autograd's own are."""

    @wraps(backward)
    def run(*args: Tensor | int | float) -> Tensor | tuple[Tensor, ...]:
        dtype = args[0].dtype
        if dtype.itemsize >= 4:
            return backward(*args)
        out = backward(*(t.float() if isinstance(t, Tensor) else t for t in args))
        return out.to(dtype) if isinstance(out, Tensor) else tuple(t.to(dtype) for t in out)

    return run


def _rows(vec: Tensor) -> Tensor:
    return vec if vec.ndim == 3 else vec.unsqueeze(1)  # [B, C] or [B, S, C] -> [B, S, C]


def _has_streams(vec: Tensor) -> bool:
    return vec.ndim == 3 and vec.shape[1] == 2


def _by_stream(
    op: Callable,
    txt_len: int,
    tokens: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    *rest: float,
) -> Tensor | tuple[Tensor, ...]:
    """The first txt_len tokens with the first of each two vectors, the others with the second."""
    txt = op(*(t[:, :txt_len] for t in tokens), *(v[:, :1] for v in vectors), 0, *rest)
    img = op(*(t[:, txt_len:] for t in tokens), *(v[:, 1:] for v in vectors), 0, *rest)
    if isinstance(txt, Tensor):
        return torch.cat((txt, img), 1)
    return tuple(torch.cat(pair, 1) for pair in zip(txt, img, strict=True))


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, txt_len: int = 0, eps: float = 1e-6
) -> Tensor:
    if _has_streams(scale):
        return _by_stream(norm_modulate, txt_len, (x,), (scale, shift), eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + _rows(scale)) + _rows(shift)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, txt_len: int = 0) -> Tensor:
    if _has_streams(gate):
        return _by_stream(gated_residual, txt_len, (x, y), (gate,))
    return x + _rows(gate) * y


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    txt_len: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    x_new = gated_residual(x, y, gate, txt_len)
    return x_new, norm_modulate(x_new, scale, shift, txt_len, eps)


@_in_fp32
def norm_modulate_backward(
    dh: Tensor, x: Tensor, scale: Tensor, txt_len: int = 0, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    if _has_streams(scale):
        return _by_stream(norm_modulate_backward, txt_len, (dh, x), (scale,), eps)
    centred = x - x.mean(-1, keepdim=True)  # the third derivative of F.layer_norm is wrong
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = centred * rstd
    dn = dh * (1 + scale)
    dx = rstd * (dn - dn.mean(-1, keepdim=True) - n * (dn * n).mean(-1, keepdim=True))
    return dx, (dh * n).sum(1, keepdim=True), dh.sum(1, keepdim=True)


@_in_fp32
def gated_residual_backward(
    dx_new: Tensor, y: Tensor, gate: Tensor, txt_len: int = 0
) -> tuple[Tensor, Tensor]:
    if _has_streams(gate):
        return _by_stream(gated_residual_backward, txt_len, (dx_new, y), (gate,))
    return gate * dx_new, (dx_new * y).sum(1, keepdim=True)  # dx is dx_new itself


@_in_fp32
def gated_residual_norm_modulate_backward(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    txt_len: int = 0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dn, dscale, dshift = norm_modulate_backward(dh, x_new, scale, txt_len, eps)
    dx = dx_new + dn
    return dx, *gated_residual_backward(dx, y, gate, txt_len), dscale, dshift


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, H, D/2]
    cos, sin = (
        cos.unsqueeze(-2),
        sin.unsqueeze(-2),
    )  # [L, 1, D/2], fp32: the product is at least fp32
    return torch.stack((cos * x0 - sin * x1, sin * x0 + cos * x1), -1).flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    q = F.rms_norm(q, q.shape[-1:], q_weight, eps)
    k = F.rms_norm(k, k.shape[-1:], k_weight, eps)
    return rope(q, cos, sin), rope(k, cos, sin)


def _norm_rope_backward(
    dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dn = rope(dy, cos, -sin)  # the rotation back
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = x * r
    g = dn * weight
    dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    return dx, (dn * n).sum((0, 1, 2))


@_in_fp32
def qk_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dq_weight = _norm_rope_backward(dq_out, q, q_weight, cos, sin, eps)
    dk, dk_weight = _norm_rope_backward(dk_out, k, k_weight, cos, sin, eps)
    return dq, dk, dq_weight, dk_weight


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
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    n = txt_q.shape[1]
    txt = qk_norm_rope(txt_q, txt_k, txt_q_weight, txt_k_weight, cos[:n], sin[:n], eps)
    img = qk_norm_rope(img_q, img_k, img_q_weight, img_k_weight, cos[n:], sin[n:], eps)
    return (
        torch.cat((txt[0], img[0]), 1),
        torch.cat((txt[1], img[1]), 1),
        torch.cat((txt_v, img_v), 1),
    )


@_in_fp32
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
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    txt, img = (
        qk_norm_rope_backward(dq_out[:, rows], dk_out[:, rows], *inputs, cos[rows], sin[rows], eps)
        for rows, inputs in (
            (slice(None, txt_q.shape[1]), (txt_q, txt_k, txt_q_weight, txt_k_weight)),
            (slice(txt_q.shape[1], None), (img_q, img_k, img_q_weight, img_k_weight)),
        )
    )
    return *txt[:2], *img[:2], *txt[2:], *img[2:]


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
    eps: float = 1e-6,
) -> None:
    for rows, q_weight, k_weight in (
        (slice(None, txt_len), txt_q_weight, txt_k_weight),
        (slice(txt_len, None), img_q_weight, img_k_weight),
    ):
        new_q, new_k = qk_norm_rope(
            q[:, rows], k[:, rows], q_weight, k_weight, cos[rows], sin[rows], eps
        )
        q[:, rows] = new_q
        k[:, rows] = new_k


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, L, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("blhd,bmhd->bhlm", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)  # [B, H, L], natural log
    out = torch.einsum("bhlm,bmhd->blhd", torch.exp(scores - lse[..., None]), v.to(wide))
    return out.to(q.dtype), lse.transpose(1, 2)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    dout, q, k, v, out = (t.to(lse.dtype) for t in (dout, q, k, v, out))
    p = torch.exp(torch.einsum("blhd,bmhd->blhm", q, k) * scale - lse[..., None])
    dp = torch.einsum("blhd,bmhd->blhm", dout, v)
    off = (dout * out).sum(-1) if dlse is None else (dout * out).sum(-1) - dlse
    ds = p * (dp - off[..., None]) * scale
    dq = torch.einsum("blhm,bmhd->blhd", ds, k)
    dk = torch.einsum("blhm,blhd->bmhd", ds, q)
    return dq.to(dtype), dk.to(dtype), torch.einsum("blhm,blhd->bmhd", p, dout).to(dtype)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    return attention(q, k, v)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@_in_fp32
def gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    th = torch.tanh(c * (x + 0.044715 * x * x * x))
    slope = 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * c * (1 + 3 * 0.044715 * x * x)
    return dy * slope


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    out = F.linear(x, weight, bias)
    return gelu_tanh(out) if activation == "gelu_tanh" else out


def linear_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    add: bool = False,
) -> None:
    y = linear(x, weight, bias, activation)
    out.add_(y) if add else out.copy_(y)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8 bits a row, x = scale * (q - zero), in fp32 whatever the dtype, so that all agree on q."""
    x = x.float()
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = high / 254 - low / 254
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    zero = torch.where(scale == 0, 0, -127 - (low / scale).round())
    q = (x * torch.where(scale == 0, 0, 1 / scale)).round() + zero
    return q.clamp(-127, 127), zero, scale


FP8 = torch.float8_e4m3fn


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 a row, x = scale * q, in fp32 whatever the dtype, so that all agree on q."""
    x, most = x.float(), torch.finfo(FP8).max
    scale = x.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0, scale)
    q = x * torch.where(scale == 0, 0, 1 / scale)
    return q.clamp(-most, most).to(FP8), scale


def norm_modulate_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, txt_len: int = 0, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return quantize_rows_fp8(norm_modulate(x, scale, shift, txt_len, eps))


def gelu_tanh_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows_fp8(gelu_tanh(x))


def rotate(x: Tensor, size: int) -> Tensor:
    """Runs of `size` channels by the Kronecker power of the regular Hadamard matrix of 4."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    four = (1 - 2 * torch.eye(4, dtype=wide.dtype, device=x.device).flip(0)) / 2
    hadamard = wide.new_ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.kron(hadamard, four)
    return (wide.unflatten(-1, (-1, size)) @ hadamard).flatten(-2)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    rotation: int = 0,
) -> Tensor:
    q, zero, scale = quantize_rows(rotate(x, rotation) if rotation else x)
    product = (q - zero).double() @ weight.double().t()  # whole numbers below 2^53: exact
    wide = torch.promote_types(x.dtype, torch.float32)
    out = product.to(wide) * (scale.to(wide) * weight_scale.to(wide))
    out = out if bias is None else out + bias
    return (gelu_tanh(out) if activation == "gelu_tanh" else out).to(x.dtype)


def linear_int8_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    add: bool = False,
    rotation: int = 0,
) -> None:
    y = linear_int8(x, weight, weight_scale, bias, activation, rotation)
    out.add_(y) if add else out.copy_(y)


def modulation(vec: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.silu(vec), weight, bias).unsqueeze(-2)  # [..., B, 1, chunks * C]


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6
) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


@_in_fp32
def group_norm_silu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = x.unflatten(1, (num_groups, -1))  # [B, G, C/G, H, W]
    rstd = (grouped.var((2, 3, 4), correction=0, keepdim=True) + eps).rsqrt()
    n = (grouped - grouped.mean((2, 3, 4), keepdim=True)) * rstd
    z = n.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]
    dz = dy * z.sigmoid() * (1 + z * (1 - z.sigmoid()))
    dn = (dz * weight[:, None, None]).unflatten(1, (num_groups, -1))
    mean_dn, mean_dn_n = (t.mean((2, 3, 4), keepdim=True) for t in (dn, dn * n))
    dx = rstd * (dn - mean_dn - n * mean_dn_n)
    return dx.flatten(1, 2), (dz * n.flatten(1, 2)).sum((0, 2, 3)), dz.sum((0, 2, 3))


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    half = dim // 2
    omega = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half)
    )
    angle = (1000.0 * t).float()[:, None] * omega  # the product with 1000 rounds in the dtype of t
    return torch.cat((angle.cos(), angle.sin()), -1).to(t.dtype)
