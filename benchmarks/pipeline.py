"""The compact FLUX.1 against diffusers' pipeline on the same files: its loop and a whole picture.

    python3 -m benchmarks.pipeline --json pipeline.json

The loop is a call that is given noise and embedded prompts and that returns latents.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from fluxkern import FluxPipeline, bench
from fluxkern.model import sampling
from fluxkern.pipeline import COMPACT_WEIGHTS

from . import whole
from .runs import Report, options
from .whole import BASELINE, COMPILED, OURS, Provider, Truth

PROMPT = "a red circle on a blue background"
STEPS, CFG = 16, 3.0
LIMIT = 1e-4  # relative L2 of what changes between noise and latents, and of a picture
WHOLES = ("denoising loop", "picture")


class Pipelines:
    """Both on the shipped weights in fp32, with the noise and the settings of a call."""

    def __init__(self, steps: int = STEPS) -> None:
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        self.ours = FluxPipeline.from_pretrained("compact")
        self.theirs = diffusers.FluxPipeline.from_pretrained(
            COMPACT_WEIGHTS, dtype=torch.float32, local_files_only=True
        )
        self.theirs.set_progress_bar_config(disable=True)
        self.steps, size = steps, self.ours.default_size
        self.text_length = self.ours.text_encoder.max_sequence_length
        generator = torch.Generator().manual_seed(0)
        noise = sampling.get_noise(1, size, size, torch.float32, generator, "cpu")
        self.latents = sampling.pack(noise)
        self.embedded = {
            f"{prefix}{name}": embeds
            for prefix, text in (("", PROMPT), ("negative_", ""))
            for name, embeds in zip(
                ("prompt_embeds", "pooled_prompt_embeds"),
                self.ours.text_encoder.encode([text], [text], self.text_length),
                strict=True,
            )
        }

    @property
    def size(self) -> str:
        pixels, tokens = self.ours.default_size, self.latents.shape[1]
        return (
            f"{pixels} px, {tokens} + {self.text_length} tokens, {self.steps} steps of two passes"
        )

    def compiled(self) -> Any:
        """Theirs with each kind of block compiled, as diffusers advises."""
        torch._dynamo.reset()
        compiled = copy.deepcopy(self.theirs)
        compiled.transformer.compile_repeated_blocks(fullgraph=True)
        return compiled

    def call(self, pipe: Any, what: str) -> Callable[[], tuple[Tensor, ...]]:
        loop = what == WHOLES[0]
        said = self.embedded if loop else {"prompt": PROMPT, "negative_prompt": ""}
        given = {
            **said,
            **{"latents": self.latents, "num_inference_steps": self.steps},
            **{"true_cfg_scale": CFG, "max_sequence_length": self.text_length},
            **{"height": self.ours.default_size, "width": self.ours.default_size},
            "output_type": "latent" if loop else "pt",
        }
        if pipe is self.ours:
            given["progress"] = False
        return lambda: (pipe(**given).images,)

    def measure(
        self, what: str, rounds: int = whole.ROUNDS, only: tuple[str, ...] | None = None
    ) -> bench.Comparison:
        torch_parts, our_parts = whole.torch_parts, whole.our_parts
        if what != WHOLES[0]:  # the VAE's convolutions are products too
            torch_parts = our_parts = None
        eager = self.call(self.theirs, what)
        results = eager()
        start = self.latents if what == WHOLES[0] else torch.zeros_like(results[0])
        providers = {
            BASELINE: Provider(eager, LIMIT, torch_parts),
            COMPILED: Provider(self.call(self.compiled(), what), LIMIT),
            OURS: Provider(self.call(self.ours, what), LIMIT, our_parts, ours=True),
        }
        truth = Truth(results, (start,))
        return whole.measure(what, self.size, "fp32", providers, truth, rounds, only)

    def levels(self) -> dict[str, float]:
        """How far our picture is from theirs, in levels of 255."""
        theirs, ours = (
            self.call(pipe, WHOLES[1])()[0].mul(255).round() for pipe in (self.theirs, self.ours)
        )
        off = (theirs - ours).abs()
        return {"largest": off.max().item(), "differing": (off > 0).double().mean().item()}


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("pipeline", __doc__, whole.ROUNDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    report = Report("pipeline", args, len(WHOLES), prompt=PROMPT)
    pipelines = Pipelines(args.steps)
    for what in WHOLES:
        report.add(what, lambda what=what: pipelines.measure(what, args.rounds), whole.table)
    report.data["levels"] = bench.rounded(pipelines.levels())
    print("picture: largest difference {largest:.0f} of 255".format_map(report.data["levels"]))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
