"""The suites one after the other, each in a process of its own: what `fluxkern bench` runs.

    python3 -m benchmarks.suite [--suite NAME ...] [--shape NAME ...] [--json FILE] [--plots DIR]
    python3 -m benchmarks.suite --compare OLD [NEW]
    python3 -m benchmarks.suite --profile out.json.gz
    python3 -m benchmarks.suite --report

Results go to benchmarks/results/<machine>/<suite>.json, from which --report writes
docs/performance.md; with --json they go into one file, with --compare nowhere. On a GPU the suites
are those that run there. To measure as on a machine with AVX2 alone, set
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 before.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from fluxkern import bench
from fluxkern.cases import SHAPES

from . import changes, report
from .runs import default_device

SUITES = {  # seconds on two cores: how much of the progress bar is whose
    "ops": 370,
    "products": 30,
    "blocks": 270,
    "step": 60,
    "parts": 25,
    "pipeline": 35,
    "quality": 40,
    "scaling": 60,
}
MEASURE = {"cpu": tuple(SUITES), "cuda": ("ops", "blocks", "step", "scaling")}
SHAPED = {"cpu": ("ops", "blocks"), "cuda": ("ops", "blocks", "step")}  # that take --shape


def place(machine: dict[str, Any]) -> str:
    """The name of a machine's folder."""
    by = [machine["cpu"], *["as"] * bool(machine["limits"]), machine["cpu_capability"]["torch"]]
    if machine["gpu"]:
        by = [machine["gpu"]["name"]]
    name = f"{' '.join(by)} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def described(machine: dict[str, Any]) -> Iterator[str]:
    """The machine and the code, once for all suites."""
    clock, versions = machine["clock"], machine["versions"]
    yield report.about(machine)
    governor = clock["governor"] or "governor unknown"
    yield f"{governor}, {clock['mhz'] or '?'} MHz, load {machine['load']:.1f}"
    yield ", ".join(f"{name} {found or 'absent'}" for name, found in versions.items())
    yield "peers: " + report.peers(bench.peers.installed())
    yield f"commit {machine['commit']}, source {machine['source']}"


class Progress:
    """One bar over all suites, in the seconds that each is known to take."""

    def __init__(self, suites: list[str]) -> None:
        self.bar = tqdm(total=sum(SUITES[s] for s in suites), unit="s", disable=None)
        self.before = 0

    def show(self, suite: str, file: Path) -> None:
        self.bar.set_description(suite)
        data = report.read(file) if file.exists() else {"verified": [], "refused": []}
        done = len(data["verified"]) + len(data["refused"])
        share = min(done / max(data.get("planned", 1), 1), 1)
        self.bar.n = self.before + round(share * SUITES[suite])
        self.bar.refresh()

    def done(self, suite: str) -> None:
        self.before += SUITES[suite]
        self.bar.n = self.before


def run(suite: str, file: Path, arguments: list[str], progress: Progress) -> int:
    command = [sys.executable, "-m", f"benchmarks.{suite}", "--json", str(file), *arguments]
    progress.bar.write(f"\n{suite} -> {file}")
    with subprocess.Popen(command, cwd=bench.ROOT, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            progress.bar.write(line.rstrip())
            progress.show(suite, file)
    progress.done(suite)
    return child.returncode


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.suite", description=__doc__)
    add = parser.add_argument
    add(
        "--suite",
        nargs="+",
        choices=MEASURE[default_device()],
        help="all; with --compare those of OLD",
    )
    add("--shape", nargs="+", choices=SHAPES, help="of ops and blocks, on a GPU of the step too")
    add("--threads", type=int, help="of torch; as many as there are cores")
    add("--json", type=Path, metavar="FILE", help="of all suites, in place of results/")
    add("--plots", type=Path, metavar="DIR", help="draws what was measured there")
    add("--compare", type=Path, nargs="+", metavar="FILE", help="OLD, and NEW or a fresh run")
    add("--profile", type=Path, metavar="FILE", help="a trace of one step, .json.gz; no suite")
    add("--report", action="store_true", help="measures nothing, writes docs/performance.md")
    args = parser.parse_args(argv)
    if args.compare and len(args.compare) > 2:
        parser.error("--compare takes one or two files")
    return args


def measured(suites: list[str], folder: Path, threads: int, shapes: list[str]) -> int:
    """Runs them; the worst exit status."""
    progress, statuses = Progress(suites), []
    for suite in suites:
        asked = ["--threads", str(threads)]
        asked += ["--shape", *shapes] if shapes and suite in SHAPED[default_device()] else []
        statuses.append(run(suite, (folder / f"{suite}.json").resolve(), asked, progress))
    progress.bar.close()
    return max(map(abs, statuses))  # negative: a signal ended it


def suites_of(args: argparse.Namespace) -> list[str]:
    """What is run.

    Raises:
        ValueError: the old results are of no suite of this machine.
    """
    here = MEASURE[default_device()]
    found = args.suite or here
    if args.compare and not args.suite:
        old = changes.read(args.compare[0])
        found = [suite for suite in old if suite in here]
        if not found:
            raise ValueError(f"--compare must hold one of {', '.join(here)}, got {', '.join(old)}")
    return list(found)


def run_suites(args: argparse.Namespace, folder: Path, name: str, threads: int) -> int:
    suites = suites_of(args)
    status = measured(suites, folder, threads, args.shape or [])
    files = {suite: folder / f"{suite}.json" for suite in suites}
    found = {suite: report.read(file) for suite, file in files.items() if file.exists()}
    if args.json:
        bench.write_json(args.json, {"suites": found})
    if args.plots:
        from .plots import draw

        draw(name, found, args.plots)
    return max(status, changes.compare(args.compare[0], folder)) if args.compare else status


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    threads = bench.pin_threads(args.threads)
    if args.report:
        report.write()
        return 0
    if args.profile:
        from . import profile

        return profile.write(args.profile, threads)
    if args.compare and len(args.compare) == 2:
        return changes.compare(*args.compare)
    bench.limit_isa()
    machine = bench.machine()
    print("\n".join(described(machine)), flush=True)
    name = place(machine)
    with TemporaryDirectory() as aside:
        folder = Path(aside) if args.json or args.compare else report.RESULTS / name
        return run_suites(args, folder, name, threads)


if __name__ == "__main__":
    sys.exit(main())
