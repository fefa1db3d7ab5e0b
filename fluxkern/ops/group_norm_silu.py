"""GroupNorm and SiLU: the entry of every convolution in the VAE."""

import torch
from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty, empty_each


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _like_x(x: Tensor) -> Tensor:
    """Without values, channels-last where x is."""
    if not _is_channels_last(x):
        return empty(x)
    b, c, h, w = x.shape
    return empty(x, (b, h, w, c)).permute(0, 3, 1, 2)


def _check(a: _checks.Args) -> None:
    x = _checks.shape(a, "x", (None, None, None, None), "[B, C, H, W]")
    _checks.floating(a, "x")
    if _checks.has_strides() and not (x.is_contiguous() or _is_channels_last(x)):
        raise ValueError(f"x must be contiguous or channels-last, got strides {x.stride()}")
    channels, num_groups = x.shape[1], a["num_groups"]
    _checks.integer(a, "num_groups")
    for name in ("weight", "bias"):
        _checks.rows(a, name, (channels,), "[C]", "x")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the channels of x, {channels}, got {num_groups}")


_backward = Op(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, int num_groups,"
    " float eps) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference.group_norm_silu_backward,
    lambda dy, x, weight, bias, *_: (_like_x(x), *empty_each(weight, bias)),
    triton="group_norm_silu",
)


def _gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    backend: str | None,
) -> dict[str, Tensor]:
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    dy = dy.contiguous(memory_format=layout)
    found = _backward(dy, x, weight, bias, num_groups, eps, backend)
    return dict(zip(("x", "weight", "bias"), found, strict=True))


_op = Op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps)"
    " -> (Tensor y)",
    reference.group_norm_silu,
    lambda x, *_: _like_x(x),
    _check,
    gradient=_gradient,
    triton="group_norm_silu",
)


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
        weight, bias: [C], dtype of x, contiguous.
        num_groups: divides C.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype, device or layout disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, weight, bias, to any order.
    Source: Wu and He, GroupNorm; black-forest-labs/flux, modules/autoencoder.py, ResnetBlock.
    """
    return _op(x, weight, bias, num_groups, eps, backend)
