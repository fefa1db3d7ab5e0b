"""diffusers' denoising loop of the compact model, accelerated in place, against itself.

    python3 -m benchmarks.diffusers_loop --json diffusers_loop.json

Nothing but `fluxkern.accelerate` is between the two: pipeline, scheduler, embeddings and every
Linear are diffusers' and torch's in both. The bound is as in the other wholes.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fluxkern
from fluxkern import bench
from fluxkern.model import sampling

from . import whole
from .pipeline import CFG, LIMIT, STEPS, Pipelines
from .runs import Report, options
from .whole import BASELINE, Provider, Truth

ACCELERATED = "diffusers accelerated"
SIDES = (64, 128, 256)  # pixels


@contextmanager
def parts() -> Iterator[dict[str, float]]:
    """Seconds of torch's linears and of our attention."""
    linear = F.linear
    with whole.our_parts() as seconds:

        def clocked(*args: object) -> Tensor:
            start = time.perf_counter()
            out = linear(*args)
            seconds["linears"] += time.perf_counter() - start
            return out

        F.linear = clocked
        try:
            yield seconds
        finally:
            F.linear = linear


class Loops:
    """The shipped weights in fp32, as they are and accelerated."""

    def __init__(self, steps: int = STEPS) -> None:
        self.pipelines = Pipelines(steps)
        self.original = self.pipelines.theirs
        self.accelerated = fluxkern.accelerate(copy.deepcopy(self.original), strict=True)

    def call(self, pipe: Any, side: int, latents: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        given = {
            **self.pipelines.embedded,
            **{"latents": latents, "num_inference_steps": self.pipelines.steps},
            **{"true_cfg_scale": CFG, "height": side, "width": side, "output_type": "latent"},
        }
        return lambda: (pipe(**given).images,)

    def measure(self, side: int, rounds: int = whole.ROUNDS) -> bench.Comparison:
        generator = torch.Generator().manual_seed(0)
        noise = sampling.get_noise(1, side, side, torch.float32, generator, "cpu")
        latents = sampling.pack(noise)
        original = self.call(self.original, side, latents)
        accelerated = self.call(self.accelerated, side, latents)
        providers = {
            BASELINE: Provider(original, LIMIT, whole.torch_parts),
            ACCELERATED: Provider(accelerated, LIMIT, parts, ours=True),
        }
        tokens = f"{latents.shape[1]} + {self.pipelines.text_length} tokens"
        size = f"{side} px, {tokens}, {self.pipelines.steps} steps of two passes"
        truth = Truth(original(), (latents,))
        return whole.measure("diffusers' loop", size, "fp32", providers, truth, rounds)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("diffusers_loop", __doc__, whole.ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--side", type=int, nargs="+", default=SIDES, help="pixels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    report = Report("diffusers_loop", args)
    loops = Loops(args.steps)
    for side in args.side:
        report.add(f"loop, {side} px", partial(loops.measure, side, args.rounds), whole.table)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
