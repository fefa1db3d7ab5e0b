"""A linear layer, with the MLP's activation as its epilogue."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("linear", _dispatch.Backend("reference", reference.linear))
ACTIVATIONS = (None, "gelu_tanh")


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
    return _dispatch.run("linear", backend, x, weight, bias, activation)
