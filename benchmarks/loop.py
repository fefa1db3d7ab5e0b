"""A step of FLUX.1-dev in its denoising loop: ours first, then eager and diffusers.

    python3 -m benchmarks.loop --config dev --size 1024 --device cuda ours eager diffusers

`ours` is 20 steps of `denoise` with the modulation made ahead, from a GPU that was idle and then
again until it is warm; then a step that makes its modulation, where the step's time goes by the
names of its kernels, and its error against fp32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from fluxkern import bench
from fluxkern.bench.system import said_by
from fluxkern.model import sampling

from . import profile, rows, whole
from .jobs import FAILED, PASSED
from .step import Model

STEPS, WARM = 20, 10.0  # of a loop; seconds of loops, after which a GPU is as warm as it gets
TOP = 30  # kernels
QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
ITEMS = ("ours", "eager", "diffusers")


def state() -> dict[str, str | None]:
    """Clocks, power and temperature as they are now."""
    query = [f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    return {"state": said_by("nvidia-smi", *query), "asked": QUERY}


def ticks(device: str) -> tuple[Callable[[], object], Callable[[list], list[float]]]:
    """What marks a moment, and what makes seconds of the marks; on a GPU nothing waits for it."""
    if device == "cpu":
        return time.perf_counter, lambda marks: [b - a for a, b in pairwise(marks)]

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(marks: list) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    return mark, seconds


def loop(model: Model, steps: int, cuda_graph: bool | None = None) -> list[float]:
    """Seconds of each step of the real loop but the first."""
    mark, seconds = ticks(model.device)
    marks, given = [], model.inputs
    with torch.no_grad():
        sampling.denoise(
            model.flux,
            given["img"],
            given["img_ids"],
            sampling.Conditioning(given["txt"], given["y"]),
            sampling.get_schedule(steps, given["img"].shape[1], sampling.ScheduleConfig()),
            guidance_scale=3.5 if model.config.guidance_embed else None,
            cuda_graph=cuda_graph,
            on_step=lambda _: marks.append(mark()),
        )
    return seconds(marks)


def repeated(model: Model, call: Callable[[], object], times: int) -> list[float]:
    mark, seconds = ticks(model.device)
    call()
    marks = [mark()]
    for _ in range(times):
        call()
        marks.append(mark())
    return seconds(marks)


def hand_over(what: str, seconds: list[float], **more: object) -> None:
    ms = [1e3 * s for s in seconds]
    about = {"what": what, "ms": statistics.median(ms), "least": min(ms), "most": max(ms)}
    rows.emit(**bench.rounded(about | {"samples": len(ms)}), **more)


def ours(model: Model, args: argparse.Namespace) -> None:
    rows.emit(what="before", **state())
    loop(model, 3)  # compiles what it needs
    hand_over("step in the loop, modulation ahead, cool", loop(model, args.steps))
    end, last = time.monotonic() + args.warm, []
    while time.monotonic() < end or not last:
        last = loop(model, args.steps)
    hand_over("step in the loop, modulation ahead, sustained", last, **state())
    if model.device != "cpu":
        hand_over("step in the loop, as a CUDA graph", loop(model, args.steps, True)[2:])
    hand_over("step, modulation inside", repeated(model, model.step, 5))
    kernels(model, args.profile)
    error_of_a_step(model)


def kernels(model: Model, file: Path | None) -> None:
    """Where a step's time goes, by the names of its kernels; operators on a CPU."""
    found, _ = profile.taken(model.step, model.device)
    of = "self_cpu_time_total" if model.device == "cpu" else "self_device_time_total"
    top = sorted(found.key_averages(), key=lambda event: -getattr(event, of))[:TOP]
    table = [[event.key, round(getattr(event, of), 1), event.count] for event in top]
    rows.emit(what="kernels of a step", microseconds=table)
    if file:
        lines = [f"{us:12.1f} us {count:6} x  {name}" for name, us, count in table]
        file.write_text("\n".join([f"one step, {model.size}, {model.device}", *lines]) + "\n")


def error_of_a_step(model: Model) -> None:
    exact = model.exact("step")
    truth = whole.Truth(exact, tuple(torch.zeros_like(t) for t in exact))
    eager = truth.error(model.on_the_reference(model.step)())
    error, limit = truth.error(model.step()), max(2 * eager, 1e-5)
    status = PASSED if error <= limit else FAILED
    figures = bench.rounded({"error": error, "eager": eager, "limit": limit})
    rows.emit(what="relative L2 of a step against fp32", status=status, **figures)


def eager(model: Model, args: argparse.Namespace) -> None:
    call = model.on_the_reference(model.step)
    hand_over("step, eager", repeated(model, call, 3), **state())


def diffusers(model: Model, args: argparse.Namespace) -> None:
    found = model.diffusers("step", 0.0)
    if not found:
        why = "diffusers is not installed; --site names a folder that holds it"
        rows.emit(what="step, diffusers", without=why)
        return
    with whole.best_attention(model.device):
        hand_over("step, diffusers", repeated(model, found[whole.BASELINE].call, 5), **state())


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.loop", description=__doc__)
    add = parser.add_argument
    add("item", nargs="+", choices=ITEMS)
    add("--config", default="dev")
    add("--size", type=int, default=1024)
    add("--dtype", choices=bench.DTYPES, default="bf16")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--steps", type=int, default=STEPS)
    add("--warm", type=float, default=WARM, metavar="SECONDS")
    add("--profile", type=Path, metavar="FILE", help="the table of kernels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    items = {"ours": ours, "eager": eager, "diffusers": diffusers}
    rows.begin(args.item[0])
    model = Model(args.config, args.size, args.dtype, args.device)
    for name in args.item:
        rows.begin(name)
        try:
            items[name](model, args)
        except Exception as failure:
            rows.emit(what=name, status=FAILED, why=rows.failed(failure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
