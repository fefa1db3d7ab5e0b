"""Two repairs of Triton's interpreter (3.6, 3.7): it truncates to bf16 and multiplies bf16 as bits.

The compiled kernels round to nearest even and multiply bf16 as numbers. Only tests interpret.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def to_bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 as uint16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Repairs the interpreter of this process."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    if getattr(convert, "repaired", False):
        return

    def convert_float(x, source, target, rounding_mode):  # noqa: ANN001
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16_bits(x)
        if (source, target) == (tl.bfloat16, tl.float32):
            return from_bf16_bits(x)
        return convert(x, source, target, rounding_mode)

    def widened(handle):  # noqa: ANN001
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(from_bf16_bits(handle.data), tl.float32)

    def create_dot(self, a, b, *rest):  # noqa: ANN001
        return dot(self, widened(a), widened(b), *rest)

    convert_float.repaired = True
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
