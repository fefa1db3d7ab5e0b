"""GroupNorm and SiLU: the entry of every convolution in the VAE."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _like_x(x: Tensor) -> Tensor:
    """Without values, channels-last where x is."""
    if not _is_channels_last(x):
        return x.new_empty(x.shape)
    b, c, h, w = x.shape
    return x.new_empty((b, h, w, c)).permute(0, 3, 1, 2)


_forward = _dispatch.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps,"
    " str? backend) -> Tensor",
    reference.group_norm_silu,
    lambda x, *_: _like_x(x),
)
_backward = _dispatch.define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, int num_groups,"
    " float eps, str? backend) -> (Tensor, Tensor, Tensor)",
    reference.group_norm_silu_backward,
    lambda dy, x, weight, bias, *_: (_like_x(x), *_dispatch.empty_like_each(weight, bias)),
)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, backend):
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = num_groups, eps, backend
        return _forward(x, weight, bias, num_groups, eps, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # once: a checkpointed block unpacks no more often
        layout = torch.channels_last if _is_channels_last(saved[0]) else torch.contiguous_format
        dy = dy.contiguous(memory_format=layout)
        return *_backward(dy, *saved, *ctx.settings), None, None, None


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm with weights, then SiLU.

    n = (x - mean) / sqrt(var + eps) over each group's channels and all pixels
    out = silu(n * weight + bias)

    Args:
        x: [B, C, H, W], floating point, contiguous or channels-last.
        weight, bias: [C], dtype of x.
        num_groups: divides C.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: a shape, dtype, device or layout disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, weight, bias.
    Source: Wu and He, GroupNorm; black-forest-labs/flux, modules/autoencoder.py, ResnetBlock.
    """
    _checks.shape("x", x, (None, None, None, None), "[B, C, H, W]")
    _checks.floating("x", x)
    if not (x.is_contiguous() or _is_channels_last(x)):
        raise ValueError(f"x must be contiguous or channels-last, got strides {x.stride()}")
    for name, vec in (("weight", weight), ("bias", bias)):
        _checks.shape(name, vec, (x.shape[1],), "[C]")
        _checks.like(name, vec, "x", x)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"num_groups must divide the channels of x, {x.shape[1]}, got {num_groups}"
        )
    if _dispatch.needs_gradient(x, weight, bias):
        return _GroupNormSilu.apply(x, weight, bias, num_groups, eps, backend)
    return _forward(x, weight, bias, num_groups, eps, backend)
