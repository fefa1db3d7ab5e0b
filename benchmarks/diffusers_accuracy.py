"""bf16 of accelerated diffusers pipelines beside diffusers' own bf16, both against its fp32.

    python3 -m benchmarks.diffusers_accuracy --json diffusers_accuracy.json

Every FLUX pipeline of diffusers from tiny random components, those of the tests, new ones a seed.
Compared are what each call of each FLUX model gives on the inputs that it had in the fp32 run, and
the latents of the whole pipeline. Errors are root mean squares, means over the seeds.

The inputs of the models are bf16 numbers in both, timestep and guidance one half: times 1000, as
the models take them, they are bf16 numbers too. Others are rounded by up to 2, the same in both,
and that is nearly all of an error, as it is of the latents'.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

import fluxkern
from fluxkern import bench

from .runs import Report, options

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # their tiny pipelines
from test_diffusers_pipelines import PIPELINES, build, call  # noqa: E402

SEEDS = 8
LIMIT = 1.05  # of our error over theirs
Errors = dict[str, float]  # original, accelerated

Call = tuple[str, dict[str, Any]]  # name of a model, its keyword arguments


def flux_models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {
        name: getattr(pipe, name) for name in ("transformer", "controlnet") if hasattr(pipe, name)
    }


def tensors(value: object, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with its floating tensors changed, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: tensors(v, change) for name, v in value.items()}
    return (
        type(value)(tensors(v, change) for v in value) if isinstance(value, list | tuple) else value
    )


def exact(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs that bf16 holds."""
    kwargs = tensors(kwargs, lambda t: t.bfloat16().float())
    halves = ("timestep", "guidance")
    return {
        n: torch.full_like(v, 0.5) if n in halves and v is not None else v
        for n, v in kwargs.items()
    }


def recorded(pipe: DiffusionPipeline) -> tuple[Tensor, list[Call]]:
    """The latents of a run, and every call of a FLUX model in it."""
    calls: list[Call] = []
    handles = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, exact(kwargs))),
            with_kwargs=True,
        )
        for name, model in flux_models(pipe).items()
    ]
    latents = call(pipe)
    for handle in handles:
        handle.remove()
    return latents, calls


def flat(value: object) -> Tensor:
    """All floating tensors of lists, tuples and dicts in one."""
    found: list[Tensor] = []
    tensors(value, lambda t: found.append(t.float().flatten()))
    return torch.cat(found)


@torch.no_grad()
def replayed(pipe: DiffusionPipeline, calls: list[Call], dtype: torch.dtype) -> Iterator[Tensor]:
    """All that the models give, flat, a call each."""
    models = flux_models(pipe)
    for name, kwargs in calls:
        given = tensors(kwargs, lambda t: t.to(dtype))
        yield flat(models[name](**given | {"return_dict": False}))


def rms(found: Tensor, right: Tensor) -> float:
    return (found.float() - right).square().mean().sqrt().item()


def one_seed(pipeline: type[DiffusionPipeline], seed: int) -> dict[str, Errors]:
    """What is compared -> its errors."""
    torch.manual_seed(seed)
    pipe = build(pipeline)
    latents, calls = recorded(pipe)
    right = list(replayed(pipe, calls, torch.float32))
    pipe.to(torch.bfloat16)
    accelerated = fluxkern.accelerate(copy.deepcopy(pipe), strict=True)
    found: dict[str, Errors] = {"models": {}, "latents": {}}
    for name, each in (("original", pipe), ("accelerated", accelerated)):
        outputs = zip(replayed(each, calls, torch.bfloat16), right, strict=True)
        found["models"][name] = statistics.fmean(rms(f, r) for f, r in outputs)
        found["latents"][name] = rms(call(each, torch.bfloat16), latents)
    return found


def compare(pipeline: type[DiffusionPipeline], seed: int, seeds: int) -> dict[str, Any]:
    """A row: mean errors over the seeds, and ours in terms of theirs."""
    runs = [one_seed(pipeline, seed + n) for n in range(seeds)]
    row: dict[str, Any] = {"pipeline": pipeline.__name__, "seeds": seeds}
    for what in ("models", "latents"):
        theirs, ours = (
            statistics.fmean(run[what][name] for run in runs)
            for name in ("original", "accelerated")
        )
        row[what] = {"original": theirs, "accelerated": ours, "ratio": ours / theirs}
    return bench.rounded(row)


def line(row: dict[str, Any]) -> str:
    cells = (
        f"{row[what]['original']:10.3g} {row[what]['accelerated']:11.3g} {row[what]['ratio']:6.3f}"
        for what in ("models", "latents")
    )
    return f"{row['pipeline']:30} {'  '.join(cells)}"


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("diffusers_accuracy", __doc__, 0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    logging.set_verbosity_error()
    report = Report("diffusers_accuracy", args, seed=args.seed)
    columns = f"{'original':>10} {'accelerated':>11} {'ratio':>6}"
    print(f"rms error of bf16: models, then latents\n{'':30} {columns}  {columns}")
    for pipeline in PIPELINES:
        row = compare(pipeline, args.seed, args.seeds)
        report.data["rows"].append(row)
        print(line(row), flush=True)
        if row["models"]["ratio"] > LIMIT:
            report.data["refused"].append(f"{row['pipeline']}: ratio above {LIMIT}")
        report.save()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
