"""RMSNorm of queries and keys over the head dim, then the rotation by position."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch


def _joint(txt: Tensor, img: Tensor) -> Tensor:
    batch, txt_len, *heads = txt.shape
    return txt.new_empty((batch, txt_len + img.shape[1], *heads))


_forward = _dispatch.define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " float eps, str? backend) -> (Tensor, Tensor)",
    reference.qk_norm_rope,
    lambda q, k, *_: _dispatch.empty_like_each(q, k),
)
_backward = _dispatch.define(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight,"
    " Tensor k_weight, Tensor cos, Tensor sin, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.qk_norm_rope_backward,
    lambda dq_out, dk_out, *args: _dispatch.empty_like_each(*args[:4]),
)
_joint_forward = _dispatch.define(
    "joint_qk_norm_rope(Tensor txt_q, Tensor txt_k, Tensor txt_v, Tensor img_q, Tensor img_k,"
    " Tensor img_v, Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight,"
    " Tensor img_k_weight, Tensor cos, Tensor sin, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    reference.joint_qk_norm_rope,
    lambda txt_q, txt_k, txt_v, img_q, img_k, img_v, *_: (
        _joint(txt_q, img_q),
        _joint(txt_k, img_k),
        _joint(txt_v, img_v),
    ),
)
_joint_backward = _dispatch.define(
    "joint_qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor txt_q, Tensor txt_k,"
    " Tensor img_q, Tensor img_k, Tensor txt_q_weight, Tensor txt_k_weight, Tensor img_q_weight,"
    " Tensor img_k_weight, Tensor cos, Tensor sin, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.joint_qk_norm_rope_backward,
    lambda dq_out, dk_out, *args: _dispatch.empty_like_each(*args[:8]),
)
_in_place = _dispatch.define(
    "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor txt_q_weight, Tensor txt_k_weight,"
    " Tensor img_q_weight, Tensor img_k_weight, Tensor cos, Tensor sin, SymInt txt_len, float eps,"
    " str? backend) -> ()",
    reference.qk_norm_rope_,
    lambda *_: None,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, backend):
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.settings = eps, backend
        return _forward(q, k, q_weight, k_weight, cos, sin, eps, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        gradients = _dispatch.rows(dq_out, dk_out)
        return *_backward(*gradients, *ctx.saved_tensors, *ctx.settings), *[None] * 4


class _JointQKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, txt_q, txt_k, txt_v, img_q, img_k, img_v, *rest):
        *tensors, eps, backend = rest  # four weights, cos, sin
        ctx.save_for_backward(txt_q, txt_k, img_q, img_k, *tensors)
        ctx.settings = eps, backend
        return _joint_forward(txt_q, txt_k, txt_v, img_q, img_k, img_v, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out, dv):
        gradients = _dispatch.rows(dq_out, dk_out)
        saved = ctx.saved_tensors  # once: a checkpointed block unpacks no more often
        grads = _joint_backward(*gradients, *saved, *ctx.settings)
        txt_len = saved[0].shape[1]
        txt, img = (*grads[:2], dv[:, :txt_len]), (*grads[2:4], dv[:, txt_len:])
        return *txt, *img, *grads[4:], *[None] * 4


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
    args = (q, k, q_weight, k_weight, cos, sin, eps, backend)
    return (_QKNormRope.apply if _dispatch.needs_gradient(*args[:4]) else _forward)(*args)


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
    streams = (txt_q, txt_k, txt_v, img_q, img_k, img_v)
    args = (*streams, *weights, cos, sin, eps, backend)
    if _dispatch.needs_gradient(*streams, *weights):
        return _JointQKNormRope.apply(*args)
    return _joint_forward(*args)


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
    _in_place(q, k, *weights, cos, sin, txt_len, eps, backend)
