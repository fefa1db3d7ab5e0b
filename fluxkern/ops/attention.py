"""Attention over the joint sequence, without a mask."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch


def _out_and_lse(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


_forward = _dispatch.define(
    "attention(Tensor q, Tensor k, Tensor v, str? backend) -> Tensor",
    reference.attention,
    lambda q, *_: q.new_empty(q.shape),
)
_forward_lse = _dispatch.define(
    "attention_lse(Tensor q, Tensor k, Tensor v, str? backend) -> (Tensor, Tensor)",
    reference.attention_lse,
    _out_and_lse,
)
_backward = _dispatch.define(
    "attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, str? backend) -> (Tensor, Tensor, Tensor)",
    reference.attention_backward,
    lambda dout, dlse, q, k, v, *_: _dispatch.empty_like_each(q, k, v),
)


def _backward_on_cpu(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.numel():
        return _dispatch.empty_like_each(q, k, v)
    if dlse.any():  # torch's takes no gradient of lse
        gradients = reference.attention_backward(dout, dlse, q, k, v, out, lse)
        return tuple(t.contiguous() for t in gradients)
    heads_first = (t.transpose(1, 2) for t in (dout, q, k, v, out, lse))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return tuple(t.transpose(1, 2).contiguous() for t in backward(*heads_first, 0.0, False))


def _backward_on_cuda(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _dispatch.run("attention_backward", "triton", *args)


def _against_cuda(*args: Tensor) -> str | None:
    return _ON_CUDA.unsupported(*args) or _dispatch._reason(
        "attention_backward", "triton", args, named=True
    )


_ON_CPU, _ON_CUDA = _dispatch.on_cpu(_backward_on_cpu), _dispatch.on_cuda(_backward_on_cuda)
for _backend in (
    _ON_CPU,
    replace(_ON_CPU, name="cuda-host", only_named="it is the cpu backend's"),
    replace(_ON_CUDA, unsupported=_against_cuda),
):
    _dispatch.register("attention_backward", _backend)


class _AttentionLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, backend):
        out, lse = _forward_lse(q, k, v, backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend = backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        dout, dlse = _dispatch.rows(dout)[0], dlse.contiguous()
        return *_backward(dout, dlse, *ctx.saved_tensors, ctx.backend), None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    _checks.heads("q", q)
    _checks.same_heads("k", k, "q", q, any_length=True)
    _checks.same_heads("v", v, "k", k)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Scaled dot-product attention, non-causal, without a mask.

    out = softmax(q k^T / sqrt(D)) v

    Args:
        q: [B, L, H, D], floating point, last axis contiguous; any view.
        k, v: [B, M, H, D], dtype of q.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, H, D], dtype of q.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k, v.
    Source: Vaswani et al.; black-forest-labs/flux, math.py, attention.
    """
    _check(q, k, v)
    if _dispatch.needs_gradient(q, k, v):
        return _AttentionLse.apply(q, k, v, backend)[0]
    return _forward(q, k, v, backend)


def attention_lse(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`attention` and the log-sum-exp of its scores, with which parts over split keys are merged.

    lse = log(sum(exp(q k^T / sqrt(D))));  out = exp(q k^T / sqrt(D) - lse) v

    Args:
        q: [B, L, H, D], floating point, last axis contiguous; any view.
        k, v: [B, M, H, D], dtype of q.
        backend: as in `attention`.

    Returns:
        (out [B, L, H, D] in the dtype of q, lse [B, L, H] in fp32 (fp64 for fp64 inputs), natural
        logarithm).

    Raises:
        ValueError, NotImplementedError: as `attention`.

    Gradients: q, k, v, from both outputs.
    Source: Dao et al., FlashAttention.
    """
    _check(q, k, v)
    if _dispatch.needs_gradient(q, k, v):
        return _AttentionLse.apply(q, k, v, backend)
    return _forward_lse(q, k, v, backend)
