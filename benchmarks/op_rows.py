"""Ops one by one for the check of a GPU: held to fp64, timed, each figure handed over at once.

python3 -m benchmarks.op_rows --shape flux-1024 --dtype bf16 --device cuda OP ...
"""

import argparse
import sys
from functools import partial

import torch

from fluxkern import bench
from fluxkern.bench import tune
from fluxkern.cases import CASES, SHAPES, Maker
from fluxkern.ops import measured

from . import rows
from .jobs import FAILED, PASSED


def names_of(op: str, compiled: bool, device: str) -> tuple[str, ...]:
    """What is held to fp64 and timed: eager, every backend of the device, and all by others."""
    case = CASES[op]
    ours = [b for b in case.backends if (b == "cpu") == (device == "cpu")]
    return ("eager", *["compile"] * compiled, *ours, *case.providers)


def size_of(op: str, shape: str, dtype: str) -> tuple[str, int]:
    """Dtype and size class of the op's first tensor, as a measured table counts them."""
    args = CASES[op].inputs(Maker(SHAPES[shape], bench.DTYPES[dtype], "meta"))
    first = next(v for v in args.values() if isinstance(v, torch.Tensor))
    return str(first.dtype).removeprefix("torch."), measured.size_class(first)


def hand_over(op: str, direction: str, found: bench.Comparison, size: tuple[str, int]) -> None:
    about = {"op": op, "direction": direction}
    for name, error in found.verified.items():
        rows.emit(**about, provider=name, status=PASSED, max_error=bench.rounded(error))
    for name, why in found.failed.items():
        rows.emit(**about, provider=name, status=FAILED, why=why)
    for name, why in found.skipped.items():
        rows.emit(**about, provider=name, without=why)
    for row in found.rows:
        rows.emit(**row.as_dict())
    apart = ("copy", "compile", *(f"{name} kernel" for name in CASES[op].backends))
    times = tune.fastest_first(
        {r.provider: r.median for r in found.rows if r.provider not in apart}
    )
    if times:
        chosen = op if direction == "forward" else f"{op}_backward"
        digest = measured.digests(chosen, times)
        rows.emit(order=chosen, dtype=size[0], size=size[1], times=times, digest=digest)


def run(op: str, args: argparse.Namespace) -> None:
    """One op; whatever it raises is a row."""
    rows.begin(op)
    only = names_of(op, args.compile, args.device)
    measure = partial(bench.measure, op, args.shape, args.dtype, args.direction, args.device)
    try:
        found = measure(rounds=args.rounds, only=only)
    except Exception as failure:
        rows.emit(op=op, direction=args.direction, status=FAILED, why=rows.failed(failure))
    else:
        hand_over(op, args.direction, found, size_of(op, args.shape, args.dtype))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.op_rows", description=__doc__)
    add = parser.add_argument
    add("op", nargs="+", choices=CASES)
    add("--shape", choices=SHAPES, default="flux-1024")
    add("--dtype", choices=bench.DTYPES, default="bf16")
    add("--direction", choices=bench.DIRECTIONS, default="forward")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--rounds", type=int, default=bench.ROUNDS, help="0 verifies and times nothing")
    add("--compile", action="store_true", help="torch.compile too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    torch.manual_seed(0)
    for op in args.op:
        run(op, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
