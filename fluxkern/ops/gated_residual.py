"""The gated residual: how every branch of a block comes back to its stream."""

from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty, empty_each


def _check(a: _checks.Args) -> None:
    _checks.tokens(a, "x")
    _checks.same_tokens(a, "y", "x")
    _checks.vectors(a, "gate")


_backward = Op(
    "gated_residual_backward(Tensor dx_new, Tensor y, Tensor gate, SymInt txt_len)"
    " -> (Tensor dy, Tensor dgate)",
    reference.gated_residual_backward,
    lambda dx_new, y, gate, *_: empty_each(y, gate),
    triton="gated_residual",
)

_op = Op(
    "gated_residual(Tensor x, Tensor y, Tensor gate, SymInt txt_len) -> (Tensor x_new)",
    reference.gated_residual,
    lambda x, *_: empty(x),
    _check,
    gradient=_backward,
    passed_on=lambda dx_new: {"x": dx_new},
    autocast="promote",
    triton="gated_residual",
)


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, txt_len: int = 0, *, backend: str | None = None
) -> Tensor:
    """Adds the gated branch to the residual stream.

    x_new = x + gate * y

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        y: [B, L, C], dtype of x.
        gate: [B, S, C] or [B, C], dtype of x, last axis contiguous; S as in `norm_modulate`.
        txt_len: text tokens, 0 to L; 0 where S = 1.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        TypeError, ValueError, NotImplementedError: as `norm_modulate`.

    Gradients: x, y, gate, to any order.
    Source: black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    return _op(x, y, _checks.vector(gate), txt_len, backend)
