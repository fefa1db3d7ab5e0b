"""A GPU that is not there: tensors without memory, and what torch would say of the machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fluxkern.model.transformer import Flux, FluxConfig
from fluxkern.ops import _backends, _load, measured
from fluxkern.ops.attention import providers

NAMES = {(8, 0): "A100", (8, 9): "RTX 4090", (9, 0): "H100", (10, 0): "B200", (12, 0): "RTX 5090"}


def indexed(t: Tensor, index: Any) -> Tensor:
    """t[index] of slices, numbers, None and ..."""
    index = index if isinstance(index, tuple) else (index,)
    taken = sum(i is not None and i is not ... for i in index)
    axis, aten = 0, torch.ops.aten
    for i in index:
        if i is ...:
            axis += t.ndim - taken - axis
        elif i is None:
            t, axis = aten.unsqueeze(t, axis), axis + 1
        elif isinstance(i, slice):
            t, axis = aten.slice(t, axis, i.start, i.stop, i.step or 1), axis + 1
            taken -= 1
        else:
            t, taken = aten.select(t, axis, i), taken - 1
    return t


class Unguarded(TorchFunctionMode):
    """A torch without CUDA looks for a device in some methods of tensors, before any op."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return indexed(*args)
        if kwargs and kwargs.get("out") is not None:
            return getattr(torch.ops.aten, func.__name__).out(*args, **kwargs)
        return func(*args, **kwargs or {})


def load_reason(name: str, real: Callable = _load.load_reason) -> str | None:
    return "_C_cuda.so is missing (left out)" if name.startswith("cuda") else real(name)


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Inside, tensors are fake and a GPU of this compute capability has cuDNN and torch's flash.

    What chooses a backend is the real thing; what is asked of the machine is answered here. CUDA
    kernels are not built, whether they are or not.
    """
    kept = {op: dict(found) for op, found in _backends._registry.items()}
    for found in _backends._registry.values():  # Triton's are looked for again: not interpreted
        found.pop("triton", None)
        for name in ("cuda", "cuda-wgmma"):
            if getattr(found.get(name), "write", None):  # of the object; those of torch stay
                del found[name]
    measured.forget()
    with (
        FakeTensorMode(),
        Unguarded(),
        patch.object(_load, "no_cuda", lambda: None),
        patch.object(_load, "load_reason", load_reason),
        patch.object(_load, "interpreting", lambda: False),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
        patch.object(measured, "device_name", lambda device: f"fake {NAMES[capability]}"),
        patch.object(providers, "_torch_takes", lambda *_: True),
        patch.dict(providers.MACHINE, cudnn=lambda _: None, flash=lambda _: None),
    ):
        yield
    for op, found in kept.items():
        _backends._registry[op].clear()
        _backends._registry[op].update(found)
    measured.forget()


class Called(TorchDispatchMode):
    """Names of what is called inside and makes or writes memory; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        space, _, name = op.name().partition("::")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
        if space != "prim" and not is_view:
            self.names.append(name.partition(".")[0])
        if name.endswith(".out"):  # written by a copy, which looks for a device
            out = kwargs.pop("out")
            assert op.overloadpacket.default(*args, **kwargs).shape == out.shape
            return out
        return op(*args, **kwargs or {})


class Chosen(TorchDispatchMode):
    """Which backend each op of ours would run on, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str | None]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        space, _, name = op.name().partition("::")
        if space == "fluxkern":
            (choice,) = _backends.explain(name, *args[:-1])
            self.calls.append((name, choice.chosen))
        return op(*args, **kwargs or {})


def model_on_gpu(config: FluxConfig) -> Flux:
    """In bf16."""
    with torch.device("meta"):
        model = Flux(config)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            empty = torch.empty(p.shape, dtype=torch.bfloat16, device="cuda")
            module.register_parameter(name, torch.nn.Parameter(empty))
    return model


def packed(batch: int = 2, length: int = 96, heads: int = 3, dim: int = 64, **more: Any) -> tuple:
    """q, k, v [B, L, H, D] on the GPU, bf16 unless said, views of one projection."""
    more = {"dtype": torch.bfloat16, "device": "cuda"} | more
    return (
        torch.empty(batch, length, 3 * heads * dim, **more).unflatten(-1, (3, heads, -1)).unbind(2)
    )
