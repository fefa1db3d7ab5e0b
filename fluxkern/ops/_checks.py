"""Checks shared by the ops: each raises a ValueError that names the argument and both values."""

from torch import Tensor


def shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], sizes: str) -> None:
    """`expected` holds a number per axis, None where any size will do; `sizes` is its name."""
    found = tensor.shape
    if len(found) == len(expected):
        for f, e in zip(found, expected, strict=True):  # half the time of any() on a generator
            if e is not None and f != e:
                break
        else:
            return
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} must be {sizes} = [{wanted}], got {list(found)}")


def _alike(tensor: Tensor, other: Tensor) -> bool:
    """Shape, dtype and device of other, last axis contiguous: nothing more to be looked at."""
    return (
        tensor.shape == other.shape
        and tensor.dtype == other.dtype
        and tensor.device == other.device
        and tensor.stride(-1) == 1
    )


def like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device."""
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def last_axis_contiguous(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous on its last axis, got stride {tensor.stride(-1)}"
        )


def tokens(name: str, x: Tensor) -> None:
    """[B, L, C], floating point."""
    shape(name, x, (None, None, None), "[B, L, C]")
    floating(name, x)
    last_axis_contiguous(name, x)


def same_tokens(name: str, y: Tensor, other_name: str, x: Tensor) -> None:
    """The shape, dtype and device of x."""
    if _alike(y, x):
        return
    shape(name, y, tuple(x.shape), f"the shape of {other_name}")
    like(name, y, other_name, x)
    last_axis_contiguous(name, y)


def row(name: str, vec: Tensor, x: Tensor) -> None:
    """A gate, scale or shift for x: [B, 1, C] or [B, C], any strides but the last."""
    batch, _, hidden = x.shape
    if vec.ndim == 2:
        shape(name, vec, (batch, hidden), "[B, C]")
    else:
        shape(name, vec, (batch, 1, hidden), "[B, 1, C] or [B, C]")
    like(name, vec, "x", x)
    last_axis_contiguous(name, vec)


def rows(x: Tensor, **vectors: Tensor) -> None:
    """`row` of each; one comparison where nothing is wrong."""
    batch, _, hidden = x.shape
    good, dtype, device = ((batch, 1, hidden), (batch, hidden)), x.dtype, x.device
    for name, vec in vectors.items():
        if (
            vec.shape not in good
            or vec.dtype != dtype
            or vec.device != device
            or vec.stride(-1) != 1
        ):
            row(name, vec, x)


def txt_len(value: int, tokens_: int) -> None:
    if not 0 <= value <= tokens_:
        raise ValueError(f"txt_len must be between 0 and the tokens of x, {tokens_}, got {value}")


def heads(name: str, q: Tensor) -> None:
    """[B, L, H, D], floating point."""
    shape(name, q, (None, None, None, None), "[B, L, H, D]")
    floating(name, q)
    last_axis_contiguous(name, q)


def same_heads(name: str, k: Tensor, other_name: str, q: Tensor, any_length: bool = False) -> None:
    if not any_length and _alike(k, q):
        return
    batch, length, num_heads, head_dim = q.shape
    expected = (batch, None if any_length else length, num_heads, head_dim)
    shape(name, k, expected, f"[B, L, H, D] of {other_name}")
    like(name, k, other_name, q)
    last_axis_contiguous(name, k)


def head_weight(name: str, weight: Tensor, q: Tensor) -> None:
    if weight.shape == q.shape[3:] and weight.dtype == q.dtype and weight.device == q.device:
        return
    shape(name, weight, (q.shape[-1],), "[D]")
    like(name, weight, "q", q)


def rotation(name: str, table: Tensor, length: int, q: Tensor) -> None:
    """cos or sin: fp32 (or fp64 beside fp64 inputs) [L, D/2], any strides."""
    if q.shape[-1] % 2:
        raise ValueError(f"the head dim of q must be even, got {q.shape[-1]}")
    shape(name, table, (length, q.shape[-1] // 2), "[L, D/2]")
    if table.dtype.itemsize < 4 or not table.is_floating_point():
        raise ValueError(f"{name} must be torch.float32 or torch.float64, got {table.dtype}")
    if table.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {table.device}")
