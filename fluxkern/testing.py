"""Right or wrong: the error of a backend against fp64, measured by the reference's own error.

An op in a low precision cannot be exact, so it is held to what plain PyTorch loses in the same
dtype: at most twice that, plus the rounding of the result itself and of fp32 arithmetic, in which
every kernel computes. Written once, here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def widened(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in fp64, strides kept."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }


def outputs(function: Callable, args: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    """What a function returns, as a tuple; of an op that returns None, the q and k it wrote."""
    out = function(**args, **more)
    if out is None:
        return args["q"], args["k"]
    return out if isinstance(out, tuple) else (out,)


FP32_UNITS = 4  # of fp32 rounding, for another order of a sum; inputs of a test are of order one


def rounding_floor(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Per element: rounding near 0.3 in this dtype (flash-attention's rule), that of the exact
    result, which must pass, and fp32's own."""
    rounded = truth.to(dtype)
    near = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().double()
    result = torch.finfo(dtype).eps / 2 * truth.abs()
    return near + result + FP32_UNITS * torch.finfo(torch.float32).eps * (1 + truth.abs())


def errors(out: Tensor, truth: Tensor, reference: Tensor) -> dict[str, float]:
    """Largest and mean error of `out`, and what is allowed of each.

    Args:
        out: result under test.
        truth: the same in fp64.
        reference: the reference's result in the dtype of `out`.
    """
    error = (out.double() - truth).abs()
    own = (reference.double() - truth).abs()
    floor = rounding_floor(truth, out.dtype)
    return {
        "max": float(error.max()),
        "max allowed": float(2 * own.max() + floor.max()),
        "mean": float(error.mean()),
        "mean allowed": float(1.5 * own.mean() + floor.mean()),
    }


def assert_accurate(out: Tensor, truth: Tensor, reference: Tensor, what: str = "result") -> None:
    """Raises AssertionError, with both values, unless `out` obeys the 2x rule.

    Args:
        out: result under test, any dtype and device.
        truth: fp64, same shape and device.
        reference: the reference's result in the dtype of `out`.
        what: name of the result in the message.
    """
    assert out.shape == truth.shape, f"{what} must be {list(truth.shape)}, got {list(out.shape)}"
    assert out.dtype == reference.dtype, f"{what} must be {reference.dtype}, got {out.dtype}"
    if not out.numel():
        return
    assert not out.isnan().any() or truth.isnan().any(), f"{what} holds NaN"
    found = errors(out, truth, reference)
    for kind in ("max", "mean"):
        error, allowed = found[kind], found[f"{kind} allowed"]
        assert error <= allowed, f"{what}: {kind} error must be <= {allowed:.3g}, got {error:.3g}"
