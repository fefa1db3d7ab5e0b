"""Whether the kernels are right and fast on this machine's GPU: one call of some nine minutes.

    make gpu-check [BUDGET=540] [OUT=DIR] [SITE=DIR] [RESUME=FILE] [DRY_RUN=1]
    python3 -m benchmarks.gpu_check [--budget SECONDS] [--out DIR] [--site DIR ...] ...

It needs python3 with torch, triton, pytest, transformers, nvcc; no network, nothing installed.
To be carried along where the machine lacks it: diffusers, unpacked in a folder that --site names
(0.42 is a wheel of 6.4 MB, 30 MB unpacked); without it there are no figures of diffusers. The
checkout without build/ and .venv/ is below 48 MB.

Parts run in the order of what would be missed most, each until a moment of the budget; a part that
is early leaves its time to the next. Every figure is in summary.json as soon as it is made. What
crashes, hangs, is wrong or runs out of memory is a row that says so and costs its op alone.

    summary.json        all rows, and which parts ended how     table.txt    the figures, in short
    measured/<gpu>.json for fluxkern/measured/, if it is good   profile.txt  a step by kernel names
    picture.png         of the compact model                    log.txt      what all processes said

With --dry-run the CPU takes the place of the GPU, with small sizes, and the files are named so.
Exit status: 0 nothing failed, 1 something did, 3 there is no GPU.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from fluxkern import bench
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    print(f"no GPU: {sys.executable} has no torch; make gpu-check PYTHON=... names another")
    sys.exit(3)

from fluxkern.cases import CASES
from fluxkern.ops import measured

from .gpu_table import table
from .jobs import CUT, FAILED, PASSED, SKIPPED, Job, Jobs, Row

NO_GPU, PLAN = 3, 540  # exit status; seconds that the moments of PARTS are of
NORMS = ("gated_residual_norm_modulate", "norm_modulate", "gated_residual")
DRY_OPS = ("gated_residual_norm_modulate", "qk_norm_rope", "attention")
GPU_TESTS = ("providers", "step_graph", "triton", "cuda_wgmma", "probe")
SANITIZER_ERROR = 86  # exit status of compute-sanitizer that found something


def module(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments))


def tests(file: str, chosen: str) -> tuple[str, ...]:
    command = (sys.executable, "-m", "pytest", f"tests/test_{file}.py", "-q", "--tb=short")
    return (*command, "-p", "no:cacheprovider", "-p", "benchmarks.outcomes", "-k", chosen)


@dataclass(frozen=True)
class Check:
    """What the parts are made for."""

    dry_run: bool
    out: Path
    capability: str
    ops: tuple[str, ...]  # those that have a kernel for this device

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def limit(self, seconds: float) -> float:
        """After which an item hangs; a dry run may share its cores."""
        return 6 * seconds if self.dry_run else seconds

    def file(self, name: str) -> Path:
        return self.out / f"{'dry-run-' * self.dry_run}{name}"

    def op_rows(self, *more: object) -> tuple[str, ...]:
        about = ("--shape", "flux-1024", "--dtype", "bf16")
        if self.dry_run:
            about = ("--shape", "compact", "--dtype", "fp32", "--rounds", 3)
        return module("op_rows", *about, "--device", self.device, *more)


# the parts


def build(check: Check) -> list[Job]:
    """_C_cuda for this GPU alone; a dry run compiles nothing."""
    if check.dry_run:
        return []
    alone = not (bench.ROOT / "fluxkern/_C_cpu.so").exists()
    environment = {
        "FLUXKERN_BUILD": "cuda-alone" if alone else "cuda",
        "TORCH_CUDA_ARCH_LIST": check.capability + "a" * check.capability.startswith("9."),
    }
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    return [Job("build", command, environment=environment)]


def smoke(check: Check) -> list[Job]:
    """Every op on every backend, held to fp64 and not timed, an op a process."""
    command = check.op_rows("--rounds", 0)
    return [Job(f"smoke {op}", command, (op,), limit=check.limit(30)) for op in check.ops]


def first(check: Check) -> list[Job]:
    """The step of FLUX.1-dev in its loop: the published figure's measure."""
    size = ("--config", "dev", "--size", 1024)
    if check.dry_run:
        size = ("--config", "compact", "--size", 128, "--dtype", "fp32", "--steps", 5, "--warm", 1)
    profile = ("--profile", check.file("profile.txt"))
    command = module("loop", *size, "--device", check.device, *profile)
    return [Job("loop", command, ("ours", "eager", "diffusers"), limit=check.limit(60))]


def family(op: str) -> str:
    return next((name for name in ("attention", "linear", "qk") if name in op), "norms")


def grouped(check: Check, command: tuple[str, ...], ops: tuple[str, ...]) -> list[Job]:
    """A process a family: what starts for each op would take more time than the ops."""
    order = ("attention", "linear", "qk", "norms")
    found = {name: tuple(op for op in ops if family(op) == name) for name in order}
    return [
        Job(name, command, items, limit=check.limit(20)) for name, items in found.items() if items
    ]


