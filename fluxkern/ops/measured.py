"""The measured order of backends: which was fastest, by device, op, dtype and size.

`fluxkern tune` writes one JSON file a device:

    {"device": "NVIDIA H200", "order": {"norm_modulate": {"bfloat16": {"24": {"cuda": 15.1, ...}}}},
     "tiles": {"attention": {"bfloat16": {"24": {"128x128 8w 3s tma": 395.2, ...}}}}}

with microseconds, the fastest first; 24 is the size class, the bits of the number of elements of
the op's first tensor, of q where there is one. Tiles are those of `fluxkern/kernels/_tiles.py`. A
user's own file comes before the one of the package; that one alone, which is part of the
repository, lets a second kernel of a backend run unnamed.
"""

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[1] / "measured"
LIMIT = 2**20  # bytes of a file

Order = dict[str, float]  # backend or tile -> microseconds, fastest first
Orders = dict[str, dict[str, dict[int, Order]]]  # op or kernel -> dtype -> size class -> order
Tables = dict[str, Orders]  # "order" and "tiles"
_tried: dict[str, str] = {}  # kernel -> the tile that it has now: it is being measured


def user_folder() -> Path:
    """Where `fluxkern tune` writes to."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fluxkern" / "measured"


def device_name(device: torch.device) -> str:
    """What a table is kept for: the GPU's name, or the CPU's and the instruction set of torch."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"


def file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def size_class(t: Tensor) -> int:
    return t.numel().bit_length()


def read(path: Path) -> Tables:
    """A table as it was written; ValueError when it is anything else."""
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path}: larger than {LIMIT} bytes")
    try:
        found = json.loads(path.read_text())
        return {"order": _orders(found["order"]), "tiles": _orders(found.get("tiles", {}))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a table of `fluxkern tune` ({error})") from None


def _orders(found: dict) -> Orders:
    return {
        str(op): {
            str(dtype): {
                int(size): {str(name): float(us) for name, us in order.items()}
                for size, order in sizes.items()
            }
            for dtype, sizes in dtypes.items()
        }
        for op, dtypes in found.items()
    }


@cache
def _of_device(type: str, index: int | None, package_alone: bool) -> Tables:
    """Of the first folder with a file of this device; looked for once: ops ask at every call."""
    name = file_name(device_name(torch.device(type, index)))
    for folder in (PACKAGE,) if package_alone else (user_folder(), PACKAGE):
        if (folder / name).is_file():
            return read(folder / name)
    return {}


def _nearest(table: str, name: str, t: object, package_alone: bool = False) -> Order | None:
    """What was measured nearest in size to t, if anything was."""
    if not isinstance(t, Tensor):
        return None
    device = t.device
    tables = _of_device(device.type, device.index, package_alone)
    if not tables:
        return None
    sizes = tables.get(table, {}).get(name, {}).get(str(t.dtype).removeprefix("torch."))
    if not sizes:
        return None
    here = size_class(t)
    return sizes[min(sizes, key=lambda size: abs(size - here))]


def _first(args: tuple) -> object:
    return args[0] if args else None


def order(op: str, args: tuple) -> Order | None:
    """What was measured nearest to these arguments, if anything was."""
    return _nearest("order", op, _first(args))


def tile(kernel: str, q: Tensor) -> str | None:
    """The name of the fastest tile nearest to this size, if any was measured."""
    if kernel in _tried:
        return _tried[kernel]
    if q.device.type == "meta":
        return None
    found = _nearest("tiles", kernel, q)
    return next(iter(found), None) if found else None


@contextmanager
def trying(kernel: str, name: str) -> Iterator[None]:
    """Inside, the kernel has this tile."""
    _tried[kernel] = name
    try:
        yield
    finally:
        del _tried[kernel]


def shown_faster(op: str, args: tuple, name: str, than: str) -> bool:
    """Whether the package's file of this device has both, and `name` as the faster: `tune` holds a
    backend to fp64 before it measures it, so what is there was right."""
    times = _nearest("order", op, _first(args), package_alone=True) or {}
    return name in times and than in times and times[name] < times[than]


def forget() -> None:
    """Files are read anew."""
    _of_device.cache_clear()
