"""LayerNorm, scale and shift: adaLN's entry to every attention and MLP."""

from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty, empty_each


def _check(a: _checks.Args) -> None:
    _checks.tokens(a, "x")
    _checks.vectors(a, "scale", "shift")


_backward = Op(
    "norm_modulate_backward(Tensor dh, Tensor x, Tensor scale, SymInt txt_len, float eps)"
    " -> (Tensor dx, Tensor dscale, Tensor dshift)",
    reference.norm_modulate_backward,
    lambda dh, x, scale, *_: empty_each(x, scale, scale),
    triton="norm_modulate",
)
_op = Op(
    "norm_modulate(Tensor x, Tensor scale, Tensor shift, SymInt txt_len, float eps) -> (Tensor h)",
    reference.norm_modulate,
    lambda x, *_: empty(x),
    _check,
    gradient=_backward,
    triton="norm_modulate",
)


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    txt_len: int = 0,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last axis without weights, then scale and shift.

    h = layer_norm(x, eps) * (1 + scale) + shift

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        scale, shift: [B, S, C] or [B, C], dtype of x, last axis contiguous; chunk views of the
            modulation. S = 1: one stream; S = 2: tokens before txt_len take the first, the others
            the second.
        txt_len: text tokens, 0 to L; 0 where S = 1.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        TypeError: an argument is not a dense tensor; names it.
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, scale, shift, to any order.
    Source: Perez et al., FiLM, and Peebles and Xie, DiT (adaLN);
        black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    return _op(x, _checks.vector(scale), _checks.vector(shift), txt_len, eps, backend)
