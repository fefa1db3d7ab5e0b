"""How a backend is chosen: per op an ordered list, each with a reason when it cannot run.

The only file that knows which backends exist. `define` registers an op with its reference; every
other backend is looked for by the op's name when it is first asked for. A kernel takes the op's
arguments and, after them, the outputs it writes: `torch.ops.fluxkern_cpu.<op>` in `_C_cpu`,
`torch.ops.fluxkern_cuda.<op>` in `_C_cuda`, the function `<op>` of `fluxkern/kernels/` for Triton.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch import library as torch_library

from .. import _ops
from . import _probe, measured
from ._digests import build_info

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the order of an op that has none of its own
PROVIDERS = ("cudnn", "flash3", "flash", "sdpa")  # of attention: kernels of others, on a GPU
VARIANTS = {"cuda-wgmma": "cuda"}  # second kernels, chosen where the package shows them faster than
VARIANT_OPS = ("attention", "attention_lse", "rope_attention")
NAMED_ONLY = ("cuda-emulator", "cuda-wgmma-emulator")  # the CUDA sources run on a CPU, for tests
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of every kernel
_PACKAGE = Path(__file__).parents[1]
_KERNELS = f"{__package__.rpartition('.')[0]}.kernels"
_OBJECTS = {  # backend -> compiled object, library of its ops, device of its tensors
    "cpu": ("_C_cpu", "fluxkern_cpu", "cpu"),
    "cuda": ("_C_cuda", "fluxkern_cuda", "cuda"),
    "cuda-emulator": ("_C_cuda_emulator", "fluxkern_cuda_emulator", "cpu"),
    "cuda-wgmma": ("_C_cuda", "fluxkern_cuda_wgmma", "cuda"),
    "cuda-wgmma-emulator": ("_C_cuda_emulator", "fluxkern_cuda_wgmma_emulator", "cpu"),
}


def _runs_anywhere(*args: object) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Args:
        name: one of `BACKENDS`, or of attention's `PROVIDERS` and `VARIANTS`.
        run: called with the op's checked arguments.
        unsupported: called with the same arguments, or with none to ask about the machine alone;
            returns None, or the reason why `run` cannot take them.
        only_named: a reason why it does not run unless a call names it, if there is one.
        write: called with the same arguments and then the outputs, which it writes, if it can.
    """

    name: str
    run: Callable
    unsupported: Callable[..., str | None] = _runs_anywhere
    only_named: str | None = None
    write: Callable | None = None


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
        return f"{self.op:44} {self.chosen or '-':10} {why}"


_registry: dict[str, dict[str, Backend | str]] = {}  # op -> backend, or the reason for none
_allocators: dict[str, Callable] = {}  # op -> its fake, which allocates the outputs
_orders: dict[str, Callable[..., tuple[str, ...]]] = {}  # op -> its order, where that is its own
limits: dict[str, Callable] = {}  # compiled backend -> `unsupported` of what its kernels ask for


def register(op: str, backend: Backend) -> None:
    """Makes `backend` available for `op`; raises ValueError for an unknown backend name."""
    if backend.name not in PROVIDERS:
        _check_name("backend", backend.name)
    _registry.setdefault(op, {})[backend.name] = backend


def set_order(op: str, order: Callable[..., tuple[str, ...]]) -> None:
    """`order`, called with the op's arguments or with none, replaces that of `BACKENDS`."""
    _orders[op] = order


def backends_of(op: str) -> tuple[str, ...]:
    """Names of the backends that an op may have: its providers, `BACKENDS`, its variants."""
    return (*(name for name in PROVIDERS if name in _registry[op]), *BACKENDS, *variants(op))


def variants(op: str) -> tuple[str, ...]:
    """Names of the second kernels of an op."""
    return tuple(VARIANTS) if op in VARIANT_OPS else ()


def _check_name(what: str, name: str, known: tuple[str, ...] = BACKENDS) -> None:
    if name not in (*known, *NAMED_ONLY, *VARIANTS):
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")


def ours(backend: str | None) -> str | None:
    """The backend for the ops beside attention, where attention's was named."""
    if backend in PROVIDERS:
        return None
    return {"cuda-wgmma-emulator": "cuda-emulator"}.get(backend, VARIANTS.get(backend, backend))


def define(schema: str, reference: Callable, fake: Callable) -> Callable:
    """Makes the torch op `fluxkern::<name>` of an op, which chooses its backend when it runs.

    Args:
        schema: as torch writes it; the last argument is `str? backend`.
        reference: the op's meaning, the backend that is always there.
        fake: called with the same arguments, gives contiguous outputs of the right shapes without
            values; None for an op that writes over its arguments.

    Returns:
        The op, to be called with all arguments. It has no gradient of its own.
    """
    name, bracket, arguments = schema.partition("(")

    def kernel(*args: object) -> object:
        return run(name, args[-1], *args[:-1])

    def contiguous_reference(*args: object) -> object:  # strides as those of the fake
        return _each(_dense, reference(*args))

    register(name, Backend("reference", contiguous_reference))
    _allocators[name] = fake
    qualified = _ops.add_op_namespace_prefix(name)
    torch_library.define(qualified, bracket + arguments)
    torch_library.impl(qualified, "default", kernel)
    torch_library.register_fake(qualified, fake)
    return getattr(_ops.ops, name).default


