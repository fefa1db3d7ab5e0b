"""The suites one after the other, each in a process of its own: what `fluxkern bench` runs.

    python3 -m benchmarks.suite [--suite ops products blocks pipeline] [--json FILE] [--plots DIR]
    python3 -m benchmarks.suite --report

Results go to benchmarks/results/<machine>/<suite>.json, from which --report writes
docs/performance.md. To measure as on a machine with AVX2 alone, set ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 before.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fluxkern import bench

from . import report

SUITES = ("ops", "products", "blocks", "pipeline")


def place(machine: dict[str, Any]) -> str:
    """The name of a machine's folder."""
    by = [machine["cpu"], *["as"] * bool(machine["limits"]), machine["cpu_capability"]["torch"]]
    if machine["gpu"]:
        by = [machine["gpu"]["name"]]
    name = f"{' '.join(by)} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(suite: str, file: Path, arguments: list[str]) -> int:
    command = [sys.executable, "-m", f"benchmarks.{suite}", "--json", str(file), *arguments]
    print(f"\n{suite} -> {file}", flush=True)
    return subprocess.run(command, cwd=bench.ROOT).returncode


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.suite", description=__doc__)
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, default=SUITES, help="all of them")
    add("--threads", type=int, help="of torch; as many as there are cores")
    add("--json", type=Path, metavar="FILE", help="of one suite, in place of its file in results/")
    add("--plots", type=Path, metavar="DIR", help="draws what was measured there")
    add("--report", action="store_true", help="measures nothing, writes docs/performance.md")
    args = parser.parse_args(argv)
    if args.json and len(args.suite) > 1:
        parser.error("--json needs one --suite")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.report:
        report.write()
        return 0
    threads = bench.pin_threads(args.threads)
    name = place(bench.machine())
    files = {s: args.json or report.RESULTS / name / f"{s}.json" for s in args.suite}
    statuses = [run(s, file.resolve(), ["--threads", str(threads)]) for s, file in files.items()]
    if args.plots:
        from .plots import draw

        draw(name, {s: report.read(file) for s, file in files.items()}, args.plots)
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
