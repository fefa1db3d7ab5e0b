"""Compiled objects and Triton modules: which kernels there are, loaded when first asked for.

A kernel takes the op's arguments and, after them, the results it writes: `<library>::<op>` in a
compiled object, the function `<op>` of a module of `fluxkern/kernels/` for Triton.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch import library as torch_library

from . import _probe, measured
from ._digests import build_info

PACKAGE = Path(__file__).parents[1]
KERNELS = f"{__package__.rpartition('.')[0]}.kernels"


class Object(NamedTuple):
    file: str
    namespace: str  # of its torch ops
    device: str  # of its tensors
    functions: tuple[str, ...] = ()  # schemas of what it has beside the ops


OBJECTS = {
    "cpu": Object(
        "_C_cpu",
        "fluxkern_cpu",
        "cpu",
        (
            "_isa() -> str",
            "_set_isa(str name) -> ()",
            "_stream_copy(Tensor source, Tensor(a!) target) -> ()",
            "dequantise(str encoding, Tensor stored, Tensor? table, Tensor? scale, int rotation,"
            " Tensor(a!) out, Tensor(b!) largest) -> ()",
        ),
    ),
    "cuda": Object("_C_cuda", "fluxkern_cuda", "cuda"),
    "cuda-wgmma": Object("_C_cuda", "fluxkern_cuda_wgmma", "cuda"),
    "cuda-emulator": Object("_C_cuda_emulator", "fluxkern_cuda_emulator", "cpu"),
    "cuda-wgmma-emulator": Object("_C_cuda_emulator", "fluxkern_cuda_wgmma_emulator", "cpu"),
}
_schemas: dict[str, str] = {}  # op -> schema of its destination-passing form
_fakes: dict[str, Callable] = {}  # op -> what allocates its results
_triton: dict[str, str] = {}  # op -> module of its launcher in fluxkern/kernels
_libraries: dict[str, torch_library.Library] = {}


class Missing(str):
    """The reason that an op has no kernel of a backend, on whatever machine."""


def _nothing(*_: object) -> str | None:
    return None


class Kernel(NamedTuple):
    write: Callable  # called with arguments and results
    device: str  # of its tensors
    unavailable: Callable[..., str | None] = _nothing  # why this machine does not run it
    unsupported: Callable[..., str | None] = _nothing  # what it does not take


def declare(op: str, schema: str, fake: Callable, triton: str | None) -> None:
    """An op that backends may implement, in its destination-passing form; `triton` is the module of
    its launcher."""
    _schemas[op], _fakes[op] = schema, fake
    if triton:
        _triton[op] = triton
    for library in _libraries.values():
        library.define(schema)


def triton_modules() -> dict[str, str]:
    """Op -> module of its launcher in fluxkern/kernels, of all that have one."""
    return dict(_triton)


def allocator(op: str) -> Callable:
    """Called with the arguments, gives the results without values."""
    return _fakes[op]


def no_kernel(backend: str) -> Missing:
    return Missing(f"no {backend} kernel in this version")


@cache
def no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


# compiled objects


def compiled_kernels() -> dict[str, str | None]:
    """Per compiled object of the package None, or the reason why it is not there or not run."""
    cuda = load_reason("cuda") or _against_gpu()
    return {OBJECTS["cpu"].file: load_reason("cpu"), OBJECTS["cuda"].file: cuda}


def architectures() -> tuple[str, ...]:
    """What `_C_cuda` was built for."""
    return tuple(build_info().get("_C_cuda", {}).get("architectures", ()))


def _against_gpu(*args: object) -> str | None:
    """Why `_C_cuda` cannot run on the GPU of the arguments, or on the current one."""
    if reason := no_cuda():
        return reason
    index = next((t.get_device() for t in args if isinstance(t, Tensor)), -1)  # a CPU's is -1
    return _object_reason(torch.cuda.current_device() if index < 0 else index)


@cache
def _object_reason(index: int) -> str | None:
    return _probe.cuda_object_reason(PACKAGE / "_C_cuda.so", architectures(), index)


@cache
def load_reason(backend: str) -> str | None:
    """Loads the compiled object of a backend, once; None, or the reason why it is not there."""
    name, namespace, _, functions = OBJECTS[backend]
    file = PACKAGE / f"{name}.so"
    if not file.exists():
        reason = build_info().get(name, {}).get("reason") or "not built"
        return f"{file.name} is missing ({reason})"
    if namespace not in _libraries:
        _libraries[namespace] = torch_library.Library(namespace, "FRAGMENT")
        for schema in (*functions, *_schemas.values()):
            _libraries[namespace].define(schema)
    try:
        torch.ops.load_library(str(file))
        return None
    except (OSError, RuntimeError) as error:
        return f"{file.name} does not load ({error})"


def compiled(op: str, backend: str) -> Kernel | str:
    """The kernel of an op in a compiled object, or the reason why there is none."""
    if op not in _schemas:
        return no_kernel(backend)
    if reason := load_reason(backend):
        return reason
    file, namespace, device, _ = OBJECTS[backend]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", device.upper()):
        return no_kernel(backend)
    kernel = getattr(getattr(torch.ops, namespace), op).default
    return Kernel(kernel, device, _against_gpu if file == "_C_cuda" else _nothing)


# Triton


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton too, when a kernel is made


def triton(op: str) -> Kernel | str:
    """The launcher of an op in Triton, or the reason why there is none."""
    if op not in _triton:
        return no_kernel("triton")
    if not interpreting() and no_cuda():
        return no_cuda()
    if find_spec("triton") is None:
        return "triton is not installed"
    module = import_module(f"{KERNELS}.{_triton[op]}")
    launch, limits = _with_tiles(op, getattr(module, op)), getattr(module, "unsupported", _nothing)

    def unsupported(*args: object) -> str | None:
        return limits(op, *args) if args else None

    if interpreting():
        return Kernel(launch, "cpu", unsupported=unsupported)
    return Kernel(_on_its_device(launch), "cuda", unsupported=unsupported)


def _on_its_device(launch: Callable) -> Callable:
    """Triton launches on the current device, which need not be that of the tensors."""

    def launch_there(*args: object) -> None:
        with torch.cuda.device_of(args[0]):
            launch(*args)

    return launch_there


def _with_tiles(op: str, launch: Callable) -> Callable:
    """With the measured tile of each kernel that has a choice."""
    keywords = import_module(f"{KERNELS}._tiles").KEYWORDS.get(op)
    if keywords is None:
        return launch

    def launch_with_tiles(*args: object) -> None:
        q = args[2] if op == "attention_backward" else args[0]
        launch(*args, **{name: measured.tile(kernel, q) for name, kernel in keywords.items()})

    return launch_with_tiles


def tile_candidates(device: torch.device) -> dict[str, tuple[str, ...]]:
    """Per Triton kernel that has a choice of tiles on a GPU their names, the default first."""
    tiles = import_module(f"{KERNELS}._tiles")
    major, minor = torch.cuda.get_device_capability(device)
    found = {kernel: tiles.candidates(kernel, 10 * major + minor) for kernel in tiles.TABLE}
    return {kernel: tuple(map(str, names)) for kernel, names in found.items()}
