"""LayerNorm, scale and shift: adaLN's entry to every attention and MLP."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch


def _like_x(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_forward = _dispatch.define(
    "norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps, str? backend) -> Tensor",
    reference.norm_modulate,
    _like_x,
)
_backward = _dispatch.define(
    "norm_modulate_backward(Tensor dh, Tensor x, Tensor scale, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    reference.norm_modulate_backward,
    lambda dh, x, scale, *_: _dispatch.empty_like_each(x, scale, scale),
)
_joint_forward = _dispatch.define(
    "joint_norm_modulate(Tensor x, Tensor txt_scale, Tensor txt_shift, Tensor img_scale,"
    " Tensor img_shift, SymInt txt_len, float eps, str? backend) -> Tensor",
    reference.joint_norm_modulate,
    _like_x,
)
_joint_backward = _dispatch.define(
    "joint_norm_modulate_backward(Tensor dh, Tensor x, Tensor txt_scale, Tensor img_scale,"
    " SymInt txt_len, float eps, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.joint_norm_modulate_backward,
    lambda dh, x, txt, img, *_: _dispatch.empty_like_each(x, txt, txt, img, img),
)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, eps, backend):
        ctx.save_for_backward(x, scale)
        ctx.settings = eps, backend
        return _forward(x, scale, shift, eps, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        (dh,) = _dispatch.rows(dh)
        return *_backward(dh, *ctx.saved_tensors, *ctx.settings), None, None


class _JointNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, txt_scale, txt_shift, img_scale, img_shift, txt_len, eps, backend):
        ctx.save_for_backward(x, txt_scale, img_scale)
        ctx.settings = txt_len, eps, backend
        return _joint_forward(x, txt_scale, txt_shift, img_scale, img_shift, txt_len, eps, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        (dh,) = _dispatch.rows(dh)
        return *_joint_backward(dh, *ctx.saved_tensors, *ctx.settings), None, None, None


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LayerNorm over the last axis without weights, then scale and shift.

    out = layer_norm(x, eps) * (1 + scale) + shift

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        scale: [B, 1, C] or [B, C], dtype of x; may be a chunk view of the modulation.
        shift: like scale.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, scale, shift.
    Source: Perez et al., FiLM, and Peebles and Xie, DiT (adaLN);
        black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    _checks.tokens("x", x)
    _checks.rows(x, scale=scale, shift=shift)
    if _dispatch.needs_gradient(x, scale, shift):
        return _NormModulate.apply(x, scale, shift, eps, backend)
    return _forward(x, scale, shift, eps, backend)


def joint_norm_modulate(
    x: Tensor,
    txt_scale: Tensor,
    txt_shift: Tensor,
    img_scale: Tensor,
    img_shift: Tensor,
    txt_len: int,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """`norm_modulate` on a joint sequence: the first txt_len tokens take the text vectors.

    out[:, :txt_len] = norm_modulate(x[:, :txt_len], txt_scale, txt_shift); the others img's

    Args:
        x: [B, L, C], text first, floating point, last axis contiguous.
        txt_scale, txt_shift, img_scale, img_shift: [B, 1, C] or [B, C], dtype of x.
        txt_len: text tokens, 0 to L.
        eps: added to the variance.
        backend: as in `norm_modulate`.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError, NotImplementedError: as `norm_modulate`.

    Gradients: x and the four vectors.
    Source: as `norm_modulate`.
    """
    _checks.tokens("x", x)
    _checks.rows(
        x, txt_scale=txt_scale, txt_shift=txt_shift, img_scale=img_scale, img_shift=img_shift
    )
    _checks.txt_len(txt_len, x.shape[1])
    args = (x, txt_scale, txt_shift, img_scale, img_shift)
    if _dispatch.needs_gradient(*args):
        return _JointNormModulate.apply(*args, txt_len, eps, backend)
    return _joint_forward(*args, txt_len, eps, backend)
