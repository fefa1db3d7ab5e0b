"""How well the compact FLUX.1 draws what it is told, and what its distilled students lose.

    python3 -m benchmarks.compact [--base FOLDER] [--dev FOLDER] [--schnell FOLDER] [--json FILE]

Without folders, the checkpoints of the package. The judge reads every picture; prompts and noise
are fixed by --seed. What needs a checkpoint that is not there is left out.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fluxkern import FluxPipeline, bench, ops
from fluxkern._files import write_files, write_json
from fluxkern.compact import DEV_GUIDANCE, FEW_STEPS, GUIDANCE, STEPS, train
from fluxkern.compact.distill import GUIDANCES, velocity_error
from fluxkern.compact.drawings import BASE, caption, random_scene
from fluxkern.compact.evaluate import adherence, draw_sheet
from fluxkern.compact.judge import judge
from fluxkern.compact.optimise import Gradients, Optimised
from fluxkern.model.sampling import get_noise, pack
from fluxkern.model.transformer import Flux
from fluxkern.pipeline import COMPACT

PROMPT = "a small yellow star at the top left, on a purple background"


@dataclass(frozen=True)
class Row:
    """A measure, its value and the bound asked for; at_least says on which side of it is right."""

    measure: str
    value: float
    bound: float | None = None
    at_least: bool = True

    def __str__(self) -> str:
        if self.bound is None:
            return f"| {self.measure} | {self.value:.4g} | | |"
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        bound = f"{'>=' if self.at_least else '<='} {self.bound:g}"
        return f"| {self.measure} | {self.value:.4g} | {bound} | {'yes' if met else 'no'} |"


Pipes = dict[str, FluxPipeline]


def settings(name: str, w: float = DEV_GUIDANCE) -> dict[str, float]:
    """How a checkpoint is sampled: two passes, one with guidance, four steps."""
    return {
        "base": {"true_cfg_scale": GUIDANCE, "steps": STEPS},
        "dev": {"true_cfg_scale": 1.0, "guidance_scale": w, "steps": STEPS},
        "schnell": {"true_cfg_scale": 1.0, "steps": FEW_STEPS},
    }[name]


def adherences(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    least = {"base": (0.97, 0.90, 0.85)}
    right: dict[tuple[str, int], float] = {}
    for name, pipe in pipes.items():
        kinds = {}
        for objects in (1, 2):
            sheet = args.sheets and args.sheets / f"{name}-{objects}.png"
            kinds[objects] = adherence(
                pipe, args.count, args.seed, sheet, objects=objects, **settings(name)
            )
            right[name, objects] = kinds[objects]["all"]
        one, two = kinds.values()
        seen, held_out, both = least.get(name, (None, None, None))
        yield Row(f"{name}: one object, seen combinations", one["seen"], seen)
        yield Row(f"{name}: one object, combinations never trained", one["held_out"], held_out)
        yield Row(f"{name}: two objects with their relation", two["all"], both)
    if "schnell" in pipes:
        yield Row("schnell: one object, 4 steps", right["schnell", 1], 0.93)
    if "dev" in pipes:
        for objects, words in ((1, "one object"), (2, "two objects")):
            how = settings("dev", GUIDANCE)
            same = adherence(pipes["dev"], args.count, args.seed, objects=objects, **how)["all"]
            for found, at in ((right["dev", objects], ""), (same, ", at the same guidance")):
                lost = 100 * (right["base", objects] - found)
                name = f"dev: points lost against two passes, {words}{at}"
                yield Row(name, lost, 2.0, at_least=False)


def student_velocity(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    if "dev" not in pipes:
        return
    errors = velocity_error(pipes["dev"], pipes["base"], min(args.count, 32), args.seed)
    name = "dev: relative L2 of its velocity to the guided teacher's"
    yield Row(name, float(np.mean(list(errors.values()))), 0.08, at_least=False)
    for w, error in errors.items():
        yield Row(f"{name}, guidance {w:g}", error)


def times(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    """Medians of interleaved calls: noise to latents, and prompt to picture."""
    if "dev" not in pipes:
        return
    for what, bound in (("latent", 0.55), ("np", None)):
        seconds: dict[str, list[float]] = {"base": [], "dev": []}
        for _ in range(args.rounds):
            for name, found in seconds.items():
                call = settings(name)
                steps = call.pop("steps")
                start = time.perf_counter()
                pipes[name](
                    PROMPT, num_inference_steps=steps, output_type=what, progress=False, **call
                )
                found.append(time.perf_counter() - start)
        ratio = float(np.median(seconds["dev"]) / np.median(seconds["base"]))
        name = "denoising loop" if what == "latent" else "whole picture"
        yield Row(f"dev: time of the {name}, against two passes", ratio, bound, at_least=False)


def guidance_acts(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    """Adherence at each guidance, and how far a picture moves while it grows by a twentieth."""
    if "dev" not in pipes:
        return
    right = {}
    for w in GUIDANCES:
        how = settings("dev", w)
        right[w] = adherence(pipes["dev"], min(args.count, 128), args.seed, objects=1, **how)["all"]
        yield Row(f"dev: one object at guidance {w:g}", right[w])
    noise = pack(get_noise(1, BASE, BASE, torch.float32, torch.Generator().manual_seed(args.seed)))
    call = {"latents": noise, "num_inference_steps": STEPS, "output_type": "np", "progress": False}
    strengths = np.linspace(1, 5, 21)
    pictures = np.concatenate(
        [pipes["dev"](PROMPT, guidance_scale=float(w), **call).images for w in strengths]
    )
    moved = np.abs(np.diff(pictures, axis=0)).mean((1, 2, 3))
    way = max(float(np.abs(pictures[0] - pictures[-1]).mean()), 1e-9)
    yield Row("dev: points gained from guidance 1 to 3.5", 100 * (right[3.5] - right[1.0]), 0.0)
    steepest = float(moved.max()) / way
    yield Row("dev: largest share of the way from guidance 1 to 5 in 0.2", steepest)
    if args.sheets:
        draw_sheet((255 * pictures).round().astype(np.uint8), args.sheets / "guidance.png", 7)
        plot = args.sheets / "guidance-plot.png"
        plot_guidance(right, strengths, np.cumsum(moved) / way, plot)


def plot_guidance(
    right: dict[float, float], strengths: np.ndarray, moved: np.ndarray, path: Path
) -> None:
    """Adherence against guidance, and the way of one picture in terms of its first to last."""
    from matplotlib.figure import Figure

    left, other = (figure := Figure((9, 3.5), layout="constrained")).subplots(1, 2)
    left.plot(list(right), list(right.values()), "o-")
    left.set(xlabel="guidance", ylabel="right, one object", ylim=(0, 1))
    other.plot(strengths, [0.0, *moved], ".-")
    other.set(xlabel="guidance", ylabel="way of the picture since guidance 1", ylim=(0, None))
    write_files(path.parent, {path.name: lambda file: figure.savefig(file, format="png", dpi=110)})


def negative_prompt(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    count, red = min(args.count, 200), 0
    for start in range(0, count, 20):
        pictures = pipes["base"](
            ["a circle"] * min(20, count - start),
            negative_prompt="red",
            true_cfg_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(args.seed + start),
            output_type="np",
            progress=False,
        ).images
        red += sum(judge((255 * p).round().astype(np.uint8)).colour == "red" for p in pictures)
    name = f'base: share of red ones of {count}, "a circle" without "red"'
    yield Row(name, red / count, 0.02, at_least=False)


def in_diffusers(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    """The largest difference of a pixel to the picture of diffusers from the same folder."""
    import diffusers

    for name, pipe in pipes.items():
        theirs = diffusers.FluxPipeline.from_pretrained(args.folders[name], dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(args.seed)
        call = settings(name) | {
            "latents": pack(get_noise(1, BASE, BASE, torch.float32, rng)),
            "max_sequence_length": pipe.text_encoder.max_sequence_length,
            "output_type": "np",
        }
        call["num_inference_steps"] = call.pop("steps")
        if name == "base":
            call["negative_prompt"] = ""
        ours = pipe(PROMPT, progress=False, **call).images[0]
        found = theirs(PROMPT, height=BASE, width=BASE, **call).images[0]
        levels = 255 * float(np.abs(ours - found).max())
        yield Row(f"{name}: levels between our picture and diffusers'", levels, 1.0, at_least=False)


def loss_curves(pipes: Pipes, args: argparse.Namespace) -> Iterator[Row]:
    """Training in fp32 on the same batches: relative difference of the losses at each step."""
    curves = []
    for backend in ("reference", None):
        with ops.use_backend(backend):
            curves.append(loss_curve(pipes["base"], args.seed, args.steps))
    if curves[0] == curves[1]:
        raise SystemExit("no kernel ran: both curves are of the reference")
    reference, fused = map(np.array, curves)
    differences = np.abs(fused - reference) / reference
    yield Row(f"{args.steps} training steps: loss at the first", float(reference[0]))
    yield Row(f"{args.steps} training steps: loss at the last", float(reference[-1]))
    name = f"{args.steps} training steps: fused against reference losses, largest difference"
    yield Row(name, float(differences.max()), 1e-3, at_least=False)


def loss_curve(pipe: FluxPipeline, seed: int, steps: int) -> list[float]:
    torch.manual_seed(seed)
    flux = Flux(pipe.transformer.config)
    train.initialise(flux)
    losses = []
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        state = Path(folder) / "state.safetensors"
        optimised = Optimised(state, dict(flux.named_parameters()), 1e-3, steps, 0.4, 2e-3)
        loss = partial(train.flow_loss, pipe.text_encoder.encode, torch.float32)
        gradients = Gradients(flux, torch.float32, loss)
        for step in range(steps):
            rng = np.random.default_rng((seed, step))
            noise = torch.Generator().manual_seed(seed + step)
            captions = [caption(random_scene(rng), rng) for _ in range(8)]
            x0, x1 = torch.randn(2, 8, 64, 64, generator=noise).unbind()
            t = torch.rand(8, generator=noise)
            img = torch.lerp(x0, x1, t[:, None, None])
            losses.append(gradients.backward(captions, img, t, x1 - x0))
            optimised.update()
    return losses


MEASURES = {
    "adherence": adherences,
    "velocity": student_velocity,
    "time": times,
    "guidance": guidance_acts,
    "negative": negative_prompt,
    "diffusers": in_diffusers,
    "curves": loss_curves,
}


def folders(args: argparse.Namespace) -> dict[str, Path]:
    """Those given; where none is, those of the package that are there."""
    found = {name: getattr(args, name) for name in ("base", "dev", "schnell")}
    if not any(found.values()):
        found = {name: COMPACT[f"compact-{name}"] for name in found}
        found = {name: path for name, path in found.items() if path.is_dir()}
    found = {name: path for name, path in found.items() if path}
    if "base" not in found:
        raise SystemExit("--base must be given with --dev and --schnell")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.compact", description=__doc__)
    add = parser.add_argument
    add("--base", type=Path, metavar="FOLDER", help="the teacher")
    add("--dev", type=Path, metavar="FOLDER", help="the student with guidance as an input")
    add("--schnell", type=Path, metavar="FOLDER", help="the student of few steps")
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="all of them")
    add("--count", type=int, default=500, help="prompts of an adherence")
    add("--rounds", type=int, default=9, help="of the times")
    add("--steps", type=int, default=200, help="of the training that is compared")
    add("--sheets", type=Path, metavar="FOLDER", help="where samples are drawn")
    add("--seed", type=int, default=20261124)
    add("--threads", type=int, help="of torch; as many as there are cores")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    bench.pin_threads(args.threads)
    started = time.monotonic()
    args.folders = folders(args)
    pipes = {name: FluxPipeline.from_pretrained(path) for name, path in args.folders.items()}
    rows: list[Row] = []
    print("| measure | value | bound | met |\n|---|---|---|---|")
    for measure in args.measures:
        for row in MEASURES[measure](pipes, args):
            print(row, flush=True)
            rows.append(row)
    if args.json:
        found = {"machine": bench.machine(), "count": args.count, "seed": args.seed}
        found["seconds"] = round(time.monotonic() - started)
        found["rows"] = [vars(row) for row in rows]
        write_files(args.json.parent, {args.json.name: lambda file: write_json(file, found)})


if __name__ == "__main__":
    main()
