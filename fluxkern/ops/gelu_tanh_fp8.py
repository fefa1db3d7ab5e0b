"""The MLP's activation before a GEMM in 8 bits, written in e4m3."""

from torch import Tensor

from .. import reference
from ._op import Op
from .norm_modulate_fp8 import check_channels, fp8_rows

_op = Op(
    "gelu_tanh_fp8(Tensor x) -> (Tensor y, Tensor row_scale)",
    reference.gelu_tanh_fp8,
    fp8_rows,
    check_channels,
    gradient=False,
    autocast=None,
    triton="gelu_tanh_fp8",
)


def gelu_tanh_fp8(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`gelu_tanh`, its rows in e4m3 with one scale each: the input of a GEMM in 8 bits.

    y = gelu_tanh(x)
    row_scale = max |y| / 448 of a row;  y_fp8 = round(y / row_scale);  y ~ y_fp8 * row_scale

    Args:
        x: [..., C], floating point, C at least 1, last axis contiguous.
        backend: one of `fluxkern.ops.BACKENDS`; None takes the first that can run.

    Returns:
        (y_fp8, row_scale): float8_e4m3fn of the shape of x, float32 [..., 1]; as those of
        `norm_modulate_fp8`.

    Raises:
        TypeError: x is not a dense tensor.
        ValueError: x is not floating point, has no channel, is not contiguous on its last axis or
            needs a gradient.
        NotImplementedError: the named backend cannot run this; gives every backend's reason.

    Gradients: none; `gelu_tanh` has one.
    Source: as `gelu_tanh` and `norm_modulate_fp8`.
    """
    if isinstance(x, Tensor) and x.ndim <= 3:
        return _op(x, backend)
    check_channels({"x": x})
    y, row_scale = _op(x.flatten(0, -3), backend)  # what a kernel takes
    return y.view(x.shape), row_scale.view(*x.shape[:-1], 1)
