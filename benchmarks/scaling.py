"""How time and memory of a step grow with tokens, batch and steps, and the exponents of it.

    python3 -m benchmarks.scaling --json scaling.json

Attention grows with the square of the tokens, all else in proportion, and nothing else grows. On a
CPU the model is the compact one, on a GPU one block of each kind of FLUX.1's width. Each call is
held to the same weights in fp32 on the reference of every op before it is timed. Memory is what
torch allocates at the peak of a call beside weights and inputs. An exponent is the slope of the
logarithms from an eighth of the largest value on, of three values at least.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxkern import bench, ops
from fluxkern.model import sampling

from . import profile, step, whole
from .runs import Report, default_device, options
from .whole import OURS, Provider, Truth

TOKENS = {"cpu": [256, 512, 1024, 2048, 4096], "cuda": [2**n for n in range(8, 17)]}
FEW = (1, 2, 4, 8)  # batch elements, steps
BASE = {"cpu": 256, "cuda": 4096}  # image tokens of those
CELL = 16  # pixels of a token
DTYPE = {"cpu": "fp32", "cuda": "bf16"}
CONFIG = {"cpu": "compact", "cuda": "one block each"}
FITTED_FROM, FITTED = 1 / 8, 3  # of the largest; how many values it takes


@dataclass(frozen=True, kw_only=True)
class Point(whole.Row):
    """One value of what grows; `count` is what the exponent is of.

    Args:
        kinds: seconds of attention and of the rest.
        peak: bytes.
    """

    axis: str
    count: int
    kinds: dict[str, float]
    peak: int


Given = tuple[dict[str, Any], int]  # inputs, and how many steps: of 0 one call


def given_of(axis: str, model: step.Model, values: list[int]) -> dict[int, Given]:
    """Value -> what is called: a step, or some of them."""
    base, found = BASE[model.device], {}
    for value in values:
        tokens = value if axis == "tokens" else base
        batch = value if axis == "batch" else 1
        pixels = (CELL, CELL * tokens)
        given = step.inputs(model.config, pixels, model.dtype, model.device, batch)
        steps = value if axis == "steps" else 0
        found[value] = given, steps
    return found


@torch.no_grad()
def run(model: step.Model, given: dict[str, Any], steps: int) -> tuple[Tensor]:
    """One call of the transformer, or a loop."""
    if not steps:
        return (model.flux(**given),)
    latents = sampling.denoise(
        model.flux,
        given["img"],
        given["img_ids"],
        sampling.Conditioning(given["txt"], given["y"]),
        sampling.get_schedule(steps, given["img"].shape[1], sampling.ScheduleConfig()),
        guidance_scale=3.5 if model.config.guidance_embed else None,
    )
    return (latents,)


def error_of(what: str, model: step.Model, given: dict[str, Any], steps: int) -> float:
    """Of our kernels, against the same weights and inputs in fp32 on the reference.

    Raises:
        WrongResult: it is too large, or an op ran without its kernel.
    """
    with step.in_fp32(model.flux), ops.use_backend("reference"):
        (right,) = run(model, step.widened(given), steps)
    start = given["img"].float() if steps else torch.zeros_like(right)
    truth = Truth((right.float(),), (start,))
    limit = model.limit(truth, model.on_the_reference(run, model, given, steps))
    ours = Provider(partial(run, model, given, steps), limit, ours=True)
    return whole.errors_of(what, {OURS: ours}, truth, model.device)[OURS]


def kinds_of(call: Callable[[], object], seconds: float, device: str) -> dict[str, float]:
    """Seconds of attention and of all else."""
    share = profile.shares(call, device).get("attention", 0.0)
    return {"attention": share * seconds, "rest": (1 - share) * seconds}


def measure(axis: str, model: step.Model, values: list[int], rounds: int) -> bench.Comparison:
    given = given_of(axis, model, values)
    text = model.inputs["txt"].shape[1]
    errors = {value: error_of(f"{axis}, {value}", model, *of) for value, of in given.items()}
    verified = {str(value): error for value, error in errors.items()}
    if not rounds:
        return bench.Comparison([], verified, {})
    calls = {value: partial(run, model, *of) for value, of in given.items()}
    samples, timer = whole.timed(calls, rounds, model.device)
    rows = []
    for value, seconds in samples.items():
        what = f"{axis}, {value}"
        about = (what, model.name, DTYPE[model.device], OURS, timer, errors[value], seconds, {})
        rows.append(
            Point(
                *about,
                axis=axis,
                count=value + text * (axis == "tokens"),
                kinds=kinds_of(calls[value], float(np.median(seconds)), model.device),
                peak=profile.peak_memory(calls[value], model.device),
            )
        )
    return bench.Comparison(rows, verified, {})


def fitted(counts: list[int]) -> list[bool]:
    return [count >= FITTED_FROM * max(counts) for count in counts]


def exponent(counts: list[int], found: list[float]) -> float:
    kept = fitted(counts)
    x, y = (np.log(np.array(values)[kept]) for values in (counts, found))
    return float(np.polyfit(x, y, 1)[0])


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Axis -> of what -> exponent, where there are values enough."""
    found = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        of = [row for row in rows if row["axis"] == axis]
        counts = [row["count"] for row in of]
        if sum(fitted(counts)) < FITTED:
            continue
        found[axis] = {
            "time": exponent(counts, [row["median"] for row in of]),
            **{
                kind: exponent(counts, [row["kinds"][kind] for row in of])
                for kind in ("attention", "rest")
            },
            "memory": exponent(counts, [row["peak"] for row in of]),
        }
    return found


def table(rows: list[Point]) -> str:
    lines = [f"{'':16} {'ms':>10} {'IQR':>8} {'attention':>10} {'rest':>10} {'peak, MB':>9}"]
    for row in rows:
        kept = row.as_dict()
        times = (kept["median"], kept["iqr"], *kept["kinds"].values())
        widths = (10, 8, 10, 10)
        cells = (f"{1e3 * s:{w}.2f}" for s, w in zip(times, widths, strict=True))
        lines.append(f"{row.what:16} {' '.join(cells)} {row.peak / 1e6:9.1f}")
    return "\n".join(lines)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("scaling", __doc__, whole.ROUNDS)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--tokens", nargs="+", type=int, help="of the picture; 256 to 4096, on a GPU 65536")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    device = args.device
    axes = {"tokens": args.tokens or TOKENS[device], "batch": list(FEW), "steps": list(FEW)}
    report = Report("scaling", args, len(axes), exponents={})
    model = step.Model(CONFIG[device], 256, DTYPE[device], device)
    for axis, values in axes.items():
        report.add(axis, partial(measure, axis, model, values, args.rounds), table)
    report.data["exponents"] = bench.rounded(exponents(report.data["rows"]))
    for axis, found in report.data["exponents"].items():
        print(f"{axis}: " + ", ".join(f"{kind} ^ {power:.2f}" for kind, power in found.items()))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
