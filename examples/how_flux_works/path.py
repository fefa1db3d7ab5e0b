"""The whole road, the noise levels and the straight path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fluxkern import FluxPipeline
from fluxkern.model import sampling
from fluxkern.model.sampling import get_schedule, shift_mu

from . import plotting
from .common import CFG, PROMPT, Size, Trajectory, decoded, parameters, scenes, trajectory, words
from .plotting import BLUE, GREEN, GREY, INK, ORANGE, PURPLE

TOKENS = {64: INK, 256: ORANGE, 1024: GREEN, 4096: BLUE}  # of an image


def as_colours(latents: Tensor) -> np.ndarray:
    """Three channels [16, h, w] -> [h, w, 3] in 0..1."""
    shown = latents[[1, 10, 12]].permute(1, 2, 0)
    return ((shown + 2.5) / 5).clamp(0, 1).numpy()


def road(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """From the prompt to the picture, with the shapes of what is handed on."""
    found = trajectory(pipe, [PROMPT], size.steps)
    side, length = pipe.default_size, pipe.text_encoder.max_sequence_length
    start, end = (sampling.unpack(found.places[i], side, side)[0] for i in (0, -1))
    config = pipe.transformer.config
    fig, axes = plotting.figure(9.6, 4.2)
    axis = axes[0, 0]
    said = PROMPT.replace(" at", "\nat").replace(" on", "\non")
    plotting.box(axis, 0.05, 0.35, 2.1, 1.3, said, GREY)
    rows = (
        (0.1, "TextEncoder.clip", PURPLE, f"vec [1, {config.vec_in_dim}]", 1.0),
        (1.15, "TextEncoder.t5", ORANGE, f"txt [1, {length}, {config.context_in_dim}]", 1.0),
        (2.6, "pack", GREY, f"img {list(found.places[0].shape)}", 2.98),
        (4.15, "get_schedule", GREY, f"timesteps [{size.steps} + 1]", None),
    )
    for y, name, colour, shape, source in rows:
        plotting.box(axis, 2.75, y, 1.5, 0.75, name, colour)
        if source is not None:
            plotting.arrow(axis, (2.15 if source == 1.0 else 1.9, source), (2.75, y + 0.38))
        axis.text(4.33, y + 0.26, shape, fontsize=8, va="center")
        plotting.arrow(axis, (4.25, y + 0.48), (6.35, y + 0.48))
    blocks = f"{config.depth} DoubleStreamBlock\n{config.depth_single_blocks} SingleStreamBlock"
    said = f"Flux\n\n{blocks}\n\n{size.steps} times,\neuler_step after each"
    plotting.box(axis, 6.35, 0.1, 2.0, 4.8, said, BLUE)
    plotting.arrow(axis, (8.35, 2.5), (8.8, 2.5))
    plotting.arrow(axis, (10.2, 2.5), (10.6, 2.5))
    axis.text(9.5, 1.65, "unpack", fontsize=8, ha="center", va="bottom")
    axis.text(11.3, 1.65, "vae.decode", fontsize=8, ha="center", va="bottom")
    for x, y, picture, said in (
        (0.45, 2.3, as_colours(start), f"get_noise\n{[1, *start.shape]}"),
        (8.8, 1.8, as_colours(end), f"latents\n{[1, *end.shape]}"),
        (10.6, 1.8, decoded(pipe, found.places[-1])[0], f"picture\n{side} x {side}"),
    ):
        extent = (x, x + 1.4, y + 1.4, y)
        axis.imshow(picture, extent=extent, interpolation="nearest", aspect="equal")
        axis.text(x + 0.7, y + 1.5, said, fontsize=8, ha="center", va="top")
    plotting.empty(axis, 12.05, 5.0)
    plotting.save(fig, folder, "road")
    text = pipe.text_encoder
    return {
        "txt_tokens": str(length),
        "clip_parameters": f"{parameters(text.clip) / 1e6:.2f}",
        "t5_parameters": f"{parameters(text.t5) / 1e6:.2f}",
    }


def schedule(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Noise levels for four picture sizes, and the shift that makes them differ."""
    fig, axes = plotting.figure(9.2, 3.5, 1, 2)
    left, right = axes[0]
    steps = range(size.steps + 1)
    even = torch.linspace(1, 0, size.steps + 1)
    left.plot(steps, even, "--", color=GREY, lw=1.2, label="no shift (schnell)")
    for tokens, colour in TOKENS.items():
        sigmas, pixels = get_schedule(size.steps, tokens, pipe.schedule), 16 * int(tokens**0.5)
        label = f"{pixels} x {pixels}: {tokens} tokens"
        left.plot(steps, sigmas, "o-", color=colour, ms=3.5, lw=1.2, label=label)
    left.set_xlabel(f"step of {size.steps}")
    left.set_ylabel("noise level (timestep)")
    left.legend(fontsize=8, loc="lower left")
    line = np.arange(0, 4600, 32)
    right.plot(line, [shift_mu(n, pipe.schedule) for n in line], color=GREY, lw=1.2)
    for tokens, colour in TOKENS.items():
        mu = shift_mu(tokens, pipe.schedule)
        right.plot(tokens, mu, "o", color=colour, ms=7)
        below = -4 if tokens == 256 else -13
        place = {"textcoords": "offset points", "xytext": (9, below), "fontsize": 8}
        right.annotate(f"{tokens} tokens: {mu:.2f}", (tokens, mu), **place)
    right.set_xlim(-100, 5400)
    right.set_ylim(0.35, 1.25)
    right.set_xlabel("image tokens")
    right.set_ylabel("shift_mu")
    plotting.save(fig, folder, "schedule")
    half = {n: int((get_schedule(size.steps, n, pipe.schedule) > 0.5).sum()) for n in TOKENS}
    return {
        "mu": f"{shift_mu(64, pipe.schedule):.3f}",
        "noisy_steps": str(half[64]),
        "flux_noisy_steps": str(half[4096]),
    }


