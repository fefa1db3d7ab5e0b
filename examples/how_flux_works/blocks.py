"""Blocks, rotation and gates of the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from fluxkern import FluxPipeline, reference
from fluxkern.bench.cost import counted
from fluxkern.model import sampling
from fluxkern.model.sampling import get_img_ids, get_txt_ids
from fluxkern.model.transformer import CONFIGS, Flux, FluxConfig, Stream, rope_tables

from . import plotting
from .common import (
    Size,
    conditioning,
    guidance,
    parameters,
    power,
    relative,
    scenes,
    trajectory,
    words,
)
from .plotting import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY
from .text import attention_of, block_names, to_words

BOTH, TEXT, IMAGE = GREEN, ORANGE, BLUE


def diagram(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """The two kinds of block, in the code's names."""
    fig, axes = plotting.figure(9.6, 6.2, 1, 2, width_ratios=[1.55, 1])
    double(axes[0, 0])
    single(axes[0, 1])
    plotting.save(fig, folder, "blocks")
    return {}


def column(axis: Axes, x: float, steps: list[tuple[float, str]], colour: str, width: float) -> None:
    """Boxes at given heights, joined by arrows."""
    for (y, said), after in zip(steps, [*steps[1:], None], strict=True):
        plotting.box(axis, x, y, width, 0.55, said, colour)
        if after is not None and after[0] - y < 1.2:
            middle = x + width / 2
            plotting.arrow(axis, (middle, y + 0.55), (middle, after[0]))


def double(axis: Axes) -> None:
    plotting.empty(axis, 8.2, 10.9)
    axis.set_title("DoubleStreamBlock: own weights, one attention", fontsize=10)
    for x, name, colour in ((0.2, "txt", TEXT), (5.0, "img", IMAGE)):
        steps = [
            (0.1, f"{name} tokens"),
            (1.0, "norm_modulate"),
            (1.9, f"{name}_attn.qkv"),
            (4.6, f"{name}_attn.proj"),
            (5.5, "x + gate * y"),
            (6.4, "norm_modulate"),
            (7.3, f"{name}_mlp.0, gelu_tanh"),
            (8.2, f"{name}_mlp.2"),
            (9.1, "x + gate * y"),
            (10.0, f"{name} tokens"),
        ]
        column(axis, x, steps, colour, 3.0)
        middle = x + 1.5
        plotting.arrow(axis, (middle, 2.45), (middle, 2.8))
        plotting.arrow(axis, (middle, 4.25), (middle, 4.6))
        side = 0.05 if name == "txt" else 8.15
        edge = x if name == "txt" else x + 3.0
        for top, bottom in ((0.85, 5.77), (6.22, 9.37)):
            axis.plot([middle, side, side], [top, top, bottom], color=INK, lw=1.0)
            plotting.arrow(axis, (side, bottom), (edge, bottom))
    for y, said in (
        (2.8, "joint_qk_norm_rope: text first, then image"),
        (3.7, "attention over all tokens"),
    ):
        plotting.box(axis, 0.2, y, 7.8, 0.55, said, BOTH)
    plotting.arrow(axis, (4.1, 3.35), (4.1, 3.7))
    plotting.box(axis, 3.45, 1.0, 1.3, 0.55, "vec", PURPLE)
    for x, name in ((3.2, "txt"), (5.0, "img")):
        plotting.arrow(axis, (3.45 if name == "txt" else 4.75, 1.27), (x, 1.27))
    axis.text(4.1, 1.72, "txt_mod, img_mod:\n6 vectors each", ha="center", va="top", fontsize=7.5)


