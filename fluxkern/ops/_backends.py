"""How a backend is chosen: per op an ordered list, each with a reason when it cannot run."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import _load, measured

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the order of an op that has none of its own
EMULATORS = ("cuda-emulator", "cuda-wgmma-emulator")  # the CUDA sources run on a CPU, for tests
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.int8})  # of kernels


def _nothing(*args: object) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Args:
        name: one of `BACKENDS`, or another that calls name.
        run: called with the op's checked arguments.
        unsupported: called with the same arguments, or with none to ask about the machine alone;
            returns None, or the reason why `run` cannot take them.
        unnamed: called with the same arguments, the reason why it does not run unless a call names
            it, if there is one.
        write: called with the same arguments and then the results, which it writes, if it can.
        by_dtype: whether dtype and device of the first tensor alone decide what it takes.
        checks: whether `run` itself refuses whatever the op's checks refuse, with a RuntimeError,
            before it writes anything.
    """

    name: str
    run: Callable
    unsupported: Callable[..., str | None] = _nothing
    unnamed: Callable[..., str | None] = _nothing
    write: Callable | None = None
    by_dtype: bool = False
    checks: bool = False


@dataclass(frozen=True)
class Choice:
    """What runs for one op, and why the others do not: a row of `explain()`."""

    op: str
    chosen: str | None
    reasons: dict[str, str | None]  # backend -> None (can run) or the reason
    times: dict[str, float] | None = None  # backend -> microseconds: the order was measured

    def __str__(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items() if reason)
        if self.times:
            times = ", ".join(f"{name} {us:.4g} us" for name, us in self.times.items())
            why = f"measured: {times}" + (f"; {why}" if why else "")
        return f"{self.op:40} {self.chosen or '-':10} {why}"


@dataclass(frozen=True)
class Call:
    """One run of an op on a backend: a row of `record()`."""

    op: str
    named: str | None  # by the caller
    backend: str  # that ran
    args: tuple
    seconds: float
    nested: bool  # called by a kernel for a part of its work


# op -> name -> backend, or the reason for none, or what makes it when asked for
_registry: dict[str, dict[str, Backend | str | Callable]] = {}
_orders: dict[str, Callable[..., tuple[str, ...]]] = {}  # op -> its order, where that is its own
_listeners: list[Callable[[], None]] = []  # called when what was chosen may not hold any more
_records: list[list[Call]] = []
_running: list[str] = []  # ops, while recorded


def _changed() -> None:
    for listener in _listeners:
        listener()


def when_changed(listener: Callable[[], None]) -> None:
    """`listener` is called when another backend may be chosen than before."""
    _listeners.append(listener)


measured.when_changed(_changed)


# what there is


def register(op: str, backend: Backend) -> None:
    """Makes `backend` available for `op`; one of the same name is replaced."""
    _registry.setdefault(op, {})[backend.name] = backend
    _changed()


def register_when_asked(op: str, name: str, make: Callable[[], Backend | str]) -> None:
    """The same of what is not loaded before it is asked for; `make` may give a reason instead."""
    _registry[op][name] = make


def set_order(op: str, order: Callable[..., tuple[str, ...]]) -> None:
    """`order`, called with the op's arguments or with none, replaces that of `BACKENDS`."""
    _orders[op] = order


def names(op: str) -> tuple[str, ...]:
    """Of the backends that a call of this op may name, without the emulators."""
    return tuple(dict.fromkeys((*BACKENDS, *(n for n in _registry[op] if n not in EMULATORS))))


def find(op: str, name: str) -> Backend | str:
    """The backend of an op, or the reason why there is none; looked for once."""
    known = _registry[op]
    if name not in known:
        known[name] = _triton(op) if name == "triton" else compiled(op, name)
    elif callable(known[name]):
        known[name] = known[name]()
    return known[name]


