"""What stands on a module of torch, and the table that says what runs at each place of a model."""

import re
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module


def replaced(owner: type | ModuleType, name: str) -> str | None:
    """The reason why a function of a class or module is not one that its package defines there."""
    function = getattr(owner, name, None)
    is_class = isinstance(owner, type)
    package = (owner.__module__ if is_class else owner.__name__).partition(".")[0]
    if (
        isinstance(function, FunctionType)
        and function.__qualname__ == (f"{owner.__qualname__}.{name}" if is_class else name)
        and function.__globals__.get("__name__", "").partition(".")[0] == package
    ):
        return None
    return f"{owner.__qualname__ if is_class else owner.__name__}.{name} was replaced"


def hooked(module: nn.Module) -> str | None:
    """The reason why `module` must be called, whatever its class computes."""
    own = module.__dict__
    if (
        ("forward" in own and "_orig_mod" not in own["_modules"])  # torch.compile's wrapper has one
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return f"a {type(module).__name__} has a hook"
    return "a hook is set for all modules" if _torch_module._has_any_global_hook() else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast gives a linear layer whose input is x; None where it is off."""
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@dataclass(frozen=True)
class Site:
    """A place of a model that an op can take: a row of `explain`.

    Args:
        name: path of the module, or of the block and the name of the gate.
        kind: norm, gate, attention, gelu, linear or modulation.
        runs: the ops that run there; "original", the code of the package that the model is of;
            "called", the layer itself.
        backend: what they run on, or the one that was named and why a call of it would raise.
        reason: why no op runs, in whole or in part.
    """

    name: str
    kind: str
    runs: str
    backend: str | None
    reason: str | None

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, self.kind, self.runs, self.backend or "-", self.reason or ""

    def __str__(self) -> str:
        return "  ".join(self.cells).rstrip()


class Sites(list[Site]):
    """All sites of a model; as text, blocks that are alike stand on one line: 0-18."""

    def __str__(self) -> str:
        numbers: dict[Site, list[int]] = {}
        for site in self:
            number = re.search(r"(?<=\.)\d+(?=\.)", site.name)
            row = replace(site, name=re.sub(r"(?<=\.)\d+(?=\.)", "%s", site.name, count=1))
            numbers.setdefault(row, []).append(int(number[0]) if number else -1)
        rows = [replace(r, name=r.name.replace("%s", _ranges(n))).cells for r, n in numbers.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2,5"""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