def single(axis: Axes) -> None:
    plotting.empty(axis, 5.2, 10.9)
    axis.set_title("SingleStreamBlock: one set of weights", fontsize=10)
    plotting.box(axis, 0.9, 0.1, 3.4, 0.55, "txt and img tokens", BOTH)
    plotting.box(axis, 1.5, 1.0, 2.8, 0.55, "norm_modulate", BOTH)
    plotting.box(axis, 0.1, 1.0, 0.9, 0.55, "vec", PURPLE)
    plotting.arrow(axis, (1.0, 1.27), (1.5, 1.27))
    axis.text(0.1, 1.68, "modulation:\n3 vectors", va="top", fontsize=7.5)
    plotting.arrow(axis, (2.6, 0.65), (2.6, 1.0))
    for x, steps in (
        (0.1, [(2.3, "linear1: q, k, v"), (3.6, "rope_attention"), (4.9, "linear2: its columns")]),
        (2.7, [(2.3, "linear1: mlp"), (3.6, "gelu_tanh"), (4.9, "linear2: its columns")]),
    ):
        column(axis, x, steps, BOTH, 2.4)
        for (y, _), (below, _) in zip(steps, steps[1:], strict=False):
            plotting.arrow(axis, (x + 1.2, y + 0.55), (x + 1.2, below))
        plotting.arrow(axis, (2.6, 1.55), (x + 1.2, 2.3))
        plotting.arrow(axis, (x + 1.2, 5.45), (2.6, 6.4))
    plotting.box(axis, 0.9, 6.4, 3.4, 0.55, "sum", BOTH)
    plotting.box(axis, 0.9, 7.5, 3.4, 0.55, "x + gate * y", BOTH)
    plotting.box(axis, 0.9, 8.6, 3.4, 0.55, "txt and img tokens", BOTH)
    plotting.arrow(axis, (2.6, 6.95), (2.6, 7.5))
    plotting.arrow(axis, (2.6, 8.05), (2.6, 8.6))
    axis.plot([2.6, 5.15, 5.15], [0.82, 0.82, 7.77], color=INK, lw=1.0)
    plotting.arrow(axis, (5.15, 7.77), (4.3, 7.77))


def kinds(flux: Flux) -> dict[str, int]:
    """Parameters of each part."""
    of_modulation = sum(
        parameters(m) for b in flux.double_blocks for m in (b.img_mod, b.txt_mod)
    ) + sum(parameters(b.modulation) for b in flux.single_blocks)
    of_modulation += parameters(flux.final_layer.adaLN_modulation)
    doubles = sum(
        parameters(b) - parameters(b.img_mod) - parameters(b.txt_mod) for b in flux.double_blocks
    )
    singles = sum(parameters(b) - parameters(b.modulation) for b in flux.single_blocks)
    rest = parameters(flux) - of_modulation - doubles - singles
    return {"double": doubles, "single": singles, "modulation": of_modulation, "rest": rest}


def pass_flops(config: FluxConfig, img: int, txt: int) -> int:
    """Of one pass of one picture, counted without computing anything."""
    with torch.device("meta"):
        flux = Flux(config)
        args = (
            torch.empty(1, img, config.in_channels),
            torch.empty(img, len(config.axes_dim)),
            torch.empty(1, txt, config.context_in_dim),
            torch.empty(txt, len(config.axes_dim)),
            torch.empty(1),
            torch.empty(1, config.vec_in_dim),
            torch.empty(1) if config.guidance_embed else None,
        )
        return counted(lambda: flux(*args)).flops


def streams(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Where the parameters are, and how much of their attention image tokens give to the text."""
    with torch.device("meta"):
        dev = kinds(Flux(CONFIGS["dev"]))
    compact = kinds(pipe.transformer)
    prompts = [words(scene) for scene in scenes(max(1, size.pictures // 8), 5)]
    weights, _ = attention_of(pipe, prompts, size.steps)
    to_text = to_words(pipe, weights).sum(-1).mean((2, 3))  # [steps, blocks]
    fig, axes = plotting.figure(9.4, 3.3, 1, 2)
    proportions(axes[0, 0], {"compact": compact, "FLUX.1-dev": dev})
    sigmas = sampling.get_schedule(size.steps, 64, pipe.schedule)
    over_time(axes[0, 1], to_text.T, block_names(pipe), sigmas)
    axes[0, 1].set_title("share of image tokens' attention on text", fontsize=9)
    plotting.save(fig, folder, "streams")
    tokens = (pipe.default_size // sampling.PATCH) ** 2, pipe.text_encoder.max_sequence_length
    return {
        "parameters": f"{sum(compact.values()):,}",
        "flux_parameters": f"{sum(dev.values()):,}",
        "flux_modulation": f"{100 * dev['modulation'] / sum(dev.values()):.0f}",
        "gflop": f"{pass_flops(pipe.transformer.config, *tokens) / 1e9:.2f}",
        "flux_tflop": f"{pass_flops(CONFIGS['dev'], 4096, 512) / 1e12:.1f}",
        "text_most": f"{100 * float(to_text[0].max()):.0f}",
        "text_first": f"{100 * float(to_text[0].mean()):.0f}",
        "text_last": f"{100 * float(to_text[-1].mean()):.0f}",
    }


def proportions(axes: Axes, models: dict[str, dict[str, int]]) -> None:
    """A bar of each model's parameters, by part."""
    for y, (name, parts) in enumerate(models.items()):
        start, total = 0.0, sum(parts.values())
        for (kind, count), colour in zip(parts.items(), (BLUE, SKY, PURPLE, GREY), strict=True):
            share = count / total
            axes.barh(y, share, 0.5, left=start, color=colour, label=None if y else kind)
            if share > 0.04:
                ink = "white" if colour == BLUE else INK
                font = {"ha": "center", "va": "center", "fontsize": 8, "color": ink}
                axes.text(start + share / 2, y, f"{share:.0%}", **font)
            start += share
        axes.text(0, y - 0.32, f"{name}: {total:,} parameters", fontsize=8.5, va="bottom")
    axes.set_xlim(0, 1)
    axes.set_ylim(1.4, -0.7)
    axes.set_axis_off()
    axes.legend(loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.12), fontsize=8)