def compiled(op: str, name: str, limit: Callable = _nothing, unnamed: Callable = _nothing) -> Any:
    """The kernel of an op in a compiled object, which may have limits of its own."""
    if name not in _load.OBJECTS:
        return _load.no_kernel(name)
    kernel = _load.compiled(op, name)
    if isinstance(kernel, str):
        return kernel
    unnamed = _emulated if name in EMULATORS else unnamed
    everything = limit is _nothing
    refused = _limited(kernel, limit)
    return Backend(name, _into_new(op, kernel), refused, unnamed, kernel.write, everything, True)


def _triton(op: str) -> Backend | str:
    kernel = _load.triton(op)
    if isinstance(kernel, str):
        return kernel
    unnamed = _interpreted if kernel.device == "cpu" else _nothing
    return Backend("triton", _into_new(op, kernel), _limited(kernel), unnamed, kernel.write)


def _emulated(*_: object) -> str:
    return "the CUDA sources run on a CPU only when named"


def _interpreted(*_: object) -> str:
    return "Triton's interpreter runs only when named"


def _into_new(op: str, kernel: _load.Kernel) -> Callable:
    write, allocate = kernel.write, _load.allocator(op)

    def run(*args: object) -> Any:
        out = allocate(*args)
        if isinstance(out, Tensor):
            write(*args, out)
        elif out is None:
            write(*args)
        else:
            write(*args, *out)
        return out

    return run


def _limited(kernel: _load.Kernel, limit: Callable = _nothing) -> Callable[..., str | None]:
    machine, own = kernel.unavailable, kernel.unsupported

    def unsupported(*args: object) -> str | None:
        return machine(*args) or refused(kernel.device, *args) or own(*args) or limit(*args)

    return unsupported


def refused(device: str, *args: object) -> str | None:
    """Why a kernel of `device` does not take tensors of these devices and dtypes."""
    here = f"is_{device}"  # a third of the time of a look at arg.device
    for arg in args:
        if isinstance(arg, Tensor):
            if not getattr(arg, here):
                return f"takes tensors on {device}, got {arg.device}"
            if arg.dtype not in DTYPES:
                return f"takes float32, bfloat16 and float16, got {arg.dtype}"
    return None


def on_cpu(run: Callable, checks: bool = False) -> Backend:
    """A kernel of the cpu backend that is made of torch's own ops, chosen and tiled by us."""
    return Backend("cpu", run, partial(refused, "cpu"), by_dtype=True, checks=checks)


def on_cuda(run: Callable, checks: bool = False) -> Backend:
    """The same of the cuda backend."""
    unsupported = lambda *args: _load.no_cuda() or refused("cuda", *args)  # noqa: E731
    return Backend("cuda", run, unsupported, by_dtype=True, checks=checks)


# choosing


