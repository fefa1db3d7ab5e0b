"""Norm, rotate, attend: the whole of a block between the QKV and the output projection."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch
from .attention import attention
from .qk_norm_rope import qk_norm_rope

_forward = _dispatch.define(
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos,"
    " Tensor sin, float eps, str? backend) -> Tensor",
    reference.rope_attention,
    lambda q, *_: q.new_empty(q.shape),
)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """QK-RMSNorm, RoPE and attention.

    out = attention(*qk_norm_rope(q, k, q_weight, k_weight, cos, sin), v)

    Args:
        q, k, v: [B, L, H, D], floating point, D even, last axis contiguous; any views.
        q_weight, k_weight: [D], dtype of q.
        cos, sin: [L, D/2], fp32, any strides.
        eps: added to the mean square.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, H, D], dtype of q.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k, v and both weights.
    Source: black-forest-labs/flux, modules/layers.py, SingleStreamBlock.forward.
    """
    _checks.heads("q", q)
    _checks.same_heads("k", k, "q", q)
    _checks.same_heads("v", v, "q", q)
    _checks.head_weight("q_weight", q_weight, q)
    _checks.head_weight("k_weight", k_weight, q)
    _checks.rotation("cos", cos, q.shape[1], q)
    _checks.rotation("sin", sin, q.shape[1], q)
    if _dispatch.needs_gradient(q, k, v, q_weight, k_weight):
        q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=eps, backend=backend)
        return attention(q, k, v, backend=backend)
    return _forward(q, k, v, q_weight, k_weight, cos, sin, eps, backend)
