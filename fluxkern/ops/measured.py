"""The measured order of backends: which was fastest, by device, op, dtype and size.

`fluxkern tune` writes one JSON file a device:

    {"device": "NVIDIA H200", "order": {"norm_modulate": {"bfloat16": {"24": {"cuda": 15.1, ...}}}}}

with microseconds, the fastest first; 24 is the size class, the bits of the number of elements of
the op's first tensor. A user's own file comes before the one of the package.
"""

import json
import os
import platform
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = Path(__file__).parents[1] / "measured"
LIMIT = 2**20  # bytes of a file

Order = dict[str, float]  # backend -> microseconds, fastest first
Orders = dict[str, dict[str, dict[int, Order]]]  # op -> dtype -> size class -> order


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


def read(path: Path) -> Orders:
    """A table as it was written; ValueError when it is anything else."""
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path}: larger than {LIMIT} bytes")
    try:
        orders = json.loads(path.read_text())["order"]
        return {
            str(op): {
                str(dtype): {
                    int(size): {str(b): float(us) for b, us in order.items()}
                    for size, order in sizes.items()
                }
                for dtype, sizes in dtypes.items()
            }
            for op, dtypes in orders.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a table of `fluxkern tune` ({error})") from None


@cache
def _of_device(type: str, index: int | None) -> Orders:
    name = file_name(device_name(torch.device(type, index)))
    for folder in (user_folder(), PACKAGE):
        if (folder / name).is_file():
            return read(folder / name)
    return {}


def order(op: str, args: tuple) -> Order | None:
    """What was measured nearest to these arguments, if anything was."""
    first = args[0] if args else None
    if not isinstance(first, Tensor):
        return None
    device = first.device
    measured = _of_device(device.type, device.index).get(op)
    sizes = measured and measured.get(str(first.dtype).removeprefix("torch."))
    if not sizes:
        return None
    here = size_class(first)
    return sizes[min(sizes, key=lambda size: abs(size - here))]


def forget() -> None:
    """Files are read anew."""
    _of_device.cache_clear()
