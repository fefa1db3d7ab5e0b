"""How far every inexact mode is from fp32 beside how fast it is: per block, per step, per picture.

    python3 -m benchmarks.quality --json quality.json

Before the clock each mode is held to fp32 on the reference of every op: half precision to twice the
error of the reference in it. Errors are relative L2: of the stream after each block of one step
from the same inputs, and of what the loop has changed after each step. PSNR and SSIM (Wang et al.
2004, by torchmetrics) are of the pictures. No gate rests on a picture's PSNR alone: rounding at the
last bit moves it.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from fluxkern import FluxPipeline, bench, ops
from fluxkern.model import sampling

from . import whole
from .blocks import INT8_LIMIT
from .pipeline import LIMIT as FP32_LIMIT
from .runs import Report, options
from .whole import OURS, Provider, Truth

MODES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": "int8"}
PROMPTS = (
    "a red circle on a blue background",
    "a small yellow star at the top left, on a purple background",
    "a large green ring on the right, on white",
    "a black cross in the centre of an orange background",
)
STEPS, CFG = 16, 3.0


def error(found: Tensor, right: Tensor, start: Tensor | float = 0.0) -> float:
    """Relative L2 of what changed since the start."""
    off = (found.double() - right.double()).norm()
    return float(off / (right.double() - start).norm())


class Mode:
    """The compact pipeline in one mode, with everything that it passes on the way."""

    def __init__(self, name: str) -> None:
        self.pipe = FluxPipeline.from_pretrained("compact", dtype=MODES[name])
        size = self.pipe.default_size
        draws = (torch.Generator().manual_seed(i) for i in range(len(PROMPTS)))
        noise = [sampling.get_noise(1, size, size, torch.float32, g, "cpu") for g in draws]
        self.noise = sampling.pack(torch.cat(noise))

    def draw(self, prompts: tuple[str, ...] = PROMPTS, **more: Any) -> Tensor:
        """[N, 3, H, W] in 0..1."""
        return self.pipe(
            list(prompts),
            latents=self.noise[: len(prompts)],
            num_inference_steps=STEPS,
            true_cfg_scale=CFG,
            output_type="pt",
            progress=False,
            **more,
        ).images.float()

    def steps(self, prompts: tuple[str, ...] = PROMPTS) -> list[Tensor]:
        """Latents after each step."""
        seen: list[Tensor] = []

        def keep(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
            seen.append(tensors["latents"].float().clone())
            return {}

        self.draw(prompts, callback_on_step_end=keep)
        return seen

    def blocks(self) -> dict[str, Tensor]:
        """The stream after each block of the first step; the start is its noise."""
        seen: dict[str, Tensor] = {}
        flux = self.pipe.transformer

        def keep(name: str, stream: Any) -> None:
            seen.setdefault(name, stream.sum().float().clone())

        hooks = [
            module.register_forward_hook(lambda m, args, out, name=name: keep(name, args[0]))
            for kind in ("double_blocks", "single_blocks")
            for name, module in getattr(flux, kind).named_children()
            for name in (f"{kind.partition('_')[0]} {name}",)
        ]
        try:
            self.draw(callback_on_step_end=self.stop)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    @staticmethod
    def stop(pipe: Any, *_: Any) -> dict:
        pipe.interrupt = True
        return {}


def psnr(found: Tensor, right: Tensor) -> float:
    """dB of pictures in 0..1."""
    return -10 * math.log10(max(float((found - right).double().square().mean()), 1e-12))


def ssim(found: Tensor, right: Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(found, right, data_range=1.0))


def distances(mode: Mode, right: Mode) -> dict[str, Any]:
    """Of one mode from fp32."""
    exact, found = right.blocks(), mode.blocks()
    steps = zip(mode.steps(), right.steps(), strict=True)
    pictures = [*zip(mode.draw()[:, None], right.draw()[:, None], strict=True)]
    return {
        "blocks": {name: error(found[name], exact[name]) for name in exact},
        "steps": [error(f, r, right.noise) for f, r in steps],
        "psnr": [psnr(*pair) for pair in pictures],
        "ssim": [ssim(*pair) for pair in pictures],
    }


def table(name: str, found: dict[str, Any]) -> str:
    blocks, steps = found["blocks"].values(), found["steps"]
    return (
        f"{name:6} rel. L2 of blocks {min(blocks):.1e} to {max(blocks):.1e}, of steps"
        f" {steps[0]:.1e} to {steps[-1]:.1e}, PSNR {min(found['psnr']):.1f} dB at least,"
        f" {statistics.median(found['psnr']):.1f} in the middle, SSIM {min(found['ssim']):.4f} at"
        " least"
    )


def held(modes: dict[str, Mode]) -> dict[str, float]:
    """Errors of a loop's last step by our kernels, against the reference in fp32.

    Raises:
        WrongResult: it or the picture is too far off, or an op ran without its kernel.
    """

    def last(mode: Mode) -> tuple[Tensor]:
        return (mode.steps(PROMPTS[:1])[-1],)

    def picture(mode: Mode) -> tuple[Tensor]:
        return (mode.draw(PROMPTS[:1]),)

    found = right(modes, "denoising loop", last, modes["fp32"].noise[:1])
    right(modes, "picture", picture, torch.zeros(()))
    return found


def right(
    modes: dict[str, Mode], what: str, call: Callable[[Mode], tuple[Tensor]], start: Tensor
) -> dict[str, float]:
    def on_the_reference(mode: Mode) -> tuple[Tensor]:
        with ops.use_backend("reference"):
            return call(mode)

    truth = Truth(on_the_reference(modes["fp32"]), (start,))
    exact = {"fp32": FP32_LIMIT, "int8": INT8_LIMIT}
    limits = {
        name: exact.get(name) or 2 * truth.error(on_the_reference(mode))
        for name, mode in modes.items()
    }
    providers = {n: Provider(partial(call, m), limits[n], ours=True) for n, m in modes.items()}
    return whole.errors_of(what, providers, truth, "cpu")


def timed(modes: dict[str, Mode], rounds: int) -> bench.Comparison:
    """A picture by each in turn; their errors are those of the last step."""
    errors = held(modes)
    if not rounds:
        return bench.Comparison([], errors, {})
    calls: dict[str, Callable] = {n: partial(m.draw, PROMPTS[:1]) for n, m in modes.items()}
    samples, timer = whole.timed(calls, rounds, "cpu")
    size = f"{modes['fp32'].pipe.default_size} px, {STEPS} steps of two passes"
    rows = [
        whole.Row(
            *("picture", size, name, OURS, timer, errors[name], seconds),
            times={"fp32": bench.ratio(samples["fp32"], seconds)},
        )
        for name, seconds in samples.items()
    ]
    return bench.Comparison(rows, errors, {})


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("quality", __doc__, whole.ROUNDS)
    names = [name for name in MODES if name != "fp32"]
    parser.add_argument("--mode", nargs="+", choices=names, default=names)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    transformers.utils.logging.disable_progress_bar()
    report = Report("quality", args, planned=1, modes={}, prompts=PROMPTS)
    modes = {name: Mode(name) for name in ("fp32", *args.mode)}
    for name in args.mode:
        report.data["modes"][name] = bench.rounded(distances(modes[name], modes["fp32"]))
        print(table(name, report.data["modes"][name]), flush=True)
    report.add("picture", partial(timed, modes, args.rounds), rows_table)
    return report.close()


def rows_table(rows: list[whole.Row]) -> str:
    return "\n".join(whole.table([row]) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