def _each(function: Callable, out: object) -> object:
    if isinstance(out, tuple):
        return tuple(function(t) for t in out)
    return out if out is None else function(out)


def _dense(t: Tensor) -> Tensor:
    channels_last = t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return t if channels_last else t.contiguous()


def empty_like_each(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors of these shapes, dtypes and devices, without values."""
    return tuple(t.new_empty(t.shape) for t in tensors)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Gradients as a kernel takes them: autograd may hand over any strides, also on the last."""
    return tuple(g if g.ndim and g.stride(-1) == 1 else g.contiguous() for g in gradients)


# the backends of an op


def _find(op: str, name: str) -> Backend | str:
    """The backend of an op, or the reason why there is none; looked for once."""
    backends = _registry[op]
    if name in PROVIDERS:
        return backends.get(name) or _missing(name)
    if name not in backends:
        if op not in _allocators:
            backends[name] = _missing(name)
        else:
            backends[name] = _triton(op) if name == "triton" else _compiled(op, name)
    return backends[name]


def _missing(name: str) -> str:
    return f"no {name} kernel in this version"


def _destination_passing(op: str, kernel: Callable) -> Callable:
    allocate = _allocators[op]

    def run_kernel(*args: object) -> object:
        out = allocate(*args, None)
        if isinstance(out, Tensor):
            kernel(*args, out)
        elif out is None:
            kernel(*args)
        else:
            kernel(*args, *out)
        return out

    return run_kernel


def _refusal(device: str, args: tuple) -> str | None:
    here = f"is_{device}"  # a third of the time of a look at arg.device
    for arg in args:
        if isinstance(arg, Tensor):
            if not getattr(arg, here):
                return f"takes tensors on {device}, got {arg.device}"
            if arg.dtype not in DTYPES and arg.dtype != torch.int8:  # a weight's
                return f"takes float32, bfloat16 and float16, got {arg.dtype}"
    return None


def _compiled(op: str, name: str) -> Backend | str:
    reason = load_reason(name)
    if reason is not None:
        return reason
    object_name, library, device = _OBJECTS[name]
    packet = getattr(getattr(torch.ops, library), op, None)
    if packet is None:
        return _missing(name)
    without_device = _no_cuda() if device == "cuda" else None
    here = _against_gpu if object_name == "_C_cuda" else _runs_anywhere
    limit = limits.get(name, _runs_anywhere)
    return Backend(
        name,
        _destination_passing(op, packet.default),
        lambda *args: without_device or _refusal(device, args) or here(*args) or limit(*args),
        "the CUDA sources run on a CPU only when named" if name in NAMED_ONLY else None,
        packet.default,
    )


def architectures() -> tuple[str, ...]:
    """What `_C_cuda` was built for."""
    return tuple(build_info().get("_C_cuda", {}).get("architectures", ()))


def _against_gpu(*args: object) -> str | None:
    """Why `_C_cuda` cannot run on the GPU of the arguments, or on the current one."""
    if reason := _no_cuda():
        return reason
    index = next((t.get_device() for t in args if isinstance(t, Tensor)), None)
    return _object_reason(torch.cuda.current_device() if index is None else index)


@cache
def _object_reason(index: int) -> str | None:
    return _probe.cuda_object_reason(_PACKAGE / "_C_cuda.so", architectures(), index)


def on_cpu(run: Callable) -> Backend:
    """A kernel of the cpu backend that is made of torch's own ops, chosen and tiled by us."""
    return Backend("cpu", run, lambda *args: _refusal("cpu", args))


def on_cuda(run: Callable) -> Backend:
    """The same of the cuda backend."""
    return Backend("cuda", run, lambda *args: _no_cuda() or _refusal("cuda", args))


@cache
def load_reason(name: str) -> str | None:
    """Loads the compiled object of a backend, once; None, or the reason why it is not there."""
    file = _PACKAGE / f"{_OBJECTS[name][0]}.so"
    if not file.exists():
        reason = build_info().get(_OBJECTS[name][0], {}).get("reason") or "not built"
        reason = f"{file.name} is missing ({reason})"
    else:
        try:
            torch.ops.load_library(str(file))
            return None
        except (OSError, RuntimeError) as error:
            reason = f"{file.name} does not load ({error})"
    return reason


def compiled_kernels() -> dict[str, str | None]:
    """Per compiled object of the package None, or the reason why it is not there or not run."""
    cuda = load_reason("cuda") or _against_gpu()
    return {"_C_cpu": load_reason("cpu"), "_C_cuda": cuda}


@cache
def _say_once_that_nothing_is_compiled() -> None:
    if reason := load_reason("cpu"):
        log = logging.getLogger("fluxkern")
        log.warning("no compiled kernels: %s; ops run as plain PyTorch on a CPU", reason)


@cache
def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


def _on_its_device(launcher: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    def launch(*args: object) -> None:
        with torch.cuda.device_of(args[0]):
            launcher(*args)

    return launch


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton too, when a kernel is made


def _triton(op: str) -> Backend | str:
    if not _interpreting() and _no_cuda():
        return _no_cuda()
    if find_spec("triton") is None:
        return "triton is not installed"
    file = op.removesuffix("_backward").removeprefix("joint_").rstrip("_")
    name = f"{_KERNELS}.{file}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.rpartition(".")[0]):
            raise
        return _missing("triton")
    launcher = getattr(module, op, None)
    if launcher is None:
        return _missing("triton")
    import_module(f"{_KERNELS}._tiles").measured = measured.tile
    limits = getattr(module, "unsupported", lambda *_: None)

    def unsupported(*args: object) -> str | None:
        device = "cpu" if _interpreting() else "cuda"
        return _refusal(device, args) or (limits(op, *args) if args else None)

    if _interpreting():
        interpreter = "Triton's interpreter runs only when named"
        run_kernel = _destination_passing(op, launcher)
        return Backend("triton", run_kernel, unsupported, interpreter, launcher)
    launcher = _on_its_device(launcher)
    run_kernel = _destination_passing(op, launcher)
    return Backend("triton", run_kernel, unsupported, None, launcher)


def tile_candidates(device: torch.device) -> dict[str, tuple[str, ...]]:
    """Per Triton kernel that has a choice of tiles on a GPU their names, the default first."""
    tiles = import_module(f"{_KERNELS}._tiles")
    major, minor = torch.cuda.get_device_capability(device)
    found = {kernel: tiles.candidates(kernel, 10 * major + minor) for kernel in tiles.TABLE}
    return {kernel: tuple(map(str, names)) for kernel, names in found.items()}


# choosing


def _default_backend() -> str | None:
    name = os.environ.get("FLUXKERN_BACKEND") or None
    if name is not None:
        if name in VARIANTS:  # of some ops alone
            raise ValueError(f"FLUXKERN_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
        _check_name("FLUXKERN_BACKEND", name)
    return name


DEFAULT_BACKEND = _default_backend()  # read once: never on a traced path


def _reason(op: str, name: str, args: tuple, named: bool) -> str | None:
    backend = _find(op, name)
    if isinstance(backend, str):
        return backend
    return backend.unsupported(*args) or (None if named else _only_named(op, backend, args))


def _only_named(op: str, backend: Backend, args: tuple) -> str | None:
    beside = VARIANTS.get(backend.name)
    if beside is None or measured.shown_faster(op, args, backend.name, beside):
        return backend.only_named
    return f"no result of this device in the package shows it right and faster than {beside}"


def _order(op: str, args: tuple, times: dict[str, float] | None) -> tuple[str, ...]:
    """Those measured, fastest first, then the others as always."""
    always = _orders[op](*args) if op in _orders else BACKENDS
    if not times:
        return always
    known = tuple(name for name in times if name in (*always, *variants(op)))
    return known + tuple(name for name in always if name not in known)


def run(op: str, backend: str | None, *args: object) -> object:
    """Runs `op` on the named backend, or on the first that has no reason against `args`.

    They are tried in the order that `fluxkern tune` measured on this device, where it did, else in
    that of `BACKENDS`.

    Raises:
        ValueError: `backend` is not the name of a backend.
        NotImplementedError: the named backend cannot run these arguments, or none can; the message
            gives the reason of every backend.
    """
    return _chosen(op, backend, args).run(*args)


def run_into(out: Tensor, op: str, *args: object) -> None:
    """`run` of an op with one output, written into `out`; that may be an input of an elementwise
    op."""
    backend = _chosen(op, None, args)
    if backend.write is None:
        out.copy_(backend.run(*args))
    else:
        backend.write(*args, out)


def _named(op: str, backend: str | None) -> str | None:
    """What a call names, or FLUXKERN_BACKEND where the op has that backend."""
    if backend or not DEFAULT_BACKEND or _find(op, DEFAULT_BACKEND) == _missing(DEFAULT_BACKEND):
        return backend
    return DEFAULT_BACKEND


def _chosen(op: str, backend: str | None, args: tuple) -> Backend:
    named = _named(op, backend)
    if named is not None:
        _check_name("backend", named, backends_of(op))
    for name in (named,) if named else _order(op, args, measured.order(op, args)):
        if _reason(op, name, args, named is not None) is None:
            if name == "reference" and named is None:
                _say_once_that_nothing_is_compiled()
            return _registry[op][name]
    listed = backends_of(op)
    listed = listed if named in (None, *listed) else (*listed, named)
    reasons = "; ".join(f"{n}: {_reason(op, n, args, n == named) or 'can run'}" for n in listed)
    raise NotImplementedError(f"{op} cannot run on {named or 'any backend'} ({reasons})")


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
    rows = []
    for name in [op] if op else sorted(_registry):
        named = _named(name, None)
        reasons = {b: _reason(name, b, args, b == named) for b in backends_of(name)}
        times = measured.order(name, args)
        allowed = [named] if named in reasons else _order(name, args, times)
        chosen = next((backend for backend in allowed if reasons[backend] is None), None)
        rows.append(Choice(name, chosen, reasons, times))
    return rows