def over_time(axes: Axes, values: Tensor, names: list[str], sigmas: Tensor) -> None:
    """A map of values [names, steps]."""
    image = axes.imshow(values, cmap=plotting.POSITIVE, vmin=0, aspect="auto")
    marks = sorted({0, values.shape[1] // 2, values.shape[1] - 1})
    axes.set_xticks(marks, [f"t = {sigmas[i]:.2f}" for i in marks])
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes)


def agreement(axes_dim: tuple[int, ...], theta: int, away: Tensor, base: Tensor) -> Tensor:
    """Inner products of one vector rotated to base and to base + away, [N]; 1 at no offset.

    away [N, axes], base [axes]; the vector has the same length in every pair.
    """
    cos, sin = rope_tables(torch.cat((base[None], base + away)), axes_dim, theta)
    x = torch.full((1, len(cos), 1, sum(axes_dim)), sum(axes_dim) ** -0.5)
    turned = reference.rope(x, cos, sin)[0, :, 0]
    return turned[1:] @ turned[0]


def rope(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Angles of the pairs, inner products against distance, and what attention makes of it."""
    config, dev = pipe.transformer.config, CONFIGS["dev"]
    side, txt = pipe.default_size, pipe.text_encoder.max_sequence_length
    ids = torch.cat((get_txt_ids(txt), get_img_ids(side, side)))
    cos, _ = rope_tables(ids, config.axes_dim, config.theta)
    near = by_offset(pipe, size)
    n = near.shape[0] // 2
    fig, axes = plotting.figure(9.6, 3.6, 1, 3, width_ratios=[1.1, 1.1, 1])
    angles(axes[0, 0], cos, txt, config.axes_dim)
    against_distance(axes[0, 1], {"compact": (config, ORANGE), "FLUX.1-dev": (dev, BLUE)})
    offsets(axes[0, 2], near)
    plotting.save(fig, folder, "rope")
    beside = (near[n, n - 1], near[n, n + 1], near[n - 1, n], near[n + 1, n])
    return {
        "rope_pairs": str(cos.shape[1]),
        "rope_still": str(config.axes_dim[0] // 2),
        "flux_rope_pairs": str(sum(dev.axes_dim) // 2),
        "flux_rope_still": str(dev.axes_dim[0] // 2),
        "rope_error": power(relative_only(config)),
        "rope_itself": f"{100 * float(near[n, n]):.1f}",
        "rope_beside": f"{100 * float(sum(beside)) / len(beside):.1f}",
        "rope_far": f"{100 * float(near[n, n + 4]):.1f}",
    }


def against_distance(axes: Axes, models: dict[str, tuple[FluxConfig, str]]) -> None:
    """Inner products of one vector at two places, along a row and along a diagonal."""
    away = torch.arange(64)
    for name, (config, colour) in models.items():
        for axis, said, style in ((2, "columns", "-"), (1, "rows and columns", "--")):
            places = torch.zeros(len(away), 3)
            places[:, axis:] = away[:, None]
            y = agreement(config.axes_dim, config.theta, places, torch.zeros(3))
            axes.plot(away, y, style, color=colour, lw=1.3, label=f"{name}, {said}")
    axes.set_xlabel("distance, tokens")
    axes.set_title("q k of one vector at two places", fontsize=9)
    axes.legend(fontsize=7.5, loc="upper right")
    axes.set_ylim(top=1.3)


def offsets(axes: Axes, near: Tensor) -> None:
    """A map of mean attention by offset, 0 in the middle."""
    edge = near.shape[0] / 2
    image = axes.imshow(near, cmap=plotting.POSITIVE, extent=(-edge, edge, edge, -edge))
    axes.grid(False)
    axes.set_title("measured attention, image to image", fontsize=9)
    axes.set_xticks(range(-6, 7, 3))
    axes.set_yticks(range(-6, 7, 3))
    axes.set_xlabel("columns away")
    axes.set_ylabel("rows away")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def angles(axis: Axes, cos: Tensor, txt: int, axes_dim: tuple[int, ...]) -> None:
    """cos of every token and pair, the axes set apart."""
    shown = cos[txt - 16 :]
    axis.imshow(
        shown, cmap=plotting.SIGNED, vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    axis.grid(False)
    axis.axhline(15.5, color=INK, lw=1)
    edge = 0
    for dim, name in zip(axes_dim, ("axis 0", "row", "column"), strict=True):
        axis.text(edge + dim / 4 - 0.5, -2, name, ha="center", fontsize=8)
        edge += dim // 2
        if edge < cos.shape[1]:
            axis.axvline(edge - 0.5, color=INK, lw=1)
    axis.set_yticks([8, 16, 79], ["txt", "img 0, 0", "img 7, 7"])
    axis.set_xlabel("pair of the head dim")
    axis.set_title("cos of rope_tables\n", fontsize=9)


def relative_only(config: FluxConfig) -> float:
    """By how much the inner product of one offset differs from place to place, at most."""
    places = get_img_ids(128, 128)
    offset = torch.tensor([[0.0, 2.0, -3.0]])
    found = torch.cat([agreement(config.axes_dim, config.theta, offset, p) for p in places])
    return float(found.max() - found.min())


def by_offset(pipe: FluxPipeline, size: Size) -> Tensor:
    """Mean attention of image tokens by (rows, columns) to the key, [15, 15], 0 in the middle."""
    prompts = [words(scene) for scene in scenes(max(1, size.pictures // 8), 6)]
    weights, _ = attention_of(pipe, prompts, size.steps)
    n = pipe.default_size // sampling.PATCH
    of_image = weights.mean((0, 1, 2))[-n * n :, -n * n :].view(n, n, n, n)
    total, count = torch.zeros(2 * n - 1, 2 * n - 1), torch.zeros(2 * n - 1, 2 * n - 1)
    for row in range(n):
        for col in range(n):
            window = (slice(n - 1 - row, 2 * n - 1 - row), slice(n - 1 - col, 2 * n - 1 - col))
            total[window] += of_image[row, col]
            count[window] += 1
    return total / count


@torch.no_grad()
def gate_table(pipe: FluxPipeline, prompts: list[str], sigmas: Tensor) -> dict[str, Tensor]:
    """Root mean square of each gate at each noise level, by its name, [S]."""
    cond, n = conditioning(pipe, prompts), pipe.default_size
    ids = get_img_ids(n, n), get_txt_ids(cond.txt.shape[1])
    times = sigmas[:-1, None].expand(-1, len(prompts))
    strength = guidance(pipe, len(prompts))
    spaces = pipe.transformer.workspaces(*ids, times, cond.vec, strength)
    rms = torch.tensor(
        [
            [
                float(gate.square().mean().sqrt())
                for vectors in s.modulation
                for stream in range(vectors[0].shape[1])
                for gate in (vectors[i][:, stream] for i in gates_in(vectors))
            ]
            for s in spaces
        ]
    )
    return dict(zip(gate_names(pipe), rms.T, strict=True))


def gates_in(vectors: tuple[Tensor, ...]) -> range:
    """Where the gates are among (shift, scale, gate) once or twice; the last layer has none."""
    return range(2, len(vectors), 3)


def gate_names(pipe: FluxPipeline) -> list[str]:
    config = pipe.transformer.config
    doubles = [
        f"double_blocks.{i}.{stream}_mod: {branch}"
        for i in range(config.depth)
        for stream in ("txt", "img")
        for branch in ("attn", "mlp")
    ]
    return doubles + [f"single_blocks.{i}.modulation" for i in range(config.depth_single_blocks)]


@contextmanager
def without_branch(closed: int | None) -> Iterator[list[float]]:
    """Closes the gates of one branch, counted as they are added; collects |gate * y| / |x|."""
    ratios: list[float] = []
    original = Stream.add

    def add(stream: Stream, y: Tensor, gate: Tensor) -> None:
        rows = slice(stream.txt_len, None)
        ratios.append(float((gate[:, -1:] * y[:, rows]).norm() / stream.x[:, rows].norm()))
        original(stream, y, torch.zeros_like(gate) if closed == len(ratios) - 1 else gate)

    with patch.object(Stream, "add", add):
        yield ratios


def gates(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Gates over t, what their branches add to the image tokens, and what closing one changes."""
    prompts = [words(scene) for scene in scenes(max(1, size.pictures // 8), 7)]
    found = trajectory(pipe, prompts, size.steps)
    table = gate_table(pipe, prompts, found.sigmas)
    names, values = list(table), torch.stack(list(table.values()))
    branches = branch_names(pipe)
    added, changed = worth(pipe, prompts, found, len(branches))
    fig, axes = plotting.figure(9.6, 4.3, 1, 2, width_ratios=[1.5, 1])
    over_time(axes[0, 0], values, names, found.sigmas)
    axes[0, 0].set_title("root mean square of the gates", fontsize=9)
    worths(axes[0, 1], branches, added, changed)
    plotting.save(fig, folder, "gates")
    means = values.mean(1)
    return {
        "gate_least": f"{float(means.min()):.2f}",
        "gate_most": f"{float(means.max()):.2f}",
        "gate_least_name": f"`{names[means.argmin()].split(':')[0]}`",
        "gate_most_name": f"`{names[means.argmax()].split(':')[0]}`",
        "closed_least": f"{100 * min(changed):.0f}",
        "closed_most": f"{100 * max(changed):.0f}",
        "gate_swing": f"{float((values.max(1).values / values.min(1).values).max()):.1f}",
    }


def branch_names(pipe: FluxPipeline) -> list[str]:
    """In the order in which they are added to the stream."""
    config = pipe.transformer.config
    doubles = [f"double {i}: {of}" for i in range(config.depth) for of in ("attn", "mlp")]
    return doubles + [f"single {i}" for i in range(config.depth_single_blocks)]


def worths(axes: Axes, branches: list[str], added: list[float], changed: list[float]) -> None:
    y = np.arange(len(branches))
    axes.barh(y - 0.2, added, 0.38, color=ORANGE, label="|gate * y| / |x|")
    axes.barh(y + 0.2, changed, 0.38, color=BLUE, label="change of the velocity, gate closed")
    axes.set_yticks(y, branches)
    axes.invert_yaxis()
    axes.set_title("image tokens", fontsize=9)
    axes.set_xlabel("relative L2")
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.4, -0.14))


@torch.no_grad()
def worth(pipe: FluxPipeline, prompts: list[str], found, branches: int) -> tuple[list, list]:
    """Of each branch the size of what it adds and the change of the velocity without it."""
    cond, side = conditioning(pipe, prompts), pipe.default_size
    ids = get_img_ids(side, side), get_txt_ids(cond.txt.shape[1])
    indices = sorted({0, len(found.velocities) // 2, len(found.velocities) - 1})
    added, changed = np.zeros(branches), np.zeros(branches)
    for i in indices:
        t = found.sigmas[i].expand(len(prompts))
        strength = guidance(pipe, len(prompts))
        args = (found.places[i], ids[0], cond.txt, ids[1], t, cond.vec, strength)
        with without_branch(None) as ratios:
            whole = pipe.transformer(*args)
        added += np.array(ratios) / len(indices)
        for branch in range(branches):
            with without_branch(branch):
                changed[branch] += relative(pipe.transformer(*args), whole) / len(indices)
    return added.tolist(), changed.tolist()
