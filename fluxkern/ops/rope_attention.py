"""Norm, rotate, attend: the whole of a block between the QKV and the output projection."""

from functools import partial
from typing import Any

from torch import Tensor

from .. import reference
from . import _backends, _checks
from ._op import Op, empty
from .attention import attention, attention_flops, hopper, providers
from .qk_norm_rope import qk_norm_rope


def _check(a: _checks.Args) -> None:
    _checks.heads(a, "q")
    _checks.same_heads(a, "q", "k", "v")
    _checks.head_weights(a, "q", "q_weight", "k_weight")
    _checks.rope_tables(a, "q", a["q"].shape[1])


def _composed(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    *weights_and_tables, eps, backend = rest
    ours = providers.ours(backend)
    q, k = qk_norm_rope(q, k, *weights_and_tables, eps=eps, backend=ours)
    return attention(q, k, v, backend=backend)


_op = Op(
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos,"
    " Tensor sin, float eps) -> (Tensor out)",
    reference.rope_attention,
    lambda q, *_: empty(q),
    _check,
    composed=_composed,
    autocast="lower",
    flops=attention_flops,
    triton="rope_attention",
)


def _by_provider(name: str, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | float) -> Tensor:
    q, k = _backends.run("qk_norm_rope", None, q, k, *rest)
    return providers.attention(name, q, k, v)


def _refused(name: str, *args: object) -> str | None:
    return providers.unsupported(name, *args[2:3] * 3)  # q and k are written anew, shaped as v


for _name in providers.NAMES:
    _backend = _backends.Backend(_name, partial(_by_provider, _name), partial(_refused, _name))
    _backends.register("rope_attention", _backend)
_backends.set_order("rope_attention", lambda *args: providers.order(*args[:1]))
hopper.register()


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
        q_weight, k_weight: [D], dtype of q, contiguous.
        cos, sin: [L, D/2], fp32, any strides.
        eps: added to the mean square.
        backend: as in `attention`; by one of its providers q and k are normed and rotated in a
            launch of ours before it.

    Returns:
        [B, L, H, D], dtype of q.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k, v and both weights, to any order.
    Source: black-forest-labs/flux, modules/layers.py, SingleStreamBlock.forward.
    """
    return _op(q, k, v, q_weight, k_weight, cos, sin, eps, backend)
