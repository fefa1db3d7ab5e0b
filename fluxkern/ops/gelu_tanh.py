"""The activation of FLUX's MLPs."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch

_forward = _dispatch.define(
    "gelu_tanh(Tensor x, str? backend) -> Tensor",
    reference.gelu_tanh,
    lambda x, _: x.new_empty(x.shape),
)
_backward = _dispatch.define(
    "gelu_tanh_backward(Tensor dy, Tensor x, str? backend) -> Tensor",
    reference.gelu_tanh_backward,
    lambda dy, x, _: x.new_empty(x.shape),
)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, backend):
        ctx.save_for_backward(x)
        ctx.backend = backend
        return _forward(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (dy,) = _dispatch.rows(dy)
        return _backward(dy, *ctx.saved_tensors, ctx.backend), None


def gelu_tanh(x: Tensor, *, backend: str | None = None) -> Tensor:
    """GELU in its tanh form.

    out = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    Args:
        x: any shape, floating point, last axis contiguous.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: x is not floating point or not contiguous on its last axis.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x.
    Source: Hendrycks and Gimpel, GELU.
    """
    _checks.floating("x", x)
    if x.ndim:
        _checks.last_axis_contiguous("x", x)
    if x.ndim not in (1, 2, 3):  # what a kernel takes
        flat = x.flatten(0, -3) if x.ndim else x.reshape(1)
        return gelu_tanh(flat, backend=backend).view(x.shape)
    if _dispatch.needs_gradient(x):
        return _GeluTanh.apply(x, backend)
    return _forward(x, backend)