def _of_environment() -> str | None:
    name = os.environ.get("FLUXKERN_BACKEND") or None
    if name not in (None, *BACKENDS):
        raise ValueError(f"FLUXKERN_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_default = _of_environment()  # read once: never on a call's path


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Inside, in all threads, ops that have a kernel of this backend run on it.

    As FLUXKERN_BACKEND does for a process; a call that names a backend has that one.

    Args:
        name: one of `BACKENDS` or of the emulators; None for the usual choice.

    Raises:
        ValueError: no backend has that name.
    """
    global _default
    if name not in (None, *BACKENDS, *EMULATORS):
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    _default, before = name, _default
    _changed()
    try:
        yield
    finally:
        _default = before
        _changed()


def _named(op: str, name: str | None) -> str | None:
    """The backend that must run: the caller's, or the default where the op has a kernel of it."""
    if name is not None:
        if name not in names(op) and name not in EMULATORS:
            raise ValueError(f"backend must be one of {', '.join(names(op))}, got {name!r}")
        return name
    if _default is None or isinstance(find(op, _default), _load.Missing):
        return None
    return _default


def _reason(op: str, name: str, args: Sequence, named: bool) -> str | None:
    backend = find(op, name)
    if isinstance(backend, str):
        return backend
    return backend.unsupported(*args) or (None if named else backend.unnamed(*args))


def _order(op: str, args: Sequence, times: dict[str, float] | None) -> tuple[str, ...]:
    """Those measured, fastest first, then the others as always."""
    always = _orders[op](*args) if op in _orders else BACKENDS
    if not times:
        return always
    known = tuple(name for name in times if name in names(op))
    return known + tuple(name for name in always if name not in known)


def choose(op: str, name: str | None, args: Sequence) -> Backend:
    """The named backend, or the first that has no reason against `args`.

    They are tried in the order that `fluxkern tune` measured on this device, where it did, else in
    that of `BACKENDS`.

    Raises:
        ValueError: `name` is not that of a backend.
        NotImplementedError: the named backend cannot run these arguments, or none can; the message
            gives the reason of every backend.
    """
    named = _named(op, name)
    for tried in (named,) if named else _order(op, args, measured.order(op, args)):
        if _reason(op, tried, args, named is not None) is None:
            if tried == "reference" and named is None:
                _say_once_that_nothing_is_compiled()
            return find(op, tried)
    listed = dict.fromkeys((*names(op), *((named,) if named else ())))
    reasons = "; ".join(f"{n}: {_reason(op, n, args, n == named) or 'can run'}" for n in listed)
    raise NotImplementedError(f"{op} cannot run on {named or 'any backend'} ({reasons})")


def settled(op: str, backend: Backend, args: Sequence) -> bool:
    """Whether the next call with this dtype and device would choose as this one did."""
    if _records or not backend.by_dtype or measured.order(op, args) is not None:
        return False
    return op not in _orders or backend.name == "cpu"  # orders of their own are for GPUs


def run(op: str, name: str | None, *args: object) -> Any:
    """Runs `op` on what `choose` gives."""
    return execute(op, name, choose(op, name, args), args)


def run_into(out: Tensor, op: str, *args: object) -> None:
    """The same of an op with one result, written into `out`; that may be an input of an
    elementwise op."""
    backend = choose(op, None, args)
    if backend.write is None:
        out.copy_(backend.run(*args))
    else:
        backend.write(*args, out)


@cache
def _say_once_that_nothing_is_compiled() -> None:
    if reason := _load.load_reason("cpu"):
        log = logging.getLogger("fluxkern")
        log.warning("no compiled kernels: %s; ops run as plain PyTorch on a CPU", reason)


# what ran, what would


@contextmanager
def record() -> Iterator[list[Call]]:
    """Gives a list, and appends to it every run of an op inside, in the order of their ends."""
    calls: list[Call] = []
    _records.append(calls)
    _changed()
    try:
        yield calls
    finally:
        _records.remove(calls)
        _changed()


def execute(op: str, named: str | None, backend: Backend, args: Sequence) -> Any:
    """Runs a backend that was chosen; `record` sees it."""
    if not _records:
        return backend.run(*args)
    _running.append(op)
    start = time.perf_counter()
    try:
        return backend.run(*args)
    finally:
        seconds = time.perf_counter() - start
        _running.pop()
        call = Call(op, named, backend.name, tuple(args), seconds, bool(_running))
        for calls in _records:
            calls.append(call)


def why_not(op: str, backend: str, *args: object) -> str | None:
    """Why a call of an op that names a backend would raise.

    Args:
        op: name of an op of `fluxkern.ops`.
        backend: the one that is named, as the ops take it.
        args: the op's arguments in the order of its backends' `run`; without them the answer is
            about this machine alone.

    Returns:
        The reason in a few words; None where the call can run.

    Raises:
        KeyError: no op has that name.
    """
    return _reason(op, backend, args, named=True)


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
    return [_choice(name, args) for name in ([op] if op else sorted(_registry))]


def _choice(op: str, args: tuple) -> Choice:
    named, times = _named(op, None), measured.order(op, args)
    reasons = {name: _reason(op, name, args, name == named) for name in names(op)}
    allowed = (named,) if named in reasons else _order(op, args, times)
    chosen = next((name for name in allowed if reasons[name] is None), None)
    return Choice(op, chosen, reasons, times)
