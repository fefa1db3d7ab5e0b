"""A linear layer, with the MLP's activation as its epilogue."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .. import reference
from . import _backends, _checks, _load, measured
from ._op import Op, dense, empty, matrix
from .gelu_tanh import gelu_tanh

ACTIVATIONS = (None, "gelu_tanh")


def check_options(activation: str | None, out: Tensor | None, bias: object, add: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if add and (out is None or bias is not None or activation):
        raise ValueError("add must come with out and without bias and activation")


def check_out(a: _checks.Args, *others: str) -> None:
    """[..., Cout] that is written over."""
    expected = (*a["x"].shape[:-1], a["weight"].shape[0])
    _checks.rows(a, "out", expected, "[..., Cout]", "x")
    _checks.written(a, "out", "x", "weight", "bias", *others)


def check_input(a: _checks.Args) -> None:
    _checks.floating(a, "x")
    if not a["x"].ndim:
        raise ValueError("x must be [..., Cin], got []")


def _check(a: _checks.Args) -> None:
    check_input(a)
    _checks.shape(a, "weight", (None, a["x"].shape[-1]), "[Cout, Cin]")
    _checks.like(a, "weight", "x")
    if a["bias"] is not None:
        _checks.shape(a, "bias", a["weight"].shape[:1], "[Cout]")
        _checks.like(a, "bias", "x")


def _check_in_place(a: _checks.Args) -> None:
    _check(a)
    check_out(a)


def _gradient(needs: set[str], dout: Tensor, x: Tensor, weight: Tensor) -> dict[str, Tensor | None]:
    flat = matrix(dout)
    return {
        "x": dout @ weight if "x" in needs else None,
        "weight": flat.mT @ matrix(x) if "weight" in needs else None,
        "bias": flat.sum(0) if "bias" in needs else None,
    }


def _with_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str | None
) -> Tensor | None:
    if activation is None:
        return None
    return gelu_tanh(_op(x, weight, bias, None, backend), backend=backend)


def gemm_flops(x: Tensor, weight: Tensor, *_: object) -> int:
    return 2 * x.numel() * weight.shape[0]


_op = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation) -> (Tensor out)",
    reference.linear,
    lambda x, weight, *_: empty(x, (*x.shape[:-1], weight.shape[0])),
    _check,
    gradient=_gradient,
    composed=_with_activation,
    autocast="lower",
    flops=gemm_flops,
)
_in_place_op = Op(
    "linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, str? activation, bool add)"
    " -> ()",
    reference.linear_,
    check=_check_in_place,
    autocast=None,
    flops=lambda out, *args: gemm_flops(*args),
)


FEW = 4  # rows of x that are worth packing the weight for


@cache
def _fp32_kernel_is_faster() -> bool:
    """Measured on AMD, where it is 1.0 to 1.5 times MKL's; not on Intel, whose MKL is."""
    cpu = measured.device_name(torch.device("cpu"))
    return torch.ops.fluxkern_cpu._isa() != "baseline" and "Intel" not in cpu


def _torch_is_faster(x: Tensor, weight: Tensor) -> bool:
    if x.numel() < FEW * x.shape[-1]:
        return True
    if x.dtype == torch.bfloat16:  # arithmetic of its own
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    copies = weight.stride(-1) != 1 or x.stride(-1) != 1  # ours would; MKL takes any strides
    return x.dtype == torch.float32 and (copies or not _fp32_kernel_is_faster())


def _matrices(out: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as [rows, C] views: one pair where the rows lie evenly, else one a batch element."""
    if x.ndim == 2:
        yield out, x
    elif x.ndim == 1 or x.shape[0] == 1:
        yield from _matrices(*((out[None], x[None]) if x.ndim == 1 else (out[0], x[0])))
    elif out.is_contiguous() and x.is_contiguous():
        yield out.flatten(0, -2), x.flatten(0, -2)
    else:
        for one_out, one in zip(out, x, strict=True):
            yield from _matrices(one_out, one)


def _gemms(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    add: bool,
) -> None:
    a = {"out": out, "x": x, "weight": weight, "bias": bias}
    _check_in_place(a)  # torch's own would broadcast a bias, and make out larger
    in_epilogue = activation is not None and _has_gelu_epilogue(x, bias)
    for rows, flat in _matrices(out, x):
        onto = rows if add else bias
        if onto is None:
            torch.mm(flat, weight.t(), out=rows)
        elif in_epilogue:
            torch._addmm_activation(bias, flat, weight.t(), use_gelu=True, out=rows)
        else:
            torch.addmm(onto, flat, weight.t(), out=rows)
    if activation and not in_epilogue:
        _backends.run_into(out, "gelu_tanh", out)


def _has_gelu_epilogue(x: Tensor, bias: Tensor | None) -> bool:
    """Whether torch._addmm_activation is GELU-tanh here: cuBLASLt's is, a CPU's is the erf form.

    In fp32 its tanh is an approximation that the rounding of half precision hides.
    """
    return x.is_cuda and x.dtype.itemsize == 2 and bias is not None


def _on_cpu_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    add: bool,
) -> None:
    if not all(x.shape[-1:] or (0,)) or _load.load_reason("cpu") or _torch_is_faster(x, weight):
        return _gemms(out, x, weight, bias, activation, add)
    bias = None if bias is None else bias.contiguous()
    torch.ops.fluxkern_cpu.linear_(out, dense(x), dense(weight), bias, activation, add)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = empty(x, (*x.shape[:-1], weight.shape[0]))
    _on_cpu_(out, x, weight, bias, activation, False)
    return out


def _on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = empty(x, (*x.shape[:-1], weight.shape[0]))
    _gemms(out, x, weight, bias, activation, False)
    return out


for _name, _cpu, _cuda in (("linear", _on_cpu, _on_cuda), ("linear_", _on_cpu_, _gemms)):
    _backends.register(_name, _backends.on_cpu(_cpu, checks=True))
    _backends.register(_name, _backends.on_cuda(_cuda, checks=True))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out: Tensor | None = None,
    add: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A linear layer over the last axis, with GELU-tanh after it when asked for.

    out = activation(x weight^T + bias), or out + x weight^T

    Args:
        x: [..., Cin], floating point.
        weight: [Cout, Cin], dtype of x; rows or columns of a longer weight too.
        bias: [Cout], dtype of x, or None.
        activation: None or "gelu_tanh".
        out: [..., Cout], dtype of x, last axis contiguous, where the result is written, such as the
            rows of one stream in a joint buffer; None makes a new tensor.
        add: the product is added to `out`, without bias and activation.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [..., Cout], dtype of x; `out` where that is given.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype or device disagrees, the activation is unknown, `add` with what
            it does not go with, `out` overlaps itself or an input, or a tensor needs a gradient
            beside `out`; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, weight, bias, to any order; none with `out`.
    Source: Hendrycks and Gimpel, GELU; black-forest-labs/flux, modules/layers.py.
    """
    check_options(activation, out, bias, add)
    if out is None:
        return _op(x, weight, bias, activation, backend)
    _in_place_op(out, x, weight, bias, activation, add, backend)
    return out
