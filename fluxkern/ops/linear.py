"""A linear layer, with the MLP's activation as its epilogue."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch
from .gelu_tanh import gelu_tanh

ACTIVATIONS = (None, "gelu_tanh")

_forward = _dispatch.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str? activation, str? backend) -> Tensor",
    reference.linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


PANEL = 1024  # rows of the weight that are widened at a time: 12 MiB at FLUX.1's width


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has arithmetic of its own for the dtype, which torch uses."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype.itemsize >= 4


def _widened_panels(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """fp32 products of a weight that stays as it is in memory but for one panel of rows."""
    tokens, cin, cout = math.prod(x.shape[:-1]), x.shape[-1], weight.shape[0]
    flat = x.reshape(tokens, cin).float()
    out = x.new_empty((tokens, cout))
    panel = flat.new_empty((PANEL, cin))
    for start in range(0, cout, PANEL):
        rows = slice(start, min(start + PANEL, cout))
        wide = panel[: rows.stop - start].copy_(weight[rows])
        part = F.linear(flat, wide, None if bias is None else bias[rows].float())
        part = _dispatch.run("gelu_tanh", None, part) if gelu else part
        out[:, rows] = part
    return out.view(*x.shape[:-1], cout)


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if not _multiplies(x.dtype):
        return _widened_panels(x, weight, bias, activation == "gelu_tanh")
    out = F.linear(x, weight, bias)
    return _dispatch.run("gelu_tanh", None, out) if activation else out


_dispatch.register("linear", _dispatch.on_cpu(_on_cpu))


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
    backend: str | None = None,
) -> Tensor:
    """A linear layer over the last axis, with GELU-tanh after it when asked for.

    out = activation(x weight^T + bias)

    Args:
        x: [..., Cin], floating point.
        weight: [Cout, Cin], dtype of x.
        bias: [Cout], dtype of x, or None.
        activation: None or "gelu_tanh".
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [..., Cout], dtype of x.

    Raises:
        ValueError: a shape, dtype or device disagrees, or the activation is unknown; names the
            argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, weight, bias.
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
    if not _dispatch.needs_gradient(x, weight, bias):
        return _forward(x, weight, bias, activation, backend)
    out = _Linear.apply(x, weight, bias, backend)
    return gelu_tanh(out, backend=backend) if activation else out
