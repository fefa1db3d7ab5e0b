"""What every module that `accelerate` changed has: its settings, and how it falls back."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from .._modules import replaced

log = logging.getLogger("fluxkern")


@dataclass
class Settings:
    """What `accelerate` was asked for, kept by every module it changed.

    Args:
        backend: of every op; None leaves the choice to the ops.
        strict: a call that would run the original code raises.
        reason: why the last call ran the original code, None if it did not.
        attention_reason: the same of the attention behind norm and rotation.
        tokens: that the last call of an attention had.
    """

    backend: str | None
    strict: bool
    reason: str | None = None
    attention_reason: str | None = None
    tokens: int = 0


@cache
def warn_once(reason: str) -> None:
    log.warning("diffusers' own code runs where %s", reason)


@torch.compiler.assume_constant_result
def _tell(reason: str, strict: bool) -> None:
    # when compiled it runs once, while the call is traced
    if strict:
        raise NotImplementedError(f"strict: diffusers' own code would run: {reason}")
    warn_once(reason)


def differ(x: Tensor, *others: Tensor) -> str | None:
    dtype, device = x.dtype, x.device
    for other in others:
        if other.dtype != dtype:
            return f"tensors of {x.dtype} and {other.dtype} meet"
        if other.device != device:
            return f"tensors on {x.device} and {other.device} meet"
    return None


@torch.compiler.assume_constant_result
def _replaced(cls: type["Fused"]) -> str | None:
    for (owner, name), own in cls._functions.items():
        if getattr(owner, name, None) is not own and (reason := replaced(owner, name)):
            return reason
    return None


class Fused:
    """A module that `accelerate` changed.

    `original` is its class before, `stands_for` the other functions of diffusers and torch whose
    code its forward takes the place of, `why_not` the reason against that as the module stands.
    """

    original: type[nn.Module]
    stands_for: tuple[tuple[type | ModuleType, str], ...] = ()
    _functions: dict[tuple[type | ModuleType, str], Callable | None]  # None: not the package's own
    _fluxkern: Settings

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original" in cls.__dict__:
            places = ((cls.original, "forward"), *cls.stands_for)
            cls._functions = {p: None if replaced(*p) else getattr(*p) for p in places}

    @classmethod
    def replaced(cls) -> str | None:
        """The reason why the code that `forward` stands for is no longer the package's own."""
        return _replaced(cls)

    @classmethod
    def functions(cls) -> tuple[Callable, ...]:
        """What `forward` stands for, as it is now."""
        return tuple(getattr(*place) for place in cls._functions)

    def why_not(self) -> str | None:
        return _replaced(type(self))

    @property
    def backend(self) -> str | None:
        return self._fluxkern.backend

    def runs_original(self, reason: str | None, field: str = "reason") -> bool:
        """Notes, and tells of, the reason why this call runs the original code."""
        if not torch.compiler.is_compiling():
            setattr(self._fluxkern, field, reason)
        if reason is None:
            return False
        _tell(reason, self._fluxkern.strict)
        return True
