"""LayerNorm, scale and shift: adaLN's entry to every attention and MLP."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("norm_modulate", _dispatch.Backend("reference", reference.norm_modulate))
_dispatch.register(
    "joint_norm_modulate", _dispatch.Backend("reference", reference.joint_norm_modulate)
)


def norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LayerNorm over the last axis without weights, then scale and shift.

    out = layer_norm(x, eps) * (1 + scale) + shift

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        scale: [B, 1, C] or [B, C], dtype of x; may be a chunk view of the modulation.
        shift: like scale.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, scale, shift.
    Source: Perez et al., FiLM, and Peebles and Xie, DiT (adaLN);
        black-forest-labs/flux, modules/layers.py, DoubleStreamBlock.forward.
    """
    _checks.tokens("x", x)
    _checks.row("scale", scale, x)
    _checks.row("shift", shift, x)
    return _dispatch.run("norm_modulate", backend, x, scale, shift, eps)


def joint_norm_modulate(
    x: Tensor,
    txt_scale: Tensor,
    txt_shift: Tensor,
    img_scale: Tensor,
    img_shift: Tensor,
    txt_len: int,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """`norm_modulate` on a joint sequence: the first txt_len tokens take the text vectors.

    out[:, :txt_len] = norm_modulate(x[:, :txt_len], txt_scale, txt_shift); the others img's

    Args:
        x: [B, L, C], text first, floating point, last axis contiguous.
        txt_scale, txt_shift, img_scale, img_shift: [B, 1, C] or [B, C], dtype of x.
        txt_len: text tokens, 0 to L.
        eps: added to the variance.
        backend: as in `norm_modulate`.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError, NotImplementedError: as `norm_modulate`.

    Gradients: x and the four vectors.
    Source: as `norm_modulate`.
    """
    _checks.tokens("x", x)
    for name, vec in (
        ("txt_scale", txt_scale),
        ("txt_shift", txt_shift),
        ("img_scale", img_scale),
        ("img_shift", img_shift),
    ):
        _checks.row(name, vec, x)
    _checks.txt_len(txt_len, x.shape[1])
    return _dispatch.run(
        "joint_norm_modulate",
        backend,
        x,
        txt_scale,
        txt_shift,
        img_scale,
        img_shift,
        txt_len,
        eps,
    )
