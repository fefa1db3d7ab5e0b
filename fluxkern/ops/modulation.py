"""The vectors of adaLN: shift, scale and gate from the timestep, guidance and pooled text."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import _checks, _dispatch

_forward = _dispatch.define(
    "modulation(Tensor vec, Tensor weight, Tensor? bias, str? backend) -> Tensor",
    reference.modulation,
    lambda vec, weight, *_: vec.new_empty((*vec.shape[:-1], 1, weight.shape[0])),
)


class _Modulation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vec, weight, bias, backend):
        ctx.save_for_backward(vec, weight)
        return _forward(vec, weight, bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        vec, weight = ctx.saved_tensors
        rows, x = dout.flatten(0, -2), vec.flatten(0, -2)  # [S B, chunks C], [S B, Cin]
        dvec = torch.ops.aten.silu_backward(rows @ weight, x).view_as(vec)
        return dvec, rows.mT @ F.silu(x), rows.sum(0) if ctx.needs_input_grad[2] else None, None


def modulation(
    vec: Tensor, weight: Tensor, bias: Tensor | None, chunks: int, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """SiLU, a linear layer and a split into the vectors of a block.

    out = chunk(silu(vec) weight^T + bias, chunks)

    Args:
        vec: [B, Cin], or [S, B, Cin] for the S steps of a whole schedule; floating point.
        weight: [chunks * C, Cin], dtype of vec.
        bias: [chunks * C], dtype of vec, or None.
        chunks: number of vectors: 6 in a double block, 3 in a single one, 2 in the last layer.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        `chunks` views [B, 1, C] or [S, B, 1, C] of one tensor, row stride chunks * C.

    Raises:
        ValueError: a shape, dtype or device disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: vec, weight, bias.
    Source: Peebles and Xie, DiT; black-forest-labs/flux, modules/layers.py, Modulation.
    """
    _checks.floating("vec", vec)
    if vec.ndim not in (2, 3):
        raise ValueError(f"vec must be [B, Cin] or [S, B, Cin], got {list(vec.shape)}")
    _checks.shape("weight", weight, (None, vec.shape[-1]), "[chunks * C, Cin]")
    _checks.like("weight", weight, "vec", vec)
    _checks.last_axis_contiguous("weight", weight)
    if chunks < 1 or weight.shape[0] % chunks:
        raise ValueError(f"chunks must divide the rows of weight, {weight.shape[0]}, got {chunks}")
    if bias is not None:
        _checks.shape("bias", bias, (weight.shape[0],), "[chunks * C]")
        _checks.like("bias", bias, "vec", vec)
    if _dispatch.needs_gradient(vec, weight, bias):
        out = _Modulation.apply(vec, weight, bias, backend)
    else:
        out = _forward(vec, weight, bias, backend)
    return out.chunk(chunks, -1)
