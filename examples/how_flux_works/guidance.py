"""Two passes a step against one: what guidance does, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from fluxkern import FluxPipeline
from fluxkern.compact.judge import judge, matches
from fluxkern.model import sampling
from fluxkern.model.sampling import combine_cfg, get_img_ids, get_schedule, get_txt_ids
from fluxkern.model.transformer import CONFIGS

from . import plotting
from .blocks import pass_flops
from .common import (
    CFG,
    PROMPT,
    Size,
    conditioning,
    decoded,
    noise,
    relative,
    scenes,
    trajectory,
    words,
)
from .common import guidance as embedded
from .plotting import BLUE, GREEN, ORANGE

STRENGTHS = (1.0, 2.0, 3.0, 5.0)
FEW = 4  # steps of compact-schnell
COLOURS = {"compact-base": ORANGE, "compact-dev": BLUE, "compact-schnell": GREEN}
BATCH = 16


@dataclass(frozen=True)
class Way:
    """How a checkpoint is sampled: w by two passes (cfg), embedded (guidance), or not at all."""

    name: str
    steps: int
    cfg: float = 1.0
    guidance: float = 1.0

    @property
    def said(self) -> str:
        return f"{max(self.cfg, self.guidance):g}" if self.name != "compact-schnell" else ""


def ways(found: dict[str, FluxPipeline], size: Size) -> list[Way]:
    """Every checkpoint at every strength that it has."""
    out = [Way("compact-base", size.steps, cfg=w) for w in STRENGTHS]
    if "compact-dev" in found:
        out += [Way("compact-dev", size.steps, guidance=w) for w in STRENGTHS]
    if "compact-schnell" in found:
        out.append(Way("compact-schnell", FEW))
    return out


@torch.no_grad()
def latents(pipe: FluxPipeline, way: Way, prompts: list[str]) -> Tensor:
    """The denoising loop alone, for prompts that are encoded."""
    cond, side = conditioning(pipe, prompts), pipe.default_size
    uncond = conditioning(pipe, [""] * len(prompts)) if way.cfg > 1 else None
    return loop(pipe, way, noise(pipe, len(prompts)), cond, uncond, get_img_ids(side, side))


def loop(pipe: FluxPipeline, way: Way, img: Tensor, cond, uncond, img_ids: Tensor) -> Tensor:
    return sampling.denoise(
        pipe.transformer,
        img,
        img_ids,
        cond,
        get_schedule(way.steps, len(img_ids), pipe.schedule),
        guidance_scale=way.guidance if pipe.transformer.config.guidance_embed else None,
        uncond=uncond,
        true_cfg_scale=way.cfg,
    )


@contextmanager
def counted_passes(pipe: FluxPipeline) -> Iterator[list[int]]:
    """Collects how many pictures each call of the transformer holds."""
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        hook.remove()


def seconds(calls: dict[Way, Callable[[], object]], rounds: int) -> dict[Way, float]:
    """Median processor time of each, all called in turn, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[Way, list[float]] = {way: [] for way in calls}
    for _ in range(rounds + 1):  # the first warms up
        for way, call in calls.items():
            start = time.process_time()
            call()
            found[way].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {way: median(times[1:]) for way, times in found.items()}


def cost(found: dict[str, FluxPipeline], shown: list[Way], size: Size) -> dict[Way, tuple]:
    """Transformer passes of one picture, and processor seconds of its denoising loop."""
    passes, calls = {}, {}
    for way in shown:
        pipe = found[way.name]
        with counted_passes(pipe) as rows:
            latents(pipe, way, [PROMPT])
        passes[way] = sum(rows)
        side = pipe.default_size
        args = (
            noise(pipe, 1),
            conditioning(pipe, [PROMPT]),
            conditioning(pipe, [""]) if way.cfg > 1 else None,
            get_img_ids(side, side),
        )
        calls[way] = torch.no_grad()(lambda pipe=pipe, way=way, args=args: loop(pipe, way, *args))
    times = seconds(calls, size.rounds)
    return {way: (passes[way], times[way]) for way in shown}


def adherence(found: dict[str, FluxPipeline], way: Way, size: Size) -> float:
    """Share of pictures in which the judge reads shape, colour, background, size and position."""
    asked, pipe = scenes(size.pictures, 8), found[way.name]
    right = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        pictures = decoded(pipe, latents(pipe, way, [words(scene) for scene in part]))
        fields = ("shape", "colour", "background", "size", "position")
        right += [matches(judge(p), s, fields) for p, s in zip(pictures, part, strict=True)]
    return float(np.mean(right))


