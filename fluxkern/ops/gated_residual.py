"""The gated residual that closes every attention and MLP."""

from torch import Tensor

from .. import reference
from . import _checks, _dispatch

_dispatch.register("gated_residual", _dispatch.Backend("reference", reference.gated_residual))
_dispatch.register(
    "joint_gated_residual", _dispatch.Backend("reference", reference.joint_gated_residual)
)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """Adds y, scaled per channel by gate, to the residual stream x.

    out = x + gate * y

    Args:
        x: [B, L, C], floating point, last axis contiguous.
        y: [B, L, C], dtype of x.
        gate: [B, 1, C] or [B, C], dtype of x; may be a chunk view of the modulation.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees; names the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: x, y, gate.
    Source: Peebles and Xie, DiT; black-forest-labs/flux, modules/layers.py.
    """
    _checks.tokens("x", x)
    _checks.same_tokens("y", y, "x", x)
    _checks.row("gate", gate, x)
    return _dispatch.run("gated_residual", backend, x, y, gate)


def joint_gated_residual(
    x: Tensor,
    y: Tensor,
    txt_gate: Tensor,
    img_gate: Tensor,
    txt_len: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """`gated_residual` on a joint sequence: the first txt_len tokens take txt_gate.

    out[:, :txt_len] = x[:, :txt_len] + txt_gate * y[:, :txt_len]; the others with img_gate

    Args:
        x, y: [B, L, C], text first, same dtype, last axis contiguous.
        txt_gate, img_gate: [B, 1, C] or [B, C], dtype of x.
        txt_len: text tokens, 0 to L.
        backend: as in `gated_residual`.

    Returns:
        [B, L, C], dtype of x.

    Raises:
        ValueError, NotImplementedError: as `gated_residual`.

    Gradients: x, y and both gates.
    Source: as `gated_residual`.
    """
    _checks.tokens("x", x)
    _checks.same_tokens("y", y, "x", x)
    _checks.row("txt_gate", txt_gate, x)
    _checks.row("img_gate", img_gate, x)
    _checks.txt_len(txt_len, x.shape[1])
    return _dispatch.run("joint_gated_residual", backend, x, y, txt_gate, img_gate, txt_len)
