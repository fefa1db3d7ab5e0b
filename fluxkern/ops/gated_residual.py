"""The gated residual that closes every attention and MLP."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch

_forward = _dispatch.define(
    "gated_residual(Tensor x, Tensor y, Tensor gate, str? backend) -> Tensor",
    reference.gated_residual,
    lambda x, *_: x.new_empty(x.shape),
)
_backward = _dispatch.define(
    "gated_residual_backward(Tensor dx_new, Tensor y, Tensor gate, str? backend)"
    " -> (Tensor, Tensor)",
    reference.gated_residual_backward,
    lambda dx_new, y, gate, _: _dispatch.empty_like_each(y, gate),
)
_joint_forward = _dispatch.define(
    "joint_gated_residual(Tensor x, Tensor y, Tensor txt_gate, Tensor img_gate, SymInt txt_len,"
    " str? backend) -> Tensor",
    reference.joint_gated_residual,
    lambda x, *_: x.new_empty(x.shape),
)
_joint_backward = _dispatch.define(
    "joint_gated_residual_backward(Tensor dx_new, Tensor y, Tensor txt_gate, Tensor img_gate,"
    " SymInt txt_len, str? backend) -> (Tensor, Tensor, Tensor)",
    reference.joint_gated_residual_backward,
    lambda dx_new, y, txt_gate, img_gate, *_: _dispatch.empty_like_each(y, txt_gate, img_gate),
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, backend):
        ctx.save_for_backward(y, gate)
        ctx.backend = backend
        return _forward(x, y, gate, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new):
        (dx_new,) = _dispatch.rows(dx_new)
        return dx_new, *_backward(dx_new, *ctx.saved_tensors, ctx.backend), None


class _JointGatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, txt_gate, img_gate, txt_len, backend):
        ctx.save_for_backward(y, txt_gate, img_gate)
        ctx.settings = txt_len, backend
        return _joint_forward(x, y, txt_gate, img_gate, txt_len, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_new):
        (dx_new,) = _dispatch.rows(dx_new)
        grads = _joint_backward(dx_new, *ctx.saved_tensors, *ctx.settings)
        return dx_new, *grads, None, None


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """Adds y, scaled per channel by gate, to the residual stream x.

    out = x + gate * y

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        y: [B, L, C], dtype of x.
        gate: [B, 1, C] or [B, C], dtype of x; may be a chunk view of the modulation.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, y, gate.
    Source: Peebles and Xie, DiT; black-forest-labs/flux, modules/layers.py.
    """
    _checks.tokens("x", x)
    _checks.same_tokens("y", y, "x", x)
    _checks.rows(x, gate=gate)
    if _dispatch.needs_gradient(x, y, gate):
        return _GatedResidual.apply(x, y, gate, backend)
    return _forward(x, y, gate, backend)


def joint_gated_residual(
    x: Tensor,
    y: Tensor,
    txt_gate: Tensor,
    img_gate: Tensor,
    txt_len: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """`gated_residual` on a joint sequence: the first txt_len tokens take txt_gate.

    out[:, :txt_len] = x[:, :txt_len] + txt_gate * y[:, :txt_len]; the others with img_gate

    Args:
        x, y: [B, L, C], text first, same dtype, last axis contiguous.
        txt_gate, img_gate: [B, 1, C] or [B, C], dtype of x.
        txt_len: text tokens, 0 to L.
        backend: as in `gated_residual`.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError, NotImplementedError: as `gated_residual`.

    Gradients: x, y and both gates.
    Source: as `gated_residual`.
    """
    _checks.tokens("x", x)
    _checks.same_tokens("y", y, "x", x)
    _checks.rows(x, txt_gate=txt_gate, img_gate=img_gate)
    _checks.txt_len(txt_len, x.shape[1])
    if _dispatch.needs_gradient(x, y, txt_gate, img_gate):
        return _JointGatedResidual.apply(x, y, txt_gate, img_gate, txt_len, backend)
    return _joint_forward(x, y, txt_gate, img_gate, txt_len, backend)
