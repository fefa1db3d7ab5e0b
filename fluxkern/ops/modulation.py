"""The vectors of adaLN: shift, scale and gate from the timestep, guidance and pooled text."""

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty, matrix


def _check(a: _checks.Args) -> None:
    _checks.floating(a, "vec")
    vec = a["vec"]
    if vec.ndim not in (2, 3):
        raise ValueError(f"vec must be [B, Cin] or [S, B, Cin], got {list(vec.shape)}")
    _checks.last_axis_contiguous(a, "vec")
    _checks.rows(a, "weight", (None, vec.shape[-1]), "[chunks * C, Cin]", "vec")
    if a["bias"] is not None:
        _checks.rows(a, "bias", a["weight"].shape[:1], "[chunks * C]", "vec")


def _gradient(needs: set[str], dout: Tensor, vec: Tensor, weight: Tensor) -> dict[str, Tensor]:
    rows, x = matrix(dout), matrix(vec)  # [S B, chunks C], [S B, Cin]
    s = x.sigmoid()
    dvec = ((rows @ weight) * s * (1 + x * (1 - s))).view_as(vec)
    return {
        "vec": dvec,
        "weight": rows.mT @ F.silu(x) if "weight" in needs else None,
        "bias": rows.sum(0) if "bias" in needs else None,
    }


_op = Op(
    "modulation(Tensor vec, Tensor weight, Tensor? bias) -> (Tensor out)",
    reference.modulation,
    lambda vec, weight, _: empty(vec, (*vec.shape[:-1], 1, weight.shape[0])),
    _check,
    gradient=_gradient,
    autocast="lower",
    flops=lambda vec, weight, _: 2 * vec.numel() * weight.shape[0],
    triton="modulation",
)


def modulation(
    vec: Tensor, weight: Tensor, bias: Tensor | None, chunks: int, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """SiLU, a linear layer and a split into the vectors of a block.

    out = chunk(silu(vec) weight^T + bias, chunks)

    Args:
        vec: [B, Cin], or [S, B, Cin] for the S steps of a whole schedule; floating point,
            last axis contiguous.
        weight: [chunks * C, Cin], dtype of vec, last axis contiguous.
        bias: [chunks * C], dtype of vec, contiguous, or None.
        chunks: number of vectors: 6 in a double block, 3 in a single one, 2 in the last layer.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        `chunks` views [B, 1, C] or [S, B, 1, C] of one tensor, row stride chunks * C.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype or device disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: vec, weight, bias, to any order.
    Source: Peebles and Xie, DiT; black-forest-labs/flux, modules/layers.py, Modulation.
    """
    _checks.integer({"chunks": chunks}, "chunks")
    if isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_nested:
        rows = weight.shape[0]
        if chunks < 1 or rows % chunks:
            raise ValueError(f"chunks must divide the rows of weight, {rows}, got {chunks}")
    return _op(vec, weight, bias, backend).chunk(chunks, -1)
