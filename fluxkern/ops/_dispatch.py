"""How a backend is chosen: per op an ordered list, each with a reason when it cannot run.

Nothing here imports a kernel: the file of an op registers its reference, and every other backend
registers itself under the op's name.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the order in which they are tried


def _runs_anywhere(*args: object) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Args:
        name: one of `BACKENDS`.
        run: called with the op's checked arguments.
        unsupported: called with the same arguments, or with none to ask about the machine alone;
            returns None, or the reason why `run` cannot take them.
    """

    name: str
    run: Callable
    unsupported: Callable[..., str | None] = _runs_anywhere


@dataclass(frozen=True)
class Choice:
    """What runs for one op, and why the others do not: a row of `explain()`."""

    op: str
    chosen: str | None
    reasons: dict[str, str | None]  # backend -> None (can run) or the reason

    def __str__(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items() if reason)
        return f"{self.op:36} {self.chosen or '-':10} {why}"


_registry: dict[str, dict[str, Backend]] = {}


def register(op: str, backend: Backend) -> None:
    """Makes `backend` available for `op`; raises ValueError for an unknown backend name."""
    if backend.name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend.name!r}")
    _registry.setdefault(op, {})[backend.name] = backend


LIBRARY = torch.library.Library("fluxkern", "DEF")


def define(schema: str, reference: Callable, fake: Callable) -> Callable:
    """Makes the torch op `fluxkern::<name>` of an op, which chooses its backend when it runs.

    Args:
        schema: as torch writes it; the last argument is `str? backend`.
        reference: the op's meaning, the backend that is always there.
        fake: called with the same arguments, gives outputs of the right shapes without values.

    Returns:
        The op, to be called with all arguments. It has no gradient of its own.
    """
    name = schema.partition("(")[0]

    def kernel(*args: object) -> object:
        return run(name, args[-1], *args[:-1])

    def contiguous_reference(*args: object) -> object:  # strides as those of the fake
        out = reference(*args)
        return out.contiguous() if isinstance(out, Tensor) else tuple(t.contiguous() for t in out)

    register(name, Backend("reference", contiguous_reference))
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fluxkern::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fluxkern, name).default


def empty_like_each(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of these shapes, dtypes and devices, without values."""
    return tuple(t.new_empty(t.shape) for t in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _default_backend() -> str | None:
    name = os.environ.get("FLUXKERN_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"FLUXKERN_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


DEFAULT_BACKEND = _default_backend()  # read once: never on a traced path


def _reason(op: str, name: str, args: tuple) -> str | None:
    backend = _registry[op].get(name)
    if backend is None:
        return f"no {name} kernel in this version"
    return backend.unsupported(*args)


def run(op: str, backend: str | None, *args: object) -> object:
    """Runs `op` on the named backend, or on the first that has no reason against `args`.

    Raises:
        ValueError: `backend` is not the name of a backend.
        NotImplementedError: the named backend cannot run these arguments, or none can; the message
            gives the reason of every backend.
    """
    named = backend or DEFAULT_BACKEND
    if named is not None and named not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {named!r}")
    for name in (named,) if named else BACKENDS:
        candidate = _registry[op].get(name)
        if candidate is not None and candidate.unsupported(*args) is None:
            return candidate.run(*args)
    reasons = "; ".join(f"{name}: {_reason(op, name, args) or 'can run'}" for name in BACKENDS)
    raise NotImplementedError(f"{op} cannot run on {named or 'any backend'} ({reasons})")


def explain(op: str | None = None, *args: object) -> list[Choice]:
    """What would run for `op` with `args`, and why not the others; for every op when none is named.

    Args:
        op: name of an op of `fluxkern.ops`; None for all.
        args: the op's arguments in the order of its backends' `run`; without them the answer is
            about this machine alone.

    Returns:
        One `Choice` an op; `print(*fluxkern.explain(), sep="\\n")` is a table.

    Raises:
        ValueError: no op has that name.
    """
    if op is not None and op not in _registry:
        raise ValueError(f"op must be one of {', '.join(sorted(_registry))}, got {op!r}")
    rows = []
    for name in [op] if op else sorted(_registry):
        reasons = {backend: _reason(name, backend, args) for backend in BACKENDS}
        allowed = [DEFAULT_BACKEND] if DEFAULT_BACKEND else BACKENDS
        chosen = next((backend for backend in allowed if reasons[backend] is None), None)
        rows.append(Choice(name, chosen, reasons))
    return rows
