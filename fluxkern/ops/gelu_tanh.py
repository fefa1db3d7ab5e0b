"""The activation of FLUX's MLPs."""

from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty


def _check(a: _checks.Args) -> None:
    _checks.floating(a, "x")
    _checks.last_axis_contiguous(a, "x")


_backward = Op(
    "gelu_tanh_backward(Tensor dy, Tensor x) -> (Tensor dx)",
    reference.gelu_tanh_backward,
    lambda dy, x: empty(x),
    autocast=None,
    triton="gelu_tanh",
)
_op = Op(
    "gelu_tanh(Tensor x) -> (Tensor y)",
    reference.gelu_tanh,
    empty,
    _check,
    gradient=_backward,
    autocast=None,
    triton="gelu_tanh",
)


def gelu_tanh(x: Tensor, *, backend: str | None = None) -> Tensor:
    """GELU in its tanh form.

    y = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    Args:
        x: any shape, floating point, last axis contiguous.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        Shape and dtype of x.

    Raises:
        TypeError: x is not a dense tensor.
        ValueError: x is not floating point or not contiguous on its last axis.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, to any order.
    Source: Hendrycks and Gimpel, GELU.
    """
    if isinstance(x, Tensor) and x.ndim not in (1, 2, 3):  # what a kernel takes
        _check({"x": x})
        flat = x.flatten(0, -3) if x.ndim else x.reshape(1)
        return _op(flat, backend).view(x.shape)
    return _op(x, backend)
