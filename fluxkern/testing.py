"""Right or wrong: the error of a backend against fp64, measured by the reference's own error.

An op in a low precision cannot be exact, so it is held to what plain PyTorch loses in the same
dtype: at most twice that, plus the rounding of the result itself and of fp32 arithmetic, in which
every kernel computes. Written once, here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

FIXED = ("cos", "sin")  # tensors without a gradient


def meaning(op: str) -> Callable:
    """The plain composition, with the signature of the public function."""
    if op != "modulation":
        return getattr(reference, op)
    return lambda chunks, **args: reference.modulation(**args).chunk(chunks, -1)


def torch_op(op: str) -> Any:
    return getattr(torch.ops.fluxkern, op).default


def in_schema_order(op: str, args: dict[str, Any], backend: str) -> tuple:
    """The arguments as the torch op takes them."""
    values = dict(args) | {"eps": 1e-6, "backend": backend}
    return tuple(values[a.name] for a in torch_op(op)._schema.arguments)


def leaves(args: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that have a gradient."""
    return {n: v for n, v in args.items() if isinstance(v, Tensor) and n not in FIXED}


def copied(args: dict[str, Any]) -> dict[str, Any]:
    """Fresh values with the same strides and offsets: an op in place leaves `args` alone."""

    def copy(value: Tensor) -> Tensor:
        storage = value.untyped_storage().clone()
        return value.new_empty(0).set_(storage, value.storage_offset(), value.shape, value.stride())

    return {name: copy(v) if isinstance(v, Tensor) else v for name, v in args.items()}


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


def readable(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """e4m3 and its scales as the numbers that they stand for, and the scales; else as it is."""
    if not out or out[0].dtype != reference.FP8:
        return out
    q, row_scale = out
    return q.to(row_scale.dtype) * row_scale, row_scale


def exact_results(op: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results in fp64; of an op that writes e4m3, what its rows are before they are rounded."""
    args = widened(copied(args))
    if not op.endswith("_fp8"):
        return outputs(meaning(op), args)
    (row,) = outputs(meaning(op.removesuffix("_fp8")), args)
    return row, row.abs().amax(-1, keepdim=True) / torch.finfo(reference.FP8).max


def gradients(run: Callable, args: dict[str, Any], dout: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of every tensor of `args` that has one, by autograd through `run`."""
    args = args | {n: v.detach().requires_grad_() for n, v in leaves(args).items()}
    out = outputs(run, args)
    dout = tuple(d.to(o.dtype) for d, o in zip(dout, out, strict=True))
    return torch.autograd.grad(out, list(leaves(args).values()), dout)


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
