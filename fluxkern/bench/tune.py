"""Which backend of ours is fastest here, measured: what `fluxkern tune` writes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import ops as public
from ..cases import CASES, SHAPES, Maker
from ..ops import measured
from .compare import DTYPES, WrongResult, measure
from .system import machine
from .tables import write_json
from .timers import ROUNDS

NAMES = {"eager": "reference"}  # of a provider, where its backend has another
HALF = ("bf16", "fp16")  # whose kernels have a choice of tiles
DIRECTION = {"attention": "forward"}  # of a kernel of attention; the others' is the backward


def comparisons(
    ops: list[str], shapes: list[str], dtypes: list[str]
) -> Iterator[tuple[str, str, str, str]]:
    """(op, shape, dtype, direction) of all that is measured."""
    for op in ops:
        for dtype in dtypes:
            for shape in shapes:
                yield op, shape, dtype, "forward"
                if CASES[op].moved_backward is not None:
                    yield op, shape, dtype, "backward"


def order(op: str, shape: str, dtype: str, direction: str, device: str, rounds: int) -> dict:
    """Backend -> median microseconds, the fastest first; each was held to fp64 before."""
    only = ("eager", *CASES[op].backends, *CASES[op].providers)
    found = measure(op, shape, dtype, direction, device, rounds, only)
    for name, why in found.failed.items():
        raise WrongResult(f"{op}, {dtype}, {shape} by {name}: {why}")
    return fastest_first({row.provider: row.median for row in found.rows if row.provider in only})


def fastest_first(seconds: dict[str, float]) -> dict[str, float]:
    """Provider -> seconds, as the microseconds of a table's order."""
    times = {NAMES.get(name, name): round(s * 1e6, 2) for name, s in seconds.items()}
    return dict(sorted(times.items(), key=lambda row: row[1]))


def tiles(kernel: str, names: tuple[str, ...], shape: str, dtype: str, rounds: int) -> dict:
    """Tile -> median microseconds, the fastest first; each was held to fp64 before."""
    times = {}
    for name in names:
        with measured.trying(kernel, name):
            direction = DIRECTION.get(kernel, "backward")
            found = measure("attention", shape, dtype, direction, "cuda", rounds, ("triton",))
        times[name] = round(found.row("triton").median * 1e6, 2)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def add_tiles(
    table: dict[str, Any],
    shapes: list[str],
    dtypes: list[str],
    rounds: int,
    after_each: Callable[[dict[str, Any], str], None],
) -> None:
    """Measures the candidates of every Triton kernel that has more than one."""
    choices = public.tile_candidates(torch.empty(0, device="cuda").device)
    for kernel, names in choices.items():
        for dtype in (d for d in dtypes if d in HALF and len(names) > 1):
            for shape in shapes:
                q = CASES["attention"].inputs(Maker(SHAPES[shape], DTYPES[dtype], "meta"))["q"]
                if q.shape[-1] > 128:
                    continue
                found = tiles(kernel, names, shape, dtype, rounds)
                sizes = table["tiles"].setdefault(kernel, {}).setdefault(str(q.dtype)[6:], {})
                sizes[str(measured.size_class(q))] = found
                table["digest"].setdefault(kernel, {}).update(measured.digests(kernel, ["triton"]))
                times = ", ".join(f"{name} {us:.4g} us" for name, us in found.items())
                after_each(table, f"tiles of {kernel}, {dtype}, {shape}: {times}")


def tune(
    ops: list[str],
    shapes: list[str],
    dtypes: list[str],
    device: str = "cpu",
    rounds: int = ROUNDS,
    after_each: Callable[[dict[str, Any], str], None] = lambda table, row: None,
) -> dict[str, Any]:
    """Measures the backends that run on `device` and orders them.

    On a GPU the tiles of the Triton kernels come first, where attention is among the ops.

    Args:
        ops: names of `CASES`.
        shapes: names of `SHAPES`.
        dtypes: names of `DTYPES`.
        device: "cpu" or "cuda".
        rounds: samples of each.
        after_each: called with the table so far and a line about what was just measured.

    Returns:
        The table, as `ops/measured.py` has it.

    Raises:
        WrongResult: a backend is wrong; nothing is ordered by the speed of a wrong result.
    """
    name = measured.device_name(torch.empty(0, device=device).device)
    table: dict[str, Any] = {"device": name, "machine": machine()}
    table |= {"order": {}, "tiles": {}, "digest": {}}
    (attention,) = public.explain("attention")
    if device == "cuda" and "attention" in ops and attention.reasons["triton"] is None:
        add_tiles(table, shapes, dtypes, rounds, after_each)
    for op, shape, dtype, direction in comparisons(ops, shapes, dtypes):
        args = CASES[op].inputs(Maker(SHAPES[shape], DTYPES[dtype], "meta"))
        first = next(v for v in args.values() if isinstance(v, torch.Tensor))
        found = order(op, shape, dtype, direction, device, rounds)
        chosen = op if direction == "forward" else f"{op}_backward"
        sizes = table["order"].setdefault(chosen, {}).setdefault(str(first.dtype)[6:], {})
        sizes[str(measured.size_class(first))] = found
        table["digest"].setdefault(chosen, {}).update(measured.digests(chosen, found))
        times = ", ".join(f"{backend} {us:.4g} us" for backend, us in found.items())
        after_each(table, f"{chosen}, {dtype}, {shape}: {times}")
    return table


def write(table: dict[str, Any], path: Path | None = None) -> Path:
    """Writes a table whole or not at all; None is where ops look for the one of this device."""
    if path is None:
        path = measured.user_folder() / measured.file_name(table["device"])
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)
    measured.forget()
    return path
