"""A linear layer whose weight has 8 bits, and whose input is given 8 bits row by row."""

import torch
from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty
from .linear import check_input, check_options, check_out, gemm_flops

MOST_CHANNELS = 65536  # sums of more products can leave int32


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
    a = {"weight": weight}
    _checks.floating(a, "weight")
    _checks.shape(a, "weight", (None, None), "[Cout, Cin]")
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


def _check(a: _checks.Args) -> None:
    check_input(a)
    _check_channels("x", a["x"])
    _checks.last_axis_contiguous(a, "x")
    weight = _checks.shape(a, "weight", (None, a["x"].shape[-1]), "[Cout, Cin]")
    _checks.shape(a, "weight_scale", weight.shape[:1], "[Cout]")
    if weight.dtype != torch.int8:
        raise ValueError(f"weight must be torch.int8, got {weight.dtype}")
    _checks.fp32(a, "weight_scale")
    for name in ("weight", "weight_scale"):
        _checks.last_axis_contiguous(a, name)
        _checks.same_device(a, name, "x")
    channels, rotation = weight.shape[1], a["rotation"]
    if rotation and (not is_rotation(rotation) or channels % rotation):
        raise ValueError(
            f"rotation must be 0 or a power of 4 that divides Cin, {channels}, got {rotation!r}"
        )
    if a["bias"] is not None:
        _checks.rows(a, "bias", weight.shape[:1], "[Cout]", "x")


def _check_in_place(a: _checks.Args) -> None:
    _check(a)
    check_out(a, "weight_scale")


_op = Op(
    "linear_int8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation,"
    " int rotation) -> (Tensor out)",
    reference.linear_int8,
    lambda x, weight, *_: empty(x, (*x.shape[:-1], weight.shape[0])),
    _check,
    gradient=False,
    autocast="lower",
    flops=gemm_flops,
)
_in_place_op = Op(
    "linear_int8_(Tensor(a!) out, Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " str? activation, bool add, int rotation) -> ()",
    reference.linear_int8_,
    check=_check_in_place,
    autocast=None,
    flops=lambda out, *args: gemm_flops(*args),
)


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

    The product of integers is exact, so it is the same on every processor. The two ends of a
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
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype, device or stride disagrees, the activation is unknown, `add`
            with what it does not go with, `out` overlaps itself or an input, or an input needs a
            gradient; names the argument and both
            values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: none.
    Source: Dettmers et al., LLM.int8(), section 2.1: zeropoint quantisation by row and column;
    comfy-kitchen, `int8_linear`, for the rotation.
    """
    check_options(activation, out, bias, add)
    if out is None:
        return _op(x, weight, weight_scale, bias, activation, rotation, backend)
    _in_place_op(out, x, weight, weight_scale, bias, activation, add, rotation, backend)
    return out
