"""The measured order of backends: which was fastest, by device, op, dtype and size.

`fluxkern tune` writes one JSON file a device:

    {"device": "NVIDIA H200", "order": {"norm_modulate": {"bfloat16": {"24": {"cuda": 15.1, ...}}}},
     "tiles": {"attention": {"bfloat16": {"24": {"128x128 8w 3s tma": 395.2, ...}}}},
     "digest": {"norm_modulate": {"cuda": "50c5b0d0a5a7be6c", ...}}}

with microseconds, the fastest first; 24 is the size class, the bits of the number of elements of
the op's first tensor, of q where there is one. Tiles are those of `fluxkern/kernels/_tiles.py`. The
digest is of the kernel's source: what was measured of another than the one here is ignored. A
user's own file comes before the one of the package; that one alone, which is part of the
repository, lets a second kernel of a backend run unnamed.

Files are read when this module is imported. One that cannot be read is no table, and `problems`
says why.
"""

import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import _digests

PACKAGE = Path(__file__).parents[1] / "measured"
LIMIT = 2**20  # bytes of a file

Order = dict[str, float]  # backend or tile -> microseconds, fastest first
Orders = dict[str, dict[str, dict[int, Order]]]  # op or kernel -> dtype -> size class -> order
Digests = dict[str, dict[str, str]]  # op or kernel -> backend -> digest
Tables = dict[str, Orders]  # "order" and "tiles"
_tables: dict[str, dict[str, Tables]] = {"user": {}, "package": {}}  # by name of the file
_problems: list[str] = []
_listeners: list[Callable[[], None]] = []
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


def read(path: Path) -> tuple[Tables, Digests]:
    """A table as it was written; ValueError when it is anything else."""
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path}: larger than {LIMIT} bytes")
    try:
        found = json.loads(path.read_text())
        tables = {"order": _orders(found["order"]), "tiles": _orders(found.get("tiles", {}))}
        digests = found.get("digest", {})
        return tables, {str(op): dict(known) for op, known in digests.items()}
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


def digests(op: str, names: Iterable[str]) -> dict[str, str]:
    """Of the kernels that these backends have for an op, as a table keeps them."""
    found = {name: _digests.of_kernel(op, name) for name in names}
    return {name: digest for name, digest in found.items() if digest is not None}


def _measured_by(tables: Tables) -> Iterator[tuple[str, str, set[str]]]:
    """("order" or "tiles", op or kernel, the backends that were measured)."""
    for op in tables["tiles"]:
        yield "tiles", op, {"triton"}
    for op, dtypes in tables["order"].items():
        orders = (order for sizes in dtypes.values() for order in sizes.values())
        yield "order", op, {name for order in orders for name in order}


def _fresh(path: Path) -> Tables:
    """What a file says of kernels that are as they were when it was written."""
    tables, known = read(path)
    stale = []
    for table, op, names in list(_measured_by(tables)):
        if any(known.get(op, {}).get(n) != d for n, d in digests(op, names).items()):
            del tables[table][op]
            stale.append(op)
    if stale:
        kernels = ", ".join(dict.fromkeys(stale))
        _problems.append(f"{path}: ignored, kernels have changed since: {kernels}")
    return tables


def _read_folder(kept: dict[str, Tables], folder: Callable[[], Path]) -> None:
    try:
        paths = [folder() / name for name in sorted(os.listdir(folder())) if name.endswith(".json")]
    except FileNotFoundError:
        return
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _problems.append(f"no table of the user's own: {error}")
        return
    for path in paths:
        try:
            kept[path.name] = _fresh(path)
        except (OSError, ValueError) as error:
            _problems.append(str(error))


def problems() -> tuple[str, ...]:
    """What of the tables is ignored and why, one line each."""
    return tuple(_problems)


def forget() -> None:
    """Files are read anew."""
    _file_of.cache_clear()
    _problems.clear()
    for name, folder in (("user", user_folder), ("package", lambda: PACKAGE)):
        _tables[name].clear()
        _read_folder(_tables[name], folder)
    for listener in _listeners:
        listener()


def when_changed(listener: Callable[[], None]) -> None:
    """`listener` is called when files were read anew."""
    _listeners.append(listener)


@cache
def _file_of(type: str, index: int | None) -> str:
    return file_name(device_name(torch.device(type, index)))


def _of_device(device: torch.device, package_alone: bool) -> Tables:
    user, package = _tables.values()
    if not (user or package):
        return {}
    name = _file_of(device.type, device.index)
    found = package.get(name, {})
    return found if package_alone else user.get(name, found)


def _nearest(table: str, name: str, t: object, package_alone: bool = False) -> Order | None:
    """What was measured nearest in size to t, if anything was."""
    if not isinstance(t, Tensor):
        return None
    dtypes = _of_device(t.device, package_alone).get(table, {}).get(name, {})
    sizes = dtypes.get(str(t.dtype).removeprefix("torch."))
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


forget()
