"""Norm, rotate, attend: the whole of a block between the QKV and the output projection."""

from functools import partial

from torch import Tensor

from .. import reference
from . import _attention_providers as providers
from . import _checks, _dispatch
from .attention import attention
from .qk_norm_rope import qk_norm_rope

_forward = _dispatch.define(
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos,"
    " Tensor sin, float eps, str? backend) -> Tensor",
    reference.rope_attention,
    lambda q, *_: q.new_empty(q.shape),
)


def _by_provider(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    q, k = _dispatch.run("qk_norm_rope", None, q, k, q_weight, k_weight, cos, sin, eps)
    return providers.attention(name, q, k, v)


def _refused(name: str, *args: object) -> str | None:
    return providers.unsupported(name, *args[2:3] * 3)  # q and k are written anew, shaped as v


for _name in providers.NAMES:
    _backend = _dispatch.Backend(_name, partial(_by_provider, _name), partial(_refused, _name))
    _dispatch.register("rope_attention", _backend)
_dispatch.set_order("rope_attention", lambda *args: providers.order(*args[:1]))


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
        backend: as in `attention`; by one of its providers q and k are normed and rotated in a
            launch of ours before it.

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
        ours = _dispatch.ours(backend)
        q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=eps, backend=ours)
        return attention(q, k, v, backend=backend)
    return _forward(q, k, v, q_weight, k_weight, cos, sin, eps, backend)
