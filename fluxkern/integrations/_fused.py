"""What every module that `accelerate` changed has: its settings, and how it falls back."""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

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


class Fused:
    """A module that `accelerate` changed: `original` is its class before, `why_not` the reason
    against the ops as the module stands."""

    original: type[nn.Module]
    _fluxkern: Settings

    def why_not(self) -> str | None:
        return None

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
