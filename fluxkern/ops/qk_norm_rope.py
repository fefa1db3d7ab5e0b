"""RMSNorm of queries and keys over the head dim, then the rotation by position."""

import torch
from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("qk_norm_rope", _dispatch.Backend("reference", reference.qk_norm_rope))
_dispatch.register(
    "joint_qk_norm_rope", _dispatch.Backend("reference", reference.joint_qk_norm_rope)
)
_dispatch.register("qk_norm_rope_", _dispatch.Backend("reference", reference.qk_norm_rope_))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms q and k over the head dim and rotates their pairs (2i, 2i+1).

    n = x / sqrt(mean(x^2) + eps) * weight
    out[2i] = cos[i] n[2i] - sin[i] n[2i+1];  out[2i+1] = sin[i] n[2i] + cos[i] n[2i+1]

    Args:
        q, k: [B, L, H, D], floating point, D even, last axis contiguous; any views.
        q_weight, k_weight: [D], dtype of q.
        cos, sin: [L, D/2], fp32, any strides; the product is rounded once to the dtype of q.
        eps: added to the mean square.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (q, k), each [B, L, H, D], dtype of q.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: q, k and both weights.
    Source: Zhang and Sennrich, RMSNorm; Su et al., RoFormer;
        black-forest-labs/flux, modules/layers.py, QKNorm, and math.py, apply_rope.
    """
    _checks.heads("q", q)
    _checks.same_heads("k", k, "q", q)
    _checks.head_weight("q_weight", q_weight, q)
    _checks.head_weight("k_weight", k_weight, q)
    _checks.rotation("cos", cos, q.shape[1], q)
    _checks.rotation("sin", sin, q.shape[1], q)
    return _dispatch.run("qk_norm_rope", backend, q, k, q_weight, k_weight, cos, sin, eps)


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
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Text and image projections to the joint q, k, v that attention takes, text first.

    q = cat(txt, img) of qk_norm_rope, k likewise; v = cat(txt_v, img_v)

    Args:
        txt_q, txt_k, txt_v: [B, Lt, H, D], floating point, last axis contiguous; any views.
        img_q, img_k, img_v: [B, Li, H, D], dtype of txt_q.
        txt_q_weight, txt_k_weight, img_q_weight, img_k_weight: [D], dtype of txt_q.
        cos, sin: [Lt + Li, D/2], fp32, any strides.
        eps: added to the mean square.
        backend: as in `qk_norm_rope`.

    Returns:
        (q, k, v), each [B, Lt + Li, H, D], dtype of txt_q.

    Raises:
        ValueError, NotImplementedError: as `qk_norm_rope`.

    Gradients: the six projections and four weights.
    Source: black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    _checks.heads("txt_q", txt_q)
    _checks.same_heads("txt_k", txt_k, "txt_q", txt_q)
    _checks.same_heads("txt_v", txt_v, "txt_q", txt_q)
    _checks.same_heads("img_q", img_q, "txt_q", txt_q, any_length=True)
    _checks.same_heads("img_k", img_k, "img_q", img_q)
    _checks.same_heads("img_v", img_v, "img_q", img_q)
    weights = (txt_q_weight, txt_k_weight, img_q_weight, img_k_weight)
    names = ("txt_q_weight", "txt_k_weight", "img_q_weight", "img_k_weight")
    for name, weight in zip(names, weights, strict=True):
        _checks.head_weight(name, weight, txt_q)
    length = txt_q.shape[1] + img_q.shape[1]
    _checks.rotation("cos", cos, length, txt_q)
    _checks.rotation("sin", sin, length, txt_q)
    return _dispatch.run(
        "joint_qk_norm_rope",
        backend,
        txt_q,
        txt_k,
        txt_v,
        img_q,
        img_k,
        img_v,
        *weights,
        cos,
        sin,
        eps,
    )


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
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """`qk_norm_rope` in place on joint views: the first txt_len tokens take the text weights.

    q, k = qk_norm_rope(q, k, ...), written over q and k

    Args:
        q, k: [B, L, H, D], text first, last axis contiguous; overwritten; any views that do not
            overlap.
        txt_q_weight, txt_k_weight, img_q_weight, img_k_weight: [D], dtype of q.
        cos, sin: [L, D/2], fp32, any strides.
        txt_len: text tokens, 0 to L; 0 gives all rows the image weights.
        eps: added to the mean square.
        backend: as in `qk_norm_rope`.

    Returns:
        None.

    Raises:
        ValueError: as `qk_norm_rope`; also when an input needs a gradient.
        NotImplementedError: as `qk_norm_rope`.

    Gradients: none; inference only.
    Source: as `joint_qk_norm_rope`.
    """
    _checks.heads("q", q)
    _checks.same_heads("k", k, "q", q)
    weights = (txt_q_weight, txt_k_weight, img_q_weight, img_k_weight)
    names = ("txt_q_weight", "txt_k_weight", "img_q_weight", "img_k_weight")
    for name, weight in zip(names, weights, strict=True):
        _checks.head_weight(name, weight, q)
    _checks.rotation("cos", cos, q.shape[1], q)
    _checks.rotation("sin", sin, q.shape[1], q)
    _checks.txt_len(txt_len, q.shape[1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, *weights)):
        raise ValueError(
            "qk_norm_rope_ writes over its inputs and has no gradient: one of q, k and the weights "
            "has requires_grad=True, expected False (use qk_norm_rope)"
        )
    _dispatch.run("qk_norm_rope_", backend, q, k, *weights, cos, sin, txt_len, eps)
