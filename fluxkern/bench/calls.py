"""What a call costs on its way from Python to the kernel."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import ops
from ..cases import CASES, Maker, Sizes
from ..testing import in_schema_order, torch_op
from .compare import DTYPES, given, private_op, reasons
from .timers import ROUNDS, Calls, cpu_times, spread


@dataclass(frozen=True)
class CallCost:
    """What the host spends on one call of a tiny size; nothing waits for a GPU."""

    op: str
    backend: str
    route: str
    microseconds: float
    iqr: float
    note: str


TINY = Sizes(1, 1, 1, 8, 1, 8, skip=0, spare=0)


def routes(op: str, backend: str, args: dict[str, Any]) -> Calls:
    """The ways into one kernel, from the outside in."""
    public, positional = getattr(ops, op), in_schema_order(op, args, backend)
    torch_route = torch_op(op)
    found: Calls = {
        "public function": lambda: public(**args, backend=backend),
        "torch op": lambda: torch_route(*positional),
    }
    private = private_op(op, backend)
    if private is not None:
        found["private op"] = partial(private, *given(op, args, backend))
    return found


def call_costs(
    op: str, dtype: str = "fp32", device: str = "cpu", rounds: int = ROUNDS, calls: int = 200
) -> list[CallCost]:
    """Microseconds from Python to kernel, by route, of every backend that runs here."""
    args = CASES[op].inputs(Maker(TINY, DTYPES[dtype], device))
    here = ["reference", *(name for name, why in reasons(op, args).items() if why is None)]
    ways = {(b, name): call for b in here for name, call in routes(op, b, args).items()}

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    before = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    samples, note = cpu_times({way: repeated(ways[way]) for way in ways}, rounds, before)
    return [
        CallCost(op, *way, statistics.median(s) / calls * 1e6, spread(s) / calls * 1e6, note)
        for way, s in samples.items()
    ]
