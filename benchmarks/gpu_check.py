"""Whether the kernels are right and fast on this machine's GPU, in one command without a network.

    python3 -m benchmarks.gpu_check [--out DIR] [--budget SECONDS] [--only PART ...] [--resume]

Each part runs in processes of its own and writes DIR/<part>.json while it goes; a failure or a
crash of one does not stop the others. `--dry-run` goes through all of them with the CPU in place
of the GPU and names its files dry-run-<part>.json. Exit status: 0 no part failed, 1 one did, 3
there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    from fluxkern import bench
except ModuleNotFoundError as missing:
    if missing.name != "torch":
        raise
    print(f"no GPU: {sys.executable} has no torch; make gpu-check PYTHON=... names another")
    sys.exit(3)

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = 3
LINES = 100  # of the final table, which has fewer
PASSED, FAILED, SKIPPED, RUNNING = "passed", "failed", "skipped", "cut off"
PROMPT = "a red circle on a blue background"
FUSED = "joint_gated_residual_norm_modulate"
WGMMA = "cuda-wgmma"  # the attention of compute capability 9.0; `ops` measures it where it runs
SANITIZER_ERROR = 86  # exit status of compute-sanitizer that found something


@dataclass
class Part:
    """One part's file and time."""

    name: str
    out: Path
    dry_run: bool
    machine: dict[str, Any]
    seconds: float  # that it may take
    started: float = field(default_factory=time.monotonic)

    @property
    def file(self) -> Path:
        return part_file(self.out, self.name, self.dry_run)

    @property
    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def save(self, status: str, result: dict[str, Any]) -> dict[str, Any]:
        about = {
            "part": self.name,
            "status": status,
            "seconds": round(time.monotonic() - self.started, 1),
            "budget": round(self.seconds),
            "dry_run": self.dry_run,
            "measured_on": "the CPU, in a dry run" if self.dry_run else self.machine["gpu"]["name"],
            "machine": self.machine,
        }
        bench.write_json(self.file, about | result)
        return about | result

    def run(
        self,
        command: list[str],
        environment: dict[str, str] | None = None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> tuple[int | None, str]:
        """Exit status (None: it was stopped when its time was up) and the end of what it said."""
        log = self.out / f"{'dry-run-' if self.dry_run else ''}log.txt"
        with log.open("a+b") as said:
            said.write(f"\n$ {' '.join(command)}\n".encode())
            said.flush()
            start = said.seek(0, os.SEEK_END)
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = self.wait(child, meanwhile)
            said.seek(max(start, said.seek(0, os.SEEK_END) - 8000))
            return status, said.read().decode(errors="replace")

    def wait(self, child: subprocess.Popen, meanwhile: Callable[[], object]) -> int | None:
        try:
            while self.left > 0:
                try:
                    return child.wait(timeout=min(2, max(self.left, 0.01)))
                except subprocess.TimeoutExpired:
                    meanwhile()
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
            meanwhile()


def part_file(out: Path, name: str, dry_run: bool) -> Path:
    return out / f"{'dry-run-' if dry_run else ''}{name}.json"


def python(*args: str) -> list[str]:
    return [sys.executable, *args]


def tail(said: str, lines: int = 12) -> list[str]:
    return said.strip().splitlines()[-lines:]


def ending(part: Part, status: int | None) -> dict[str, Any]:
    return {"exit_status": status} if status is not None else {"out_of_time": round(part.seconds)}


# the parts: each returns its status and result


def build(part: Part) -> tuple[str, dict[str, Any]]:
    """_C_cuda for this GPU alone; a dry run builds _C_cpu into a folder that it throws away."""
    if part.dry_run:
        aside = part.out / "dry-run-build"
        environment = {"FLUXKERN_BUILD": "cpu"}
        command = python("setup.py", "--quiet", "build_ext", "--build-lib", str(aside))
    else:
        capability = part.machine["gpu"]["capability"]
        architecture = capability + "a" * capability.startswith("9.")
        environment = {"FLUXKERN_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture}
        command = python("setup.py", "--quiet", "build_ext", "--inplace")
    status, said = part.run(command, environment)
    info = (aside if part.dry_run else ROOT) / "fluxkern/_build_info.json"
    built = json.loads(info.read_text()) if status == 0 else None
    if part.dry_run:
        shutil.rmtree(aside, ignore_errors=True)
    result = {"environment": environment, "build_info": built, **ending(part, status)}
    return (PASSED, result) if status == 0 else (FAILED, result | {"said": tail(said)})


def has_wgmma(part: Part) -> bool:
    return not part.dry_run and part.machine["gpu"]["capability"] == "9.0"


def chosen_tests(backend: str, dry_run: bool) -> str:
    """For pytest's -k: the ids read [op-backend-...], those of test_cuda_wgmma.py [backend-...]."""
    if dry_run:
        return f"is_accurate and {FUSED}-{backend}-fp32"
    if backend == WGMMA:
        return f"{WGMMA} and not {WGMMA}-emulator"
    return f"-{backend}" + (" and not -cuda-emulator" if backend == "cuda" else "")


def outcomes(file: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    counts = Counter(line["outcome"] for line in lines)
    return {
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "failures": [line for line in lines if line["outcome"] == "failed"],
        "skips": Counter(line["why"] for line in lines if line["outcome"] == "skipped"),
        "slowest": sorted(lines, key=lambda line: -line["seconds"])[:5],
    }


def verdict(found: dict[str, Any], status: int | None) -> str:
    if found["failed"] or status not in (0, 5) or not (found["passed"] or found["skipped"]):
        return FAILED
    return PASSED if found["passed"] else SKIPPED


def contract(part: Part) -> tuple[str, dict[str, Any]]:
    """tests/test_contract.py for one backend after the other; on Hopper its attention's own."""
    backends = ("cpu", "reference") if part.dry_run else ("cuda", "triton", "reference", "cpu")
    backends = ((WGMMA,) if has_wgmma(part) else ()) + backends
    result: dict[str, Any] = {}
    for backend in backends:
        file = part.out / f".{part.file.stem}-{backend}.jsonl"
        file.unlink(missing_ok=True)
        tests = "tests/test_cuda_wgmma.py" if backend == WGMMA else "tests/test_contract.py"
        command = python("-m", "pytest", tests, "-q", "--tb=short")
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.outcomes", "--outcomes", str(file)]
        command += ["-k", chosen_tests(backend, part.dry_run)]

        def progress(backend: str = backend, file: Path = file) -> None:
            part.save(RUNNING, {"backends": result | {backend: outcomes(file)}})

        status, said = part.run(command, meanwhile=progress)
        found = outcomes(file)
        file.unlink(missing_ok=True)
        result[backend] = {"status": verdict(found, status), **found, **ending(part, status)}
        if result[backend]["status"] == FAILED:
            result[backend]["said"] = tail(said)
    return worst([found["status"] for found in result.values()]), {"backends": result}


GPU_TESTS = ("test_providers.py", "test_step_graph.py", "test_triton.py")


def model(part: Part) -> tuple[str, dict[str, Any]]:
    """Attention by others, CUDA graphs of a step, and what else has tests of its own on a GPU."""
    file = part.out / f".{part.file.stem}.jsonl"
    file.unlink(missing_ok=True)
    command = python("-m", "pytest", *(f"tests/{name}" for name in GPU_TESTS), "-q", "--tb=short")
    command += ["-p", "no:cacheprovider", "-p", "benchmarks.outcomes", "--outcomes", str(file)]
    command += ["-k", "replayed_steps or flash3_is_called"] * part.dry_run
    status, said = part.run(command, meanwhile=lambda: part.save(RUNNING, outcomes(file)))
    found = outcomes(file)
    file.unlink(missing_ok=True)
    result = found | ending(part, status)
    ended = verdict(found, status)
    return ended, result if ended != FAILED else result | {"said": tail(said)}


def worst(statuses: list[str]) -> str:
    return next(status for status in (FAILED, PASSED, SKIPPED) if status in statuses)


def odd_ops(part: Part) -> list[str]:
    """Every op forward and backward at an odd size."""
    workload = python("-m", "benchmarks.ops", "--rounds", "0", "--shape", "odd", "--threads", "1")
    workload += ["--dtype", "bf16", "--device", "cpu" if part.dry_run else "cuda"]
    return workload + (
        ["--only", "cuda", "triton"] if not part.dry_run else ["--only", "cpu", "--op", FUSED]
    )


def odd_wgmma() -> list[str]:
    """The attention of Hopper at odd lengths."""
    chosen = f"any_length and {chosen_tests(WGMMA, False)}"
    return python("-m", "pytest", "-q", "tests/test_cuda_wgmma.py", "-k", chosen)


def sanitized(part: Part, tool: str, sanitizer: str | None, workload: list[str]) -> dict[str, Any]:
    """What one tool of compute-sanitizer says of a program."""
    wrapped = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a tensor ends where its memory does
    status, said = part.run([*wrapped, *workload] if sanitizer else workload, environment)
    summary = re.search(r"={9} (.*SUMMARY: .*)", said)
    found = {"summary": summary and summary[1], **ending(part, status)}
    if status == 0 and (summary or not sanitizer):
        return {"status": PASSED} | found
    refused = sanitizer and status is not None and not summary
    return {"status": SKIPPED if refused else FAILED, "said": tail(said, 30)} | found


def sanitizer(part: Part) -> tuple[str, dict[str, Any]]:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if part.dry_run:
        found = sanitized(part, "none", None, odd_ops(part))
        return found["status"], {"tools": {"none": found}}
    if tool is None:
        return SKIPPED, {"said": ["compute-sanitizer is not installed"]}
    tools: dict[str, Any] = {}
    workloads = {"": odd_ops(part)} | ({f" of {WGMMA}": odd_wgmma()} if has_wgmma(part) else {})
    for name in ("memcheck", "racecheck"):
        for of, workload in workloads.items():
            tools[name + of] = sanitized(part, name, tool, workload)
            part.save(RUNNING, {"tools": tools})
    return worst([found["status"] for found in tools.values()]), {"tools": tools}


def suite(
    part: Part, module: str, real: list[str], dry: list[str], needs: str | None = None
) -> tuple[str, dict[str, Any]]:
    """A suite of benchmarks in a process of its own; what it has measured is kept as it grows."""
    if needs and importlib.util.find_spec(needs) is None:
        return SKIPPED, {"said": [f"{needs} is not installed; --site names a folder that holds it"]}
    file = part.out / f".{part.file.stem}.part"
    command = python("-m", f"benchmarks.{module}", "--json", str(file))
    command += dry if part.dry_run else real

    def measured() -> dict[str, Any]:
        return {"suite": json.loads(file.read_text()) if file.exists() else None}

    status, said = part.run(command, meanwhile=lambda: part.save(RUNNING, measured()))
    result = measured() | ending(part, status)
    file.unlink(missing_ok=True)
    return (PASSED, result) if status == 0 else (FAILED, result | {"said": tail(said)})


DRY = ["--threads", "1", "--rounds", "3", "--device", "cpu"]


def ops(part: Part) -> tuple[str, dict[str, Any]]:
    """Every op against eager, torch.compile and copies of as many bytes, the norm family first."""
    real = ["--device", "cuda", "--shape", "flux-1024", "--dtype", "bf16", "fp32"]
    dry = [*DRY, "--shape", "compact", "--op", FUSED]
    return suite(part, "ops", real, [*dry, "--dtype", "fp32", "--direction", "forward"])


def blocks(part: Part) -> tuple[str, dict[str, Any]]:
    """A block of each kind against diffusers, eager and compiled."""
    real = ["--device", "cuda", "--shape", "flux-1024", "--dtype", "bf16"]
    dry = [*DRY, "--shape", "compact", "--block", "single", "--dtype", "fp32"]
    return suite(part, "blocks", real, [*dry, "--only", "diffusers", "fluxkern"], "diffusers")


def step(part: Part) -> tuple[str, dict[str, Any]]:
    """All 57 blocks of FLUX.1-dev with random weights, with their peak of memory."""
    real = ["--device", "cuda", "--config", "dev", "--size", "1024", "--dtype", "bf16"]
    dry = [*DRY, "--size", "128", "--dtype", "fp32", "--only", "eager", "fluxkern"]
    return suite(part, "step", real, dry)


def schnell(part: Part) -> tuple[str, dict[str, Any]]:
    """Four steps of FLUX.1-schnell's size and the autoencoder, with their peak of memory."""
    picture = ["--whole", "picture", "--only", "eager", "fluxkern"]
    real = ["--device", "cuda", "--config", "schnell", "--size", "1024", "--dtype", "bf16"]
    dry = [*DRY, "--size", "64", "--dtype", "fp32"]
    return suite(part, "step", real + picture, dry + picture)


def scaling(part: Part) -> tuple[str, dict[str, Any]]:
    """Time and memory against tokens, batch and steps."""
    return suite(part, "scaling", ["--device", "cuda"], [*DRY, "--tokens", "64", "128"])


def draw(part: Part, file: Path, backend: str | None) -> tuple[int | None, str]:
    program = "import sys; from fluxkern.cli import main; sys.exit(main())"
    command = python("-c", program, "generate", PROMPT, "--seed", "0", "--force")
    command += ["--output", str(file), "--device", "cpu" if part.dry_run else "cuda"]
    command += ["--steps", "2"] * part.dry_run
    return part.run(command, {"FLUXKERN_BACKEND": backend} if backend else {})


def picture(part: Part) -> tuple[str, dict[str, Any]]:
    """One picture by the kernels and one by the reference, and what the judge sees in the first."""
    import numpy as np
    from PIL import Image

    from fluxkern.compact.drawings import Scene
    from fluxkern.compact.judge import judge, matches

    drawn = {None: part.file.with_suffix(".png"), "reference": part.out / ".reference.png"}
    for backend, file in drawn.items():
        status, said = draw(part, file, backend)
        if status != 0:
            return FAILED, {"said": tail(said), **ending(part, status)}
    ours, plain = (np.asarray(Image.open(file).convert("RGB")) for file in drawn.values())
    about = json.loads(Image.open(drawn[None]).info["fluxkern"])
    drawn["reference"].unlink()
    seen = judge(ours)
    right = matches(seen, Scene("circle", "red", "medium", "centre", "blue"))
    result = {
        "prompt": PROMPT,
        "judge": vars(seen),
        "right": right,
        "levels_from_reference": int(np.abs(ours.astype(int) - plain.astype(int)).max()),
        "backends": about["backends"],
        "steps": about["steps"],
    }
    return PASSED if right or part.dry_run else FAILED, result


PARTS: dict[str, tuple[Callable[[Part], tuple[str, dict[str, Any]]], int]] = {
    "build": (build, 20),  # share of the time that is left, against those of the parts after it
    "contract": (contract, 35),
    "model": (model, 8),
    "sanitizer": (sanitizer, 15),
    "ops": (ops, 35),
    "blocks": (blocks, 20),
    "step": (step, 25),
    "schnell": (schnell, 20),
    "scaling": (scaling, 25),
    "picture": (picture, 10),
}


# all of them


def run_part(part: Part) -> dict[str, Any]:
    part.save(RUNNING, {})
    try:
        status, result = PARTS[part.name][0](part)
    except Exception:
        status, result = FAILED, {"said": tail(traceback.format_exc())}
    return part.save(status, result)


def finished(file: Path, machine: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result of this code on this GPU, if it has one that did not fail."""
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    same = all(found["machine"][name] == machine[name] for name in ("gpu", "source"))
    return found if same and found["status"] in (PASSED, SKIPPED) else None


def check(args: argparse.Namespace) -> list[dict[str, Any]]:
    end = time.monotonic() + args.budget
    machine = bench.machine()
    if args.dry_run:
        machine["gpu"] = None
    waiting = [name for name in PARTS if not args.only or name in args.only]
    results = []
    while waiting:
        shares = sum(PARTS[name][1] for name in waiting)
        name = waiting.pop(0)
        seconds = max(end - time.monotonic(), 0) * PARTS[name][1] / shares
        part = Part(name, args.out, args.dry_run, machine, seconds)
        earlier = finished(part.file, machine) if args.resume else None
        results.append(earlier or run_part(part))
        print(line_of(results[-1]), flush=True)
    return results


# the table


def line_of(found: dict[str, Any]) -> str:
    status = found["status"]
    detail = DETAILS[found["part"]](found) if status == PASSED else why_not(found)
    return f"{found['part']:10} {status:8} {found['seconds']:6.0f} s  {detail}"[:200]


def why_not(found: dict[str, Any]) -> str:
    if "out_of_time" in found:
        return f"its {found['out_of_time']} s were up"
    if "backends" in found:
        return DETAILS["contract"](found)
    if "tools" in found:
        return DETAILS["sanitizer"](found)
    if found.get("suite"):
        return suite_detail(found)
    return " / ".join(found.get("said", [])[-1:])


def suite_detail(found: dict[str, Any]) -> str:
    measured = found["suite"]
    said = f"{len(measured['verified'])} comparisons, {len(measured['refused'])} refused"
    absent = [name for name, version in measured["peers"].items() if version is None]
    powers = measured.get("exponents", {}).get("tokens", {})
    grown = ", ".join(f"{kind} ^ {power:.2f}" for kind, power in powers.items())
    return "; ".join(filter(None, (said, grown, f"absent: {', '.join(absent)}")))


DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "build": lambda found: str(found["environment"]),
    "contract": lambda found: "; ".join(
        f"{name} {b['passed']} passed, {b['failed']} failed, {b['skipped']} skipped"
        for name, b in found["backends"].items()
    ),
    "sanitizer": lambda found: "; ".join(
        f"{name}: {tool['summary'] or tool['status']}" for name, tool in found["tools"].items()
    ),
    **dict.fromkeys(("ops", "blocks", "step", "schnell", "scaling"), suite_detail),
    "model": lambda found: (
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    ),
    "picture": lambda found: (
        f"{found['judge']}, {found['levels_from_reference']} levels from the reference's"
    ),
}


# the figures that were promised


@dataclass(frozen=True)
class Figure:
    """One promise about an H200, and what was measured here."""

    name: str
    value: float
    bound: float
    most: bool = False  # the bound is an upper one

    def __str__(self) -> str:
        kept = self.value <= self.bound if self.most else self.value >= self.bound
        word = "at most" if self.most else "at least"
        return f"{'yes' if kept else 'NO':3} {self.name}: {self.value:.4g}, {word} {self.bound:g}"


OURS = ("cuda", "cuda-wgmma", "triton")
OTHERS = ("cudnn", "flash3", "flash")
MEMORY_BOUND = (FUSED, "norm_modulate", "qk_norm_rope_")


def fastest(rows: list[dict[str, Any]], op: str, way: str, *names: str) -> dict | None:
    """The row of the fastest of these providers in bf16."""
    asked = [r for r in rows if (r["op"], r["direction"], r["dtype"]) == (op, way, "bf16")]
    found = [row for row in asked if row["provider"] in names]
    return min(found, key=lambda row: row["median"], default=None)


def op_figures(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    for op in MEMORY_BOUND:
        if ours := fastest(rows, op, "forward", *OURS):
            yield Figure(f"{op}, share of the copy", ours["share"], 0.9)
            if gain := ours["times"].get("compile"):
                yield Figure(f"{op}, times Inductor's", gain, 1.1)
        if ours := fastest(rows, op, "backward", *OURS):
            yield Figure(f"{op} backward, share of the copy", ours["share"], 0.8)
    ours = fastest(rows, "attention", "forward", *OURS)
    best = fastest(rows, "attention", "forward", "cudnn", "flash3")
    if ours and best:
        ratio = best["median"] / ours["median"]
        yield Figure(f"own attention over {best['provider']}", ratio, 0.7)
    best = fastest(rows, "attention", "forward", *OTHERS, *OURS)
    whole = fastest(rows, "rope_attention", "forward", *OTHERS, *OURS)
    if best and whole:
        name = f"norm + RoPE + attention ({whole['provider']}) over {best['provider']} alone"
        yield Figure(name, best["median"] / whole["median"], 0.92)


def step_figures(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    for row in rows:
        if row["provider"] == "fluxkern":
            yield Figure("57-block step, ms", row["median"] * 1e3, 118, most=True)
            for baseline, gain in row["times"].items():
                if "compile" in baseline:
                    yield Figure(f"57-block step, times {baseline}", gain, 1.05)


FIGURES = {"ops": op_figures, "step": step_figures}


def figures(found: dict[str, Any]) -> list[str]:
    """Of a part what was promised of it; of what was not measured none."""
    promised = FIGURES.get(found["part"], lambda rows: ())
    return [str(figure) for figure in promised(found["suite"]["rows"])]


def op_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line for an op, dtype and backend: microseconds, share of the copy, times faster."""
    ours: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["provider"] != "copy" and row["provider"] not in bench.BASELINES:
            key = (row["op"], row["dtype"], row["provider"])
            ours.setdefault(key, {})[row["direction"]] = row
    columns = f"{'us':>7} {'copy':>5} {'eager':>6} {'compile':>7}"
    blocks = "".join(f" | {direction:8} {columns}" for direction in ("forward", "backward"))
    lines = [f"{'op':35} {'dtype':5} {'by':10}{blocks}"]
    for (op, dtype, backend), found in ours.items():
        blocks = "".join(
            f" | {'':8} {block(found.get(direction))}" for direction in ("forward", "backward")
        )
        lines.append(f"{op:35} {dtype:5} {backend:10}{blocks}")
    return lines


def whole_lines(found: dict[str, Any]) -> Iterator[str]:
    """One line a provider: milliseconds, times faster than each baseline, error, peak."""
    measured = found["suite"]
    peaks = {}
    for step in measured.get("kinds", []):
        peaks |= {(step["size"], step["dtype"], p): b for p, b in step["peak"].items()}
    for row in measured["rows"]:
        times = ", ".join(f"{x:.2f} x {name}" for name, x in row["times"].items())
        size = row["size"].partition(" tokens")[0]
        about = f"{row['what']}, {size}, {row['dtype']}"
        peak = next((b for (s, d, p), b in peaks.items() if is_of(row, s, d, p)), row.get("peak"))
        memory = f" peak {peak / 1e9:.3f} GB" if peak else ""
        said = f"{row['median'] * 1e3:9.2f} ms {row['error']:7.1g} {times}{memory}"
        yield f"{about:44.44} {row['provider']:20} {said}"


def is_of(row: dict[str, Any], size: str, dtype: str, provider: str) -> bool:
    return row["size"].startswith(size) and (row["dtype"], row["provider"]) == (dtype, provider)


def block(row: dict[str, Any] | None) -> str:
    if row is None:
        return " " * 28
    gains = (f"{row['times'][b]:.2f}" if b in row["times"] else "-" for b in bench.BASELINES)
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    return "{:7.1f} {:>5} {:>6} {:>7}".format(row["median"] * 1e6, share, *gains)


def suite_lines(found: dict[str, Any]) -> list[str]:
    measured = found["suite"]
    lines = [f"REFUSED {why}" for why in measured["refused"]]
    if found["part"] != "ops":
        return lines + list(whole_lines(found))
    ceilings = measured.get("ceilings", {}).items()
    lines.append(", ".join(f"{name} {value:.4g}" for name, value in ceilings))
    return lines + op_lines(measured["rows"])


def final_table(results: list[dict[str, Any]], dry_run: bool) -> str:
    machine = results[0]["machine"]
    where = machine["cpu"] if dry_run else machine["gpu"]["name"]
    lines = [f"{'DRY RUN, NO GPU: ' * dry_run}{where}, torch {machine['versions']['torch']}, "]
    lines[0] += f"commit {machine['commit']}, source {machine['source']}"
    lines += [line_of(found) for found in results]
    measured = [found for found in results if found.get("suite")]
    for found in measured * (not dry_run):
        lines += figures(found)
    for found in measured:
        lines += suite_lines(found)
    if len(lines) >= LINES:
        lines[LINES - 2 :] = [f"and {len(lines) - LINES + 2} lines more, see the parts' files"]
    return "\n".join(lines)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu-check"), metavar="DIR", help="%(default)s")
    add("--budget", type=float, default=1740, metavar="SECONDS", help="for all parts, 1740")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--resume", action="store_true", help="leave parts that have passed before")
    add(
        "--site", type=Path, nargs="+", default=[], metavar="DIR", help="unpacked wheels: diffusers"
    )
    add("--dry-run", action="store_true", help="the CPU in place of the GPU, small sizes")
    return parser.parse_args(argv)


def add_sites(folders: list[Path]) -> None:
    """Packages of these folders are found here and in the processes of the parts."""
    found = [str(folder.resolve()) for folder in folders]
    sys.path += found
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), *found])


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.site:
        add_sites(args.site)
    if not args.dry_run and bench.gpu() is None:
        print("no GPU: torch finds no CUDA device here; --dry-run goes through it with the CPU")
        return NO_GPU
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = check(args)
    text = final_table(results, args.dry_run)
    part_file(args.out, "table", args.dry_run).with_suffix(".txt").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if any(found["status"] not in (PASSED, SKIPPED) for found in results) else 0


if __name__ == "__main__":
    sys.exit(main())
