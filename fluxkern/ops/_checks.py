"""Checks shared by the ops: each raises an error that names the argument and both values.

They look at the arguments of a call by name; `of` names the one that another is held against.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Args = dict[str, Any]
COLLECTIVES = "torch.distributed._functional_collectives"  # whose tensors wait when an op is called


def tensor(a: Args, name: str) -> Tensor:
    """A dense tensor whose memory holds its numbers; TypeError for anything else."""
    value = a[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
    if torch.compiler.is_compiling() or type(value).__module__ == COLLECTIVES:
        return value
    if is_traceable_wrapper_subclass(value):
        raise TypeError(f"{name} must be a plain tensor, got {type(value).__name__}")
    return value


def shape(a: Args, name: str, expected: tuple[int | None, ...], sizes: str) -> Tensor:
    """`expected` holds a number per axis, None where any size will do; `sizes` is its name."""
    value = tensor(a, name)
    found = value.shape
    if len(found) == len(expected):
        for f, e in zip(found, expected, strict=True):  # half the time of any() on a generator
            if e is not None and f != e:
                break
        else:
            return value
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{name} must be {sizes} = [{wanted}], got {list(found)}")


def like(a: Args, name: str, of: str) -> None:
    """Same dtype and device."""
    if a[name].dtype != a[of].dtype:
        raise ValueError(f"{name} must have the dtype of {of}, {a[of].dtype}, got {a[name].dtype}")
    same_device(a, name, of)


def same_device(a: Args, name: str, of: str) -> None:
    if a[name].device != a[of].device:
        raise ValueError(
            f"{name} must be on the device of {of}, {a[of].device}, got {a[name].device}"
        )


def floating(a: Args, name: str) -> None:
    if not tensor(a, name).is_floating_point():
        raise ValueError(f"{name} must be floating point, got {a[name].dtype}")


def fp32(a: Args, name: str) -> None:
    dtype = a[name].dtype
    if dtype.itemsize < 4 or not dtype.is_floating_point:
        raise ValueError(f"{name} must be torch.float32 or torch.float64, got {dtype}")


def has_strides() -> bool:
    """Whether a kernel may see the tensors: in torch.func the reference does, which takes any."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def last_axis_contiguous(a: Args, name: str) -> None:
    value = a[name]
    if value.ndim and value.shape[-1] > 1 and value.stride(-1) != 1 and has_strides():
        raise ValueError(
            f"{name} must be contiguous on its last axis, got stride {value.stride(-1)}"
        )


def rows(a: Args, name: str, expected: tuple[int | None, ...], sizes: str, of: str) -> None:
    """Of this shape, in dtype and on device of another, contiguous on the last axis."""
    shape(a, name, expected, sizes)
    like(a, name, of)
    last_axis_contiguous(a, name)


def tokens(a: Args, name: str) -> None:
    """[B, L, C], floating point."""
    shape(a, name, (None, None, None), "[B, L, C]")
    floating(a, name)
    last_axis_contiguous(a, name)


def same_tokens(a: Args, name: str, of: str) -> None:
    rows(a, name, tuple(a[of].shape), f"the shape of {of}", of)


def vector(vec: Tensor) -> Tensor:
    """[B, C] or [B, S, C] -> [B, S, C]."""
    flat = isinstance(vec, Tensor) and vec.ndim == 2 and vec.layout == torch.strided
    return vec.unsqueeze(1) if flat else vec


def vectors(a: Args, *names: str) -> None:
    """Gates, scales and shifts of the tokens of x: [B, S, C], all of one S, and txt_len."""
    batch, _, hidden = a["x"].shape
    first = tensor(a, names[0])
    streams = 2 if first.ndim == 3 and first.shape[1] == 2 else 1
    for name in names:
        rows(a, name, (batch, streams, hidden), "[B, S, C] or [B, C]", "x")
    txt_len(a, "x")
    if streams == 1 and a["txt_len"]:
        found = a["txt_len"]
        raise ValueError(f"txt_len must be 0 where vectors have one stream, S = 1, got {found}")


def integer(a: Args, name: str) -> None:
    value = a[name]
    if not isinstance(value, int) and not hasattr(value, "__index__"):  # as a NumPy integer has it
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def txt_len(a: Args, of: str) -> None:
    integer(a, "txt_len")
    length, found = a[of].shape[1], a["txt_len"]
    if not 0 <= found <= length:
        raise ValueError(f"txt_len must be between 0 and the tokens of {of}, {length}, got {found}")


def heads(a: Args, name: str) -> None:
    """[B, L, H, D], floating point."""
    shape(a, name, (None, None, None, None), "[B, L, H, D]")
    floating(a, name)
    last_axis_contiguous(a, name)


def same_heads(a: Args, of: str, *names: str, any_length: bool = False) -> None:
    batch, length, num_heads, head_dim = a[of].shape
    expected = (batch, None if any_length else length, num_heads, head_dim)
    for name in names:
        rows(a, name, expected, f"[B, L, H, D] of {of}", of)


def head_weights(a: Args, of: str, *names: str) -> None:
    for name in names:
        rows(a, name, a[of].shape[-1:], "[D]", of)


def rope_tables(a: Args, of: str, length: int) -> None:
    """cos and sin: fp32 (or fp64 beside fp64 inputs) [L, D/2], any strides."""
    head_dim = a[of].shape[-1]
    if head_dim % 2:
        raise ValueError(f"the head dim of {of} must be even, got {head_dim}")
    for name in ("cos", "sin"):
        shape(a, name, (length, head_dim // 2), "[L, D/2]")
        fp32(a, name)
        same_device(a, name, of)


def written(a: Args, name: str, *others: str) -> None:
    """A tensor that is written over: without elements that share memory, also with the others."""
    out = a[name]
    if torch.compiler.is_compiling() or type(out) not in (Tensor, Parameter) or not has_strides():
        return  # no memory to look at
    if torch._debug_has_internal_overlap(out) == 1:
        raise ValueError(f"{name} must not overlap itself, got strides {out.stride()}")
    for other in others:
        if a[other] is not None and _overlap(out, a[other]):
            raise ValueError(f"{name} must not overlap {other}, got memory of both")


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors surely share memory; of two with holes only where they are the same."""
    if x.numel() == 0 or y.numel() == 0 or x.device != y.device or x.is_meta:
        return False
    storages = (t.untyped_storage().data_ptr() for t in (x, y))
    if len(set(storages)) == 2:
        return False
    if x.data_ptr() == y.data_ptr():
        return True
    if not (x.is_contiguous() and y.is_contiguous()):
        return False
    low, high = sorted((x, y), key=Tensor.data_ptr)
    return low.data_ptr() + low.numel() * low.element_size() > high.data_ptr()
