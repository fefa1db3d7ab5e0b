"""A linear layer, with the MLP's activation as its epilogue."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch, measured
from .gelu_tanh import gelu_tanh

ACTIVATIONS = (None, "gelu_tanh")

_forward = _dispatch.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, str? backend) -> Tensor",
    reference.linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_in_place = _dispatch.define(
    "linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, str? activation, bool add,"
    " str? backend) -> ()",
    reference.linear_,
    lambda *_: None,
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


def _products(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    add: bool,
) -> None:
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
        _dispatch.run_into(out, "gelu_tanh", out)


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
    if x.shape[-1] == 0 or _dispatch.load_reason("cpu") is not None or _torch_is_faster(x, weight):
        return _products(out, x, weight, bias, activation, add)
    x, weight = _dispatch.rows(x, weight)
    bias = None if bias is None else bias.contiguous()
    for rows, flat in [(out, x)] if x.ndim <= 3 else _matrices(out, x):
        torch.ops.fluxkern_cpu.linear_(rows, flat, weight, bias, activation, add)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _on_cpu_(out, x, weight, bias, activation, False)
    return out


def _on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _products(out, x, weight, bias, activation, False)
    return out


_dispatch.register("linear", _dispatch.on_cpu(_on_cpu))
_dispatch.register("linear", _dispatch.on_cuda(_on_cuda))
_dispatch.register("linear_", _dispatch.on_cpu(_on_cpu_))
_dispatch.register("linear_", _dispatch.on_cuda(_products))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, None, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        flat = dout.flatten(0, -2) if dout.ndim > 1 else dout.unsqueeze(0)  # [rows, Cout]
        dx = (dout @ weight) if wants_x else None
        dweight = flat.mT @ x.reshape(flat.shape[0], -1) if wants_weight else None
        return dx, dweight, flat.sum(0) if wants_bias else None, None


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
        ValueError: a shape, dtype or device disagrees, the activation is unknown, `add` with what
            it does not go with, or `out` while a tensor needs a gradient; names the argument and
            both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, weight, bias; none with `out`.
    Source: Hendrycks and Gimpel, GELU; black-forest-labs/flux, modules/layers.py.
    """
    _checks.floating("x", x)
    _checks.shape("weight", weight, (None, x.shape[-1]), "[Cout, Cin]")
    _checks.like("weight", weight, "x", x)
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[0],), "[Cout]")
        _checks.like("bias", bias, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if out is not None:
        _check_out(out, x, weight, bias)
    if add and (out is None or bias is not None or activation):
        raise ValueError("add must come with out and without bias and activation")
    if out is not None:
        _in_place(out, x, weight, bias, activation, add, backend)
        return out
    if not _dispatch.needs_gradient(x, weight, bias):
        return _forward(x, weight, bias, activation, backend)
    out = _Linear.apply(x, weight, bias, backend)
    return gelu_tanh(out, backend=backend) if activation else out


def _check_out(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _checks.shape("out", out, (*x.shape[:-1], weight.shape[0]), "[..., Cout]")
    _checks.like("out", out, "x", x)
    _checks.last_axis_contiguous("out", out)
    if _dispatch.needs_gradient(out, x, weight, bias):
        raise ValueError("out must be None where a tensor needs a gradient, got a tensor")
