"""The sinusoidal embedding of timestep and guidance."""

from torch import Tensor

from .. import reference
from . import _checks


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 t, cosines first.

    out = cat(cos(1000 t w), sin(1000 t w)),  w[i] = 10000^(-2 i / dim)

    The product 1000 t is rounded in the dtype of t, as both published implementations do: guidance
    3.5 becomes 3504 in bf16. It has one backend, the reference.

    Args:
        t: [B], floating point, in 0 to 1 for a timestep; guidance as it is.
        dim: even, > 0.

    Returns:
        [B, dim], dtype of t.

    Raises:
        TypeError: t is not a dense tensor.
        ValueError: t is not one-dimensional floating point, or dim is not even and positive.

    Gradients: none are needed; t is no parameter.
    Source: Vaswani et al.; black-forest-labs/flux, modules/layers.py, timestep_embedding.
    """
    _checks.shape({"t": t}, "t", (None,), "[B]")
    _checks.floating({"t": t}, "t")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and positive, got {dim}")
    return reference.timestep_embedding(t, dim)
