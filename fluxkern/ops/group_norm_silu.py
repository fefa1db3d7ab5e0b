"""GroupNorm and SiLU: the entry of every convolution in the VAE."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("group_norm_silu", _dispatch.Backend("reference", reference.group_norm_silu))


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm with weights, then SiLU.

    n = (x - mean) / sqrt(var + eps) over each group's channels and all pixels
    out = silu(n * weight + bias)

    Args:
        x: [B, C, H, W], floating point, contiguous or channels-last.
        weight, bias: [C], dtype of x.
        num_groups: divides C.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: a shape, dtype or device disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, weight, bias.
    Source: Wu and He, GroupNorm; black-forest-labs/flux, modules/autoencoder.py, ResnetBlock.
    """
    _checks.shape("x", x, (None, None, None, None), "[B, C, H, W]")
    _checks.floating("x", x)
    for name, vec in (("weight", weight), ("bias", bias)):
        _checks.shape(name, vec, (x.shape[1],), "[C]")
        _checks.like(name, vec, "x", x)
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"num_groups must divide the channels of x, {x.shape[1]}, got {num_groups}"
        )
    return _dispatch.run("group_norm_silu", backend, x, weight, bias, num_groups, eps)
