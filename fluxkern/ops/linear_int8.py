"""A linear layer whose weight has 8 bits, and whose input is given 8 bits row by row."""

import torch
from torch import Tensor

from .. import reference
from . import _checks, _dispatch
from .linear import ACTIVATIONS

MOST_CHANNELS = 65536  # sums of more products can leave int32

_forward = _dispatch.define(
    "linear_int8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation,"
    " int rotation, str? backend) -> Tensor",
    reference.linear_int8,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_in_place = _dispatch.define(
    "linear_int8_(Tensor(a!) out, Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " str? activation, bool add, int rotation, str? backend) -> ()",
    reference.linear_int8_,
    lambda *_: None,
)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and weight_scale that `linear_int8` takes, from the weight of a linear layer.

    weight_scale = max |row| / 127;  weight = round(row / weight_scale)

    Args:
        weight: [Cout, Cin], floating point.

    Returns:
        (int8 [Cout, Cin] within -127 .. 127, fp32 [Cout]); a row of zeros has scale 0. A row with a
        NaN or an infinity has scale NaN, and so gives NaN.

    Raises:
        ValueError: `weight` is not a floating [Cout, Cin] of at least one column.
    """
    _checks.floating("weight", weight)
    _checks.shape("weight", weight, (None, None), "[Cout, Cin]")
    _check_channels("weight", weight)
    weight = weight.detach().float()
    scale = torch.linalg.vector_norm(weight, float("inf"), -1) / 127
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(scale < tiny, 0, torch.where(scale.isfinite(), scale, float("nan")))
    inverse = torch.where(scale > 0, 1 / scale, 0)[:, None]
    q = (weight * inverse).round().nan_to_num_(0).clamp_(-127, 127)
    return q.to(torch.int8), scale


def is_rotation(size: object) -> bool:
    """Whether channels can be turned in groups of this size: a power of 4 up to 65536."""
    return type(size) is int and size in [4**n for n in range(1, 9)]


def _check_channels(name: str, tensor: Tensor) -> None:
    if not 1 <= tensor.shape[-1] <= MOST_CHANNELS:
        raise ValueError(f"{name} must have 1 to {MOST_CHANNELS} channels, got {tensor.shape[-1]}")


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    _checks.floating("x", x)
    _check_channels("x", x)
    _checks.last_axis_contiguous("x", x)
    _checks.shape("weight", weight, (None, x.shape[-1]), "[Cout, Cin]")
    _checks.last_axis_contiguous("weight", weight)
    _checks.shape("weight_scale", weight_scale, (weight.shape[0],), "[Cout]")
    _checks.last_axis_contiguous("weight_scale", weight_scale)
    if weight.dtype != torch.int8:
        raise ValueError(f"weight must be torch.int8, got {weight.dtype}")
    if weight_scale.dtype.itemsize < 4 or not weight_scale.is_floating_point():
        raise ValueError(
            f"weight_scale must be torch.float32 or torch.float64, got {weight_scale.dtype}"
        )
    for name, tensor in (("weight", weight), ("weight_scale", weight_scale)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[0],), "[Cout]")
        _checks.like("bias", bias, "x", x)
        _checks.last_axis_contiguous("bias", bias)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
    add: bool = False,
    rotation: int = 0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with an int8 weight, on 8 bits of each row of x; GELU-tanh when asked for.

    scale = (max(x, 0) - min(x, 0)) / 254 of a row;  zero = -127 - round(min(x, 0) / scale)
    q = round(x / scale) + zero, clamped to -127 .. 127
    out = activation(scale * weight_scale * (q - zero) weight^T + bias), or out + the product

    The product of whole numbers is exact, so it is the same on every processor. The two ends of a
    row take all of the 8 bits, also behind a GELU, which has next to nothing below zero.

    Args:
        x: [..., Cin], floating point, last axis contiguous; Cin up to 65536.
        weight: int8 [Cout, Cin], last axis contiguous; rows or columns of a longer weight too.
        weight_scale: fp32 [Cout]; `quantize_int8` makes both.
        bias: [Cout], dtype of x, or None.
        activation: None or "gelu_tanh".
        out: [..., Cout], dtype of x, last axis contiguous, where the result is written, such as the
            rows of one stream in a joint buffer; None makes a new tensor.
        add: the product is added to `out`, without bias and activation.
        rotation: channels that ConvRot has turned together in the weight, a power of 4 that divides
            Cin: those of x are turned too before they are given 8 bits, which spreads outliers;
            0 where it has not.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [..., Cout], dtype of x; `out` where that is given. fp32 inside, rounded once. A row of x
        with a NaN or an infinity gives NaN; one of nothing above 3e-36 counts as zeros.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees, the activation is unknown, `add`
            with what it does not go with, or an input needs a gradient; names the argument and both
            values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: none.
    Source: Dettmers et al., LLM.int8(), section 2.1: zeropoint quantisation by row and column;
    comfy-kitchen, `int8_linear`, for the rotation.
    """
    _check(x, weight, weight_scale, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if _dispatch.needs_gradient(x, weight_scale, bias, out):
        raise ValueError("linear_int8 has no gradient, got an input that needs one")
    if add and (out is None or bias is not None or activation):
        raise ValueError("add must come with out and without bias and activation")
    if rotation and (not is_rotation(rotation) or x.shape[-1] % rotation):
        raise ValueError(
            f"rotation must be 0 or a power of 4 that divides Cin, {x.shape[-1]}, got {rotation!r}"
        )
    if out is None:
        return _forward(x, weight, weight_scale, bias, activation, rotation, backend)
    _checks.shape("out", out, (*x.shape[:-1], weight.shape[0]), "[..., Cout]")
    _checks.like("out", out, "x", x)
    _checks.last_axis_contiguous("out", out)
    _in_place(out, x, weight, weight_scale, bias, activation, add, rotation, backend)
    return out