def path(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Places on the way and the estimates they give, decoded."""
    found = trajectory(pipe, [PROMPT], size.steps)
    chosen = np.unique(np.linspace(0, size.steps - 1, 6).round().astype(int)).tolist()
    fig, axes = plotting.figure(8.2, 3.0, 2, len(chosen))
    places = decoded(pipe, found.places[chosen, 0])
    estimates = decoded(pipe, found.estimates[chosen, 0])
    for column, i in enumerate(chosen):
        plotting.tile(axes[0, column], places[column], f"step {i}: t = {found.sigmas[i]:.2f}")
        plotting.tile(axes[1, column], estimates[column])
    plotting.row_label(axes[0, 0], "img")
    plotting.row_label(axes[1, 0], "img - t * v")
    plotting.save(fig, folder, "path")
    return {}


def bend(found: Trajectory) -> Tensor:
    """Distance from the chord in terms of its length, [N + 1]; the chord is the straight path."""
    start, end, t = found.places[0], found.places[-1], found.sigmas[:, None, None, None]
    away = (found.places - (t * start + (1 - t) * end)).flatten(1).norm(dim=1)
    return away / (start - end).norm()


def length(found: Trajectory) -> float:
    """Of the path, the chord being 1."""
    steps = (found.places[1:] - found.places[:-1]).flatten(2).norm(dim=2).sum(0)
    return float((steps / (found.places[-1] - found.places[0]).flatten(1).norm(dim=1)).mean())


def straightness(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """How far the path leaves the straight line, with and without guidance; steps against error."""
    prompts = [words(scene) for scene in scenes(max(1, size.pictures // 8), 1)]
    fine = 4 * size.steps
    fig, axes = plotting.figure(9.6, 3.3, 1, 3)
    figures, counts = {}, [n for n in (1, 2, 4, 8, 16, 32) if n < fine]
    for cfg, colour, marker in ((1.0, ORANGE, "s"), (CFG, BLUE, "o")):
        found, label = trajectory(pipe, prompts, fine, cfg), f"w = {cfg:g}"
        end = found.places[-1]
        style = {"color": colour, "label": label, "lw": 1.4}
        axes[0, 0].plot(found.sigmas, bend(found), **style)
        off = (found.estimates - end).flatten(1).norm(dim=1) / end.norm()
        axes[0, 1].plot(found.sigmas[:-1], off, **style)
        errors = [distance(trajectory(pipe, prompts, n, cfg), end) for n in counts]
        axes[0, 2].loglog(counts, errors, marker=marker, ms=5, base=2, **style)
        figures[f"length_{cfg:g}"] = f"{length(found):.2f}"
        figures[f"bend_{cfg:g}"] = f"{100 * float(bend(found).max()):.0f}"
        figures |= {f"steps_{n}_{cfg:g}": f"{e:.2f}" for n, e in zip(counts, errors, strict=True)}
    titles = ("distance from the straight path", "error of img - t * v")
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("t, from noise to picture")
        axis.set_xlim(1, 0)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_yscale("log")
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    for axis in axes[0, 1:]:
        axis.set_ylim(0.004, 3)
        axis.set_yticks(ticks, [f"{y:g}" for y in ticks])
    axes[0, 2].set_title(f"latents against {fine} steps", fontsize=9)
    axes[0, 2].set_xticks(counts, [str(n) for n in counts])
    axes[0, 2].minorticks_off()
    axes[0, 2].set_xlabel("Euler steps")
    axes[0, 0].set_ylabel("relative L2")
    axes[0, 0].legend(fontsize=8)
    plotting.save(fig, folder, "straightness")
    return figures


def distance(found: Trajectory, end: Tensor) -> float:
    return float((found.places[-1] - end).norm() / end.norm())
