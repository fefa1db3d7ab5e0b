"""The gated residual and the norm after it, in one pass over the stream."""

from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty_each


def _check(a: _checks.Args) -> None:
    _checks.tokens(a, "x")
    _checks.same_tokens(a, "y", "x")
    _checks.vectors(a, "gate", "scale", "shift")


_backward = Op(
    "gated_residual_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y,"
    " Tensor gate, Tensor scale, SymInt txt_len, float eps)"
    " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dscale, Tensor dshift)",
    reference.gated_residual_norm_modulate_backward,
    lambda dx_new, dh, x_new, y, gate, scale, *_: empty_each(x_new, y, gate, scale, scale),
    triton="gated_residual_norm_modulate",
)
_op = Op(
    "gated_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift,"
    " SymInt txt_len, float eps) -> (Tensor x_new, Tensor h)",
    reference.gated_residual_norm_modulate,
    lambda x, *_: empty_each(x, x),
    _check,
    gradient=_backward,
    triton="gated_residual_norm_modulate",
)


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    txt_len: int = 0,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the gated branch to the residual stream and prepares the next branch's input.

    x_new = x + gate * y;  h = layer_norm(x_new, eps) * (1 + scale) + shift

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        y: [B, L, C], dtype of x.
        gate, scale, shift: [B, S, C] or [B, C], dtype of x, all of one S, last axis contiguous; S
            as in `norm_modulate`.
        txt_len: text tokens, 0 to L; 0 where S = 1.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (x_new, h), both [B, L, C], dtype of x.

    Raises:
        TypeError, ValueError, NotImplementedError: as `norm_modulate`.

    Gradients: all five tensors, to any order.
    Source: black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    gate, scale, shift = _checks.vector(gate), _checks.vector(scale), _checks.vector(shift)
    return _op(x, y, gate, scale, shift, txt_len, eps, backend)