def ops(check: Check) -> list[Job]:
    """Every forward against eager and copies of as many bytes."""
    return grouped(check, check.op_rows(), check.ops)


def backward(check: Check) -> list[Job]:
    found = tuple(op for op in check.ops if CASES[op].moved_backward is not None)
    return grouped(check, check.op_rows("--direction", "backward"), found)


def compiled(check: Check) -> list[Job]:
    """torch.compile of three norm ops, and of a block of each kind by diffusers."""
    norms = NORMS[:1] if check.dry_run else NORMS
    found = [Job("compiled norms", check.op_rows("--compile"), norms, limit=check.limit(40))]
    if check.dry_run:
        return found
    about = ("--shape", "flux-1024", "--dtype", "bf16", "--rounds", 7, "--device", check.device)
    blocks = [Job(f"{kind} block", module("blocks", *about, "--block", kind), limit=check.limit(60))
              for kind in ("double", "single")]  # fmt: skip
    return found + needing_diffusers(blocks)


def needing_diffusers(jobs: list[Job]) -> list[Job]:
    """Without it they only say so."""
    absent = "import sys; from benchmarks import rows; rows.emit(skip='diffusers is not installed')"
    if bench.system.version("diffusers") or importable("diffusers"):
        return jobs
    return [Job(job.name, (sys.executable, "-c", absent)) for job in jobs]


def importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def contract(check: Check) -> list[Job]:
    """tests/test_contract.py, a process an op."""
    if check.dry_run:
        chosen = f"forward_is_accurate and {DRY_OPS[0]}-cpu-fp32"
        return [Job("contract", tests("contract", chosen))]
    limit, backends = check.limit(130), "([{0}-cuda or [{0}-triton) and not emulator"
    return [Job(f"contract {op}", tests("contract", backends.format(op)), (), limit)
            for op in CASES]  # fmt: skip


def gpu_tests(check: Check) -> list[Job]:
    chosen = "replayed_steps or flash3_is_called or architecture" if check.dry_run else ""
    names = ("step_graph",) if check.dry_run else GPU_TESTS
    return [Job(f"test_{name}", tests(name, chosen)) for name in names]


def pictures(check: Check) -> list[Job]:
    """schnell's four steps and its autoencoder, and a picture of the compact model."""
    size = ("--config", "schnell", "--size", 1024, "--dtype", "bf16", "--rounds", 7)
    if check.dry_run:
        size = ("--config", "compact", "--size", 64, "--dtype", "fp32", "--rounds", 1)
        size += ("--threads", 1)
    picture = ("--whole", "picture", "--only", "eager", "fluxkern", "--device", check.device)
    drawn = ("--device", check.device, "--output", check.file("picture.png"))
    drawn += ("--steps", 1) if check.dry_run else ()
    return [
        Job("schnell", module("step", *size, *picture)),
        Job("picture", module("drawn", *drawn)),
    ]


def compiled_step(check: Check) -> list[Job]:
    """diffusers' step by torch.compile, and the attention under compute-sanitizer."""
    if check.dry_run:
        return []
    size = ("--config", "dev", "--size", 1024, "--dtype", "bf16", "--rounds", 5)
    step = module("step", *size, "--device", "cuda", "--only", "diffusers compiled", "fluxkern")
    found = needing_diffusers([Job("compiled step", step, limit=check.limit(55))])
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if os.access(tool, os.X_OK):
        wrapped = (tool, "--error-exitcode", str(SANITIZER_ERROR))
        command = (*wrapped, *check.op_rows("--rounds", 0, "--shape", "compact"))
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a tensor ends where its memory does
        found.append(Job("sanitizer", command, ("attention",), environment=caching))
    return found


@dataclass(frozen=True)
class Part:
    """Until when of the plan it runs, and whether its processes run side by side, two a core."""

    until: float
    jobs: Callable[[Check], list[Job]]
    side_by_side: bool = False


PARTS = {
    "build": Part(45, build),  # 25 is enough; without it all else is of Triton alone
    "smoke": Part(45, smoke, side_by_side=True),
    "first": Part(110, first),
    "ops": Part(170, ops),
    "compiled": Part(215, compiled),
    "contract": Part(330, contract, side_by_side=True),
    "gpu tests": Part(360, gpu_tests, side_by_side=True),
    "pictures": Part(400, pictures),
    "backward": Part(470, backward),
    "compiled step": Part(530, compiled_step),
}


# what was found