def compare(found: dict[str, FluxPipeline], size: Size, folder: Path) -> dict:
    """Pictures over w, adherence over w, and what each way costs."""
    shown = ways(found, size)
    pictures(found, shown, folder)
    right = {way: adherence(found, way, size) for way in shown}
    costs, off = cost(found, shown, size), velocities(found, size)
    fig, axes = plotting.figure(9.2, 3.2, 1, 2)
    chart_adherence(axes[0, 0], right)
    chart_cost(axes[0, 1], costs)
    plotting.save(fig, folder, "guidance-cost")
    flops = pass_flops(CONFIGS["dev"], 4096, 512) / 1e12
    return {
        "rows": {"guidance": table(right, costs, off)},
        "judged": str(size.pictures),
        "flux_one": f"{28 * flops:,.0f}",
        "flux_two": f"{56 * flops:,.0f}",
        "flux_schnell": f"{4 * pass_flops(CONFIGS['schnell'], 4096, 256) / 1e12:,.0f}",
    }


def chart_adherence(axes: Axes, right: dict[Way, float]) -> None:
    for name, colour in COLOURS.items():
        of = {way: 100 * share for way, share in right.items() if way.name == name}
        if len(of) > 1:
            strengths = [max(way.cfg, way.guidance) for way in of]
            axes.plot(strengths, list(of.values()), "o-", color=colour, label=name)
        elif of:
            axes.axhline(*of.values(), color=colour, ls="--", lw=1.2, label=f"{name}, {FEW} steps")
    axes.set_xlabel("guidance w")
    axes.set_ylabel("all attributes right, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8)


def chart_cost(axes: Axes, costs: dict[Way, tuple]) -> None:
    kept = {way: cost for way, cost in costs.items() if way.said in ("1", "3", "")}
    labels = [f"{way.name}{', w = ' + way.said if way.said else ''}" for way in kept]
    times = [spent for _, spent in kept.values()]
    bars = axes.barh(labels, times, 0.55, color=[COLOURS[way.name] for way in kept])
    notes = [f" {passes} passes: {spent:.2f} s" for passes, spent in kept.values()]
    axes.bar_label(bars, notes, fontsize=8)
    axes.set_xlim(0, 1.6 * max(times))
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_xlabel("processor seconds of denoise, one picture")


def table(right: dict[Way, float], costs: dict[Way, tuple], off: dict[Way, str]) -> list[list[str]]:
    """A row for each way: name, w, steps, passes, time, relative time, adherence, error."""
    whole = next(spent for way, (_, spent) in costs.items() if way.cfg == CFG)
    return [
        [
            f"`{way.name}`",
            way.said or "–",
            str(way.steps),
            str(passes),
            f"{spent:.2f} s",
            f"{spent / whole:.2f}",
            f"{100 * right[way]:.0f} %",
            off.get(way, "–"),
        ]
        for way, (passes, spent) in costs.items()
    ]


def pictures(found: dict[str, FluxPipeline], shown: list[Way], folder: Path) -> None:
    """The same noise under every strength; a row for two prompts of each checkpoint."""
    prompts = [PROMPT, "a medium green ring in the centre on a white background"]
    rows = [(name, i) for name in found for i in range(len(prompts))]
    columns = len(STRENGTHS)
    fig, axes = plotting.figure(1.35 * columns + 1.3, 1.4 * len(rows) + 0.2, len(rows), columns)
    for axis in axes.flat:
        axis.set_axis_off()
    for way in shown:
        drawn = decoded(found[way.name], latents(found[way.name], way, prompts))
        column = [w for w in shown if w.name == way.name].index(way)
        for i, picture in enumerate(drawn):
            axis = axes[rows.index((way.name, i)), column]
            axis.set_axis_on()
            said = f"w = {way.said}" if way.said else f"{way.steps} steps"
            plotting.tile(axis, picture, said if i == 0 else "")
            if column == 0:
                plotting.row_label(axis, way.name if i == 0 else "")
    plotting.save(fig, folder, "guidance")


@torch.no_grad()
def velocities(found: dict[str, FluxPipeline], size: Size) -> dict[Way, str]:
    """Of compact-dev: relative L2 of its one pass to the teacher's guided two."""
    if "compact-dev" not in found:
        return {}
    teacher, student = found["compact-base"], found["compact-dev"]
    prompts = [words(scene) for scene in scenes(max(1, size.pictures // 4), 9)]
    path, side = trajectory(teacher, prompts, size.steps), teacher.default_size
    cond, uncond = (conditioning(teacher, p) for p in (prompts, [""] * len(prompts)))
    txt_ids, img_ids = get_txt_ids(cond.txt.shape[1]), get_img_ids(side, side)
    asked = [way for way in ways(found, size) if way.name == "compact-dev"]
    errors: dict[Way, list[float]] = {way: [] for way in asked}
    for sigma, img in zip(path.sigmas, path.places[:-1], strict=False):
        t = sigma.expand(len(prompts))
        two = (
            teacher.transformer(img, img_ids, text.txt, txt_ids, t, text.vec)
            for text in (cond, uncond)
        )
        with_prompt, with_none = two
        for way in asked:
            w = embedded(student, len(prompts), way.guidance)
            one = student.transformer(img, img_ids, cond.txt, txt_ids, t, cond.vec, w)
            guided = combine_cfg(with_prompt, with_none, way.guidance)
            errors[way].append(relative(one, guided))
    return {way: f"{100 * float(np.mean(e)):.1f} %" for way, e in errors.items()}
