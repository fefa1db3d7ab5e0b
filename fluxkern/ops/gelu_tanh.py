"""The activation of FLUX's MLPs."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("gelu_tanh", _dispatch.Backend("reference", reference.gelu_tanh))


def gelu_tanh(x: Tensor, *, backend: str | None = None) -> Tensor:
    """GELU in its tanh form.

    out = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    Args:
        x: any shape, floating point, last axis contiguous.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: x is not floating point or not contiguous on its last axis.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x.
    Source: Hendrycks and Gimpel, GELU.
    """
    _checks.floating("x", x)
    if x.ndim:
        _checks.last_axis_contiguous("x", x)
    return _dispatch.run("gelu_tanh", backend, x)
