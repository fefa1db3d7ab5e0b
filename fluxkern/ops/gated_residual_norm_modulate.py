"""`gated_residual` and the `norm_modulate` that follows it, in one pass over the stream."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch

_forward = _dispatch.define(
    "gated_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift,"
    " float eps, str? backend) -> (Tensor, Tensor)",
    reference.gated_residual_norm_modulate,
    lambda x, *_: _dispatch.empty_like_each(x, x),
)
_backward = _dispatch.define(
    "gated_residual_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y,"
    " Tensor gate, Tensor scale, float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gated_residual_norm_modulate_backward,
    lambda dx_new, dh, x_new, y, gate, scale, *_: _dispatch.empty_like_each(
        x_new, y, gate, scale, scale
    ),
)
_joint_forward = _dispatch.define(
    "joint_gated_residual_norm_modulate(Tensor x, Tensor y, Tensor txt_gate, Tensor txt_scale,"
    " Tensor txt_shift, Tensor img_gate, Tensor img_scale, Tensor img_shift, SymInt txt_len,"
    " float eps, str? backend) -> (Tensor, Tensor)",
    reference.joint_gated_residual_norm_modulate,
    lambda x, *_: _dispatch.empty_like_each(x, x),
)
_joint_backward = _dispatch.define(
    "joint_gated_residual_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y,"
    " Tensor txt_gate, Tensor txt_scale, Tensor img_gate, Tensor img_scale, SymInt txt_len,"
    " float eps, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.joint_gated_residual_norm_modulate_backward,
    lambda dx_new, dh, x_new, y, txt_gate, txt_scale, img_gate, img_scale, *_: (
        _dispatch.empty_like_each(
            x_new, y, txt_gate, txt_scale, txt_scale, img_gate, img_scale, img_scale
        )
    ),
)


class _GatedResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, scale, shift, eps, backend):
        x_new, h = _forward(x, y, gate, scale, shift, eps, backend)
        ctx.save_for_backward(x_new, y, gate, scale)
        ctx.settings = eps, backend
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new, dh):
        dx_new, dh = _dispatch.rows(dx_new, dh)
        return *_backward(dx_new, dh, *ctx.saved_tensors, *ctx.settings), None, None


class _JointGatedResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        y,
        txt_gate,
        txt_scale,
        txt_shift,
        img_gate,
        img_scale,
        img_shift,
        txt_len,
        eps,
        backend,
    ):
        txt, img = (txt_gate, txt_scale, txt_shift), (img_gate, img_scale, img_shift)
        x_new, h = _joint_forward(x, y, *txt, *img, txt_len, eps, backend)
        ctx.save_for_backward(x_new, y, *txt[:2], *img[:2])
        ctx.settings = txt_len, eps, backend
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new, dh):
        dx_new, dh = _dispatch.rows(dx_new, dh)
        return *_joint_backward(dx_new, dh, *ctx.saved_tensors, *ctx.settings), None, None, None


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the gated branch to the residual stream and prepares the next branch's input.

    x_new = x + gate * y;  h = layer_norm(x_new, eps) * (1 + scale) + shift

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        y: [B, L, C], dtype of x.
        gate, scale, shift: [B, 1, C] or [B, C], dtype of x; may be chunk views of the modulation.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (x_new, h), both [B, L, C], dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: all five tensors.
    Source: black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    _checks.tokens("x", x)
    _checks.same_tokens("y", y, "x", x)
    _checks.rows(x, gate=gate, scale=scale, shift=shift)
    args = (x, y, gate, scale, shift)
    if _dispatch.needs_gradient(*args):
        return _GatedResidualNormModulate.apply(*args, eps, backend)
    return _forward(*args, eps, backend)


def joint_gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    txt_gate: Tensor,
    txt_scale: Tensor,
    txt_shift: Tensor,
    img_gate: Tensor,
    img_scale: Tensor,
    img_shift: Tensor,
    txt_len: int,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_residual_norm_modulate` on a joint sequence: the first txt_len tokens take txt_*.

    (x_new, h) of the text rows with the text vectors, of the others with the image vectors

    Args:
        x, y: [B, L, C], text first, same dtype, last axis contiguous.
        txt_gate, txt_scale, txt_shift, img_gate, img_scale, img_shift: [B, 1, C] or [B, C],
            dtype of x.
        txt_len: text tokens, 0 to L.
        eps: added to the variance.
        backend: as in `gated_residual_norm_modulate`.

    Returns:
        (x_new, h), both [B, L, C], dtype of x.

    Raises:
        ValueError, NotImplementedError: as `gated_residual_norm_modulate`.

    Gradients: all eight tensors.
    Source: as `gated_residual_norm_modulate`.
    """
    _checks.tokens("x", x)
    _checks.same_tokens("y", y, "x", x)
    _checks.rows(
        x,
        txt_gate=txt_gate,
        txt_scale=txt_scale,
        txt_shift=txt_shift,
        img_gate=img_gate,
        img_scale=img_scale,
        img_shift=img_shift,
    )
    _checks.txt_len(txt_len, x.shape[1])
    args = (x, y, txt_gate, txt_scale, txt_shift, img_gate, img_scale, img_shift)
    if _dispatch.needs_gradient(*args):
        return _JointGatedResidualNormModulate.apply(*args, txt_len, eps, backend)
    return _joint_forward(*args, txt_len, eps, backend)
