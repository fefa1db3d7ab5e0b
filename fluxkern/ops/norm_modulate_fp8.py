"""adaLN's entry to a product in 8 bits: LayerNorm, scale and shift, written in e4m3."""

import torch
from torch import Tensor

from .. import reference
from . import _checks, _dispatch


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Without values: e4m3 of the shape of x, and fp32 [..., 1]."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=reference.FP8), scale


def check_fp8(op: str, x: Tensor, *vectors: Tensor) -> None:
    """What every op that writes rows in e4m3 asks of its inputs."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a channel at least, got shape {list(x.shape)}")
    if _dispatch.needs_gradient(x, *vectors):
        raise ValueError(f"{op} has no gradient, got an input that needs one")


_forward = _dispatch.define(
    "norm_modulate_fp8(Tensor x, Tensor scale, Tensor shift, float eps, str? backend)"
    " -> (Tensor, Tensor)",
    reference.norm_modulate_fp8,
    lambda x, *_: fp8_rows(x),
)


def norm_modulate_fp8(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`norm_modulate`, its rows in e4m3 with one scale each: the input of a product in 8 bits.

    h = layer_norm(x, eps) * (1 + scale) + shift
    row_scale = max |h| / 448 of a row;  h_fp8 = round(h / row_scale);  h ~ h_fp8 * row_scale

    With a weight [Cout, C] as (e4m3 weight, fp32 weight_scale [Cout, 1]) of the same convention,
    `torch._scaled_mm(h_fp8.flatten(0, 1), weight.t(), scale_a=row_scale.flatten(0, 1),
    scale_b=weight_scale.t(), out_dtype=torch.bfloat16)` is the linear layer.

    Args:
        x: [B, L, C], floating point, C at least 1, last axis contiguous.
        scale: [B, 1, C] or [B, C], dtype of x; may be a chunk view of the modulation.
        shift: like scale.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (h_fp8, row_scale): float8_e4m3fn [B, L, C], float32 [B, L, 1]. A kernel computes in fp32
        and rounds once. A row of nothing above 5.3e-36 counts as zeros, with scale 0; one with a
        NaN or an infinity gives NaN when it is multiplied.

    Raises:
        ValueError: a shape, dtype, device or stride disagrees, or an input needs a gradient; names
            the argument and both values.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: none; `norm_modulate` has one.
    Source: Micikevicius et al., FP8 Formats for Deep Learning; `torch._scaled_mm`, rowwise scales.
    """
    _checks.tokens("x", x)
    _checks.rows(x, scale=scale, shift=shift)
    check_fp8("norm_modulate_fp8", x, scale, shift)
    return _forward(x, scale, shift, eps, backend)
