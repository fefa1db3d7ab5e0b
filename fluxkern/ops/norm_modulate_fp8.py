"""adaLN's entry to a GEMM in 8 bits: LayerNorm, scale and shift, written in e4m3."""

import torch
from torch import Tensor

from .. import reference
from . import _checks
from ._op import Op, empty


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Without values: e4m3 of the shape of x, and fp32 [..., 1]."""
    return empty(x, dtype=reference.FP8), empty(x, (*x.shape[:-1], 1), torch.float32)


def check_channels(a: _checks.Args) -> None:
    """What every op that writes rows in e4m3 asks of its input."""
    _checks.floating(a, "x")
    x = a["x"]
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a channel at least, got shape {list(x.shape)}")
    _checks.last_axis_contiguous(a, "x")


def _check(a: _checks.Args) -> None:
    _checks.tokens(a, "x")
    check_channels(a)
    _checks.vectors(a, "scale", "shift")


_op = Op(
    "norm_modulate_fp8(Tensor x, Tensor scale, Tensor shift, SymInt txt_len, float eps)"
    " -> (Tensor h, Tensor row_scale)",
    reference.norm_modulate_fp8,
    lambda x, *_: fp8_rows(x),
    _check,
    gradient=False,
    triton="norm_modulate_fp8",
)


def norm_modulate_fp8(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    txt_len: int = 0,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_modulate`, its rows in e4m3 with one scale each: the input of a GEMM in 8 bits.

    h = layer_norm(x, eps) * (1 + scale) + shift
    row_scale = max |h| / 448 of a row;  h_fp8 = round(h / row_scale);  h ~ h_fp8 * row_scale

    With a weight [Cout, C] as (e4m3 weight, fp32 weight_scale [Cout, 1]) of the same convention,
    `torch._scaled_mm(h_fp8.flatten(0, 1), weight.t(), scale_a=row_scale.flatten(0, 1),
    scale_b=weight_scale.t(), out_dtype=torch.bfloat16)` is the linear layer.

    Args:
        x: [B, L, C], floating point, C at least 1, last axis contiguous.
        scale, shift: [B, S, C] or [B, C], dtype of x, last axis contiguous; S as in
            `norm_modulate`.
        txt_len: text tokens, 0 to L; 0 where S = 1.
        eps: added to the variance.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (h_fp8, row_scale): float8_e4m3fn [B, L, C], float32 [B, L, 1]. A kernel computes in fp32
        and rounds once. A row of nothing above 5.3e-36 counts as zeros, with scale 0; one with a
        NaN or an infinity gives NaN when it is multiplied.

    Raises:
        TypeError, NotImplementedError: as `norm_modulate`.
        ValueError: as `norm_modulate`, or an input needs a gradient.

    Gradients: none; `norm_modulate` has one.
    Source: Micikevicius et al., FP8 Formats for Deep Learning; `torch._scaled_mm`, rowwise scales.
    """
    return _op(x, _checks.vector(scale), _checks.vector(shift), txt_len, eps, backend)
