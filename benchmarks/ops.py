"""Every op against eager, torch.compile and the machine's limits, as a table and as JSON.

    python3 -m benchmarks.ops --shape flux-512 compact --dtype fp32 bf16 --json ops.json

The file is written anew after each comparison, so what was measured is there when a run is cut off.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product

import torch

from fluxkern import bench
from fluxkern.cases import CASES, SHAPES, TEST_SIZES

from .runs import Report, default_device, default_shape, options

NORM_FAMILY = (  # in order of importance
    "gated_residual_norm_modulate",
    "norm_modulate",
    "gated_residual",
)
OPS = [*NORM_FAMILY, *(op for op in CASES if CASES[op].backends and op not in NORM_FAMILY)]


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("ops", __doc__, bench.ROUNDS)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    of_this_machine = [op for op in OPS if gpu or "cpu" in CASES[op].backends]
    add("--op", nargs="+", choices=CASES, default=of_this_machine)
    add("--shape", nargs="+", choices=[*SHAPES, *TEST_SIZES], default=[default_shape()])
    add("--dtype", nargs="+", choices=bench.DTYPES, default=["bf16", "fp32"])
    add("--direction", nargs="+", choices=bench.DIRECTIONS, default=["forward", "backward"])
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--only", nargs="+", help="providers: eager, compile or names of backends")
    return parser.parse_args(argv)


def comparisons(args: argparse.Namespace) -> Iterator[tuple[str, str, str, str]]:
    for shape, dtype, op, direction in product(args.shape, args.dtype, args.op, args.direction):
        if direction == "forward" or CASES[op].moved_backward is not None:
            yield op, shape, dtype, direction


def ceilings(args: argparse.Namespace) -> dict[str, float]:
    """Of copies, of products, and of the timer itself."""
    rates = {
        f"{dtype} TFLOP/s": bench.matrix_rate(args.device, bench.DTYPES[dtype]) / 1e12
        for dtype in args.dtype
    }
    copy = bench.copy_bandwidth(args.device) / 1e9
    return {"copy GB/s": copy, **rates, "timer us": bench.timer_floor(args.device) * 1e6}


def costs(args: argparse.Namespace) -> list[bench.CallCost]:
    return [cost for op in args.op for cost in bench.call_costs(op, args.dtype[0], args.device)]


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    planned = [*comparisons(args)]
    report = Report("ops", args, len(planned), device=args.device)
    if args.rounds:
        report.data["ceilings"] = bench.rounded(ceilings(args))
        print(", ".join(f"{name} {rate:.4g}" for name, rate in report.data["ceilings"].items()))
        print(f"load before: {report.data['machine']['load']:.1f}", flush=True)
    only = tuple(args.only) if args.only else None
    for case in planned:
        measure = partial(bench.measure, *case, args.device, args.rounds, only)
        report.add(", ".join(case), measure, bench.table)
    if args.rounds:
        found = costs(args)
        report.data["calls"] = [bench.rounded(asdict(cost)) for cost in found]
        print(bench.cost_table(found))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