class Summary:
    """summary.json, written whole with each row; the measured table and the table beside it."""

    def __init__(self, check: Check, machine: dict[str, Any], earlier: list[Row]) -> None:
        self.check, self.started = check, time.monotonic()
        self.data: dict[str, Any] = {
            "dry_run": check.dry_run,
            "measured_on": "the CPU, in a dry run" if check.dry_run else machine["gpu"]["name"],
            "machine": machine,
            "parts": {},
            "rows": earlier,
        }
        self.write()

    def add(self, row: Row) -> None:
        self.data["rows"].append({"at": round(time.monotonic() - self.started, 1)} | row)
        self.write()
        if "order" in row:
            self.write_measured()

    def write(self) -> None:
        bench.write_json(self.check.file("summary.json"), self.data)

    def end(self, part: str) -> None:
        """A part's status is the worst of its jobs'."""
        found = {row.get("status") for row in self.data["rows"] if row["part"] == part}
        worst = next((status for status in (FAILED, CUT, PASSED) if status in found), SKIPPED)
        self.data["parts"][part] = worst
        self.write()
        print(f"{time.monotonic() - self.started:6.1f} s  {part:14} {worst}", flush=True)

    def write_measured(self) -> None:
        """What ops choose backends by, of the rows so far."""
        of = self.data["measured_on"]
        found: dict[str, Any] = {"device": of, "machine": self.data["machine"]}
        found |= {"order": {}, "tiles": {}, "digest": {}}
        for row in self.data["rows"]:
            if op := row.get("order"):
                sizes = found["order"].setdefault(op, {}).setdefault(row["dtype"], {})
                sizes[str(row["size"])] = row["times"]
                found["digest"].setdefault(op, {}).update(row["digest"])
        name = f"{'dry-run-' * self.check.dry_run}{measured.file_name(of)}"
        bench.write_json(self.check.out / "measured" / name, found)

    def close(self) -> int:
        text = table(self.data)
        self.check.file("table.txt").write_text(text + "\n")
        print(f"\n{text}")
        return int(any(s in (FAILED, CUT) for s in self.data["parts"].values()))


def kept(file: Path | None, machine: dict[str, Any]) -> list[Row]:
    """Rows of the jobs that passed in an earlier call, of this code on such a GPU; what it built
    may be gone."""
    if file is None:
        return []
    found = json.loads(file.read_text())
    was, here = ((m["source"], (m["gpu"] or {}).get("name")) for m in (found["machine"], machine))
    if was != here:
        raise SystemExit(
            f"--resume must be of source {here[0]} on {here[1]}, got {was[0]}, {was[1]}"
        )

    def with_status(*wanted: str) -> set[tuple[str, str]]:
        return {(r["part"], r["job"]) for r in found["rows"] if r.get("status") in wanted}

    done = with_status(PASSED) - with_status(FAILED, CUT) - {("build", "build")}
    return [row for row in found["rows"] if (row["part"], row["job"]) in done]


def run(args: argparse.Namespace, check: Check, machine: dict[str, Any]) -> int:
    start = time.monotonic()
    summary = Summary(check, machine, kept(args.resume, machine))
    done = {(row["part"], row["job"]) for row in summary.data["rows"]}
    cores = len(os.sched_getaffinity(0))
    try:
        with check.file("log.txt").open("wb") as log:
            jobs = Jobs(summary.add, log)
            for name, part in PARTS.items():
                if args.only and name not in args.only:
                    continue
                waiting = [job for job in part.jobs(check) if (name, job.name) not in done]
                share = 1.0 if check.dry_run else part.until / PLAN
                until = start + min(share * args.budget, args.budget - 5)
                jobs.run(name, waiting, until, 2 * cores if part.side_by_side else 1)
                summary.end(name)
    finally:  # also of a check that is told to end
        status = summary.close()
    return status


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu-check"), metavar="DIR", help="%(default)s")
    add("--budget", type=float, default=PLAN, metavar="SECONDS", help="of all, %(default)s")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--resume", type=Path, metavar="FILE", help="a summary.json: what passed is left")
    add("--site", type=Path, nargs="+", default=[], metavar="DIR", help="packages: diffusers")
    add("--dry-run", action="store_true", help="the CPU in place of the GPU, small sizes")
    args = parser.parse_args(argv)
    if args.budget < 10:
        parser.error(f"--budget must be at least 10 seconds, got {args.budget:g}")
    return args


def add_sites(folders: list[Path]) -> None:
    """Packages of these folders are found here and in all processes."""
    found = [str(folder.resolve()) for folder in folders]
    sys.path += found
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), *found])


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.site:
        add_sites(args.site)
    if args.dry_run:  # as many threads as cores wait for each other where others run too
        os.environ["OMP_NUM_THREADS"] = "1"
    gpu = bench.gpu()
    if not args.dry_run and gpu is None:
        print("no GPU: torch finds no CUDA device here; --dry-run goes through it with the CPU")
        return NO_GPU
    machine = bench.machine() | ({"gpu": None} if args.dry_run else {})
    on_gpu = tuple(op for op, case in CASES.items() if {"cuda", "triton"} & set(case.backends))
    capability = "" if args.dry_run else gpu["capability"]
    check = Check(args.dry_run, args.out.resolve(), capability, DRY_OPS if args.dry_run else on_gpu)
    check.out.mkdir(parents=True, exist_ok=True)
    return run(args, check, machine)


if __name__ == "__main__":
    sys.exit(main())
