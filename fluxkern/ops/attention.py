"""Attention over the joint sequence, without a mask."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("attention", _dispatch.Backend("reference", reference.attention))
_dispatch.register("attention_lse", _dispatch.Backend("reference", reference.attention_lse))


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
    return _dispatch.run("attention", backend, q, k, v)


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
    return _dispatch.run("attention_lse", backend, q, k, v)
