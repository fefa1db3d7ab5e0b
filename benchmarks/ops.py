"""Every op against eager, torch.compile and the machine's limits, as a table and as JSON.

    python3 -m benchmarks.ops --shape flux-512 --dtype fp32 bf16 --json ops.json

The file is written anew after each comparison, so what was measured is there when a run is cut off.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fluxkern import bench
from fluxkern.cases import CASES, SHAPES, TEST_SIZES

NORM_FAMILY = (  # in order of importance
    "joint_gated_residual_norm_modulate",
    "joint_norm_modulate",
    "joint_gated_residual",
    "gated_residual_norm_modulate",
    "norm_modulate",
    "gated_residual",
)
OPS = [*NORM_FAMILY, *(op for op in CASES if CASES[op].backends and op not in NORM_FAMILY)]


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.ops", description=__doc__)
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--op", nargs="+", choices=CASES, default=OPS)
    add("--shape", choices=[*SHAPES, *TEST_SIZES], default="flux-1024" if gpu else "flux-512")
    add("--dtype", nargs="+", choices=bench.DTYPES, default=["bf16", "fp32"])
    add("--direction", nargs="+", choices=bench.DIRECTIONS, default=["forward", "backward"])
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--only", nargs="+", help="providers: eager, compile or names of backends")
    add("--rounds", type=int, default=bench.ROUNDS, help="0 verifies and times nothing")
    add("--threads", type=int, help="of torch; as many as there are cores")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def comparisons(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for dtype in args.dtype:
        for op in args.op:
            for direction in args.direction:
                if direction == "forward" or CASES[op].moved_backward is not None:
                    yield op, dtype, direction


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


def compare(report: dict[str, Any], args: argparse.Namespace, *case: str) -> None:
    """One comparison into the report and onto the terminal."""
    op, dtype, direction = case
    only = tuple(args.only) if args.only else None
    try:
        found = bench.measure(op, args.shape, dtype, direction, args.device, args.rounds, only)
    except bench.WrongResult as refusal:
        report["refused"].append(str(refusal))
        print(f"REFUSED {dtype} {direction}: {refusal}", flush=True)
        return
    report["rows"] += [row.as_dict() for row in found.rows]
    report["verified"].append(f"{op}, {dtype}, {direction}: {', '.join(found.verified)}")
    report["skipped"] |= found.skipped
    print(bench.table(found.rows) or f"right: {report['verified'][-1]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    bench.pin_threads(args.threads)
    pages = bench.keep_pages()
    report: dict[str, Any] = {
        "machine": bench.machine() | {"freed_pages_kept": pages},
        "shape": args.shape,
        "device": args.device,
        **{"rows": [], "verified": [], "refused": [], "skipped": {}},
    }
    if args.rounds:
        report["ceilings"] = ceilings(args)
        print(", ".join(f"{name} {rate:.4g}" for name, rate in report["ceilings"].items()))
        print(f"load before: {report['machine']['load']:.1f}", flush=True)
    for case in comparisons(args):
        compare(report, args, *case)
        if args.json:
            bench.write_json(args.json, report)
    if args.rounds:
        found = costs(args)
        report["calls"] = [asdict(cost) for cost in found]
        print(bench.cost_table(found))
        if args.json:
            bench.write_json(args.json, report)
    for provider, reason in report["skipped"].items():
        print(f"without {provider}: {reason}")
    return 1 if report["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
