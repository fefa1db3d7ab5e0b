"""CLIP and T5: what each says, and where the image looks among the words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fluxkern import FluxPipeline, ops, reference
from fluxkern.compact.drawings import Scene
from fluxkern.compact.judge import judge
from fluxkern.model import sampling

from . import plotting
from .common import CFG, PROMPT, SEED, Size, decoded, scenes, seeded, trajectory, words

PAIR = (
    Scene("circle", "red", "large", "left", "white"),
    Scene("cross", "green", "large", "right", "black"),
)
FIELDS = ("shape", "colour", "background", "size", "position")
BATCH = 16


def drawn(pipe: FluxPipeline, clip: list[str], t5: list[str], steps: int) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of prompts that CLIP and T5 read; picture i has noise i."""
    parts = []
    for start in range(0, len(clip), BATCH):
        rows = slice(start, start + BATCH)
        out = pipe(
            clip[rows],
            t5[rows],
            true_cfg_scale=CFG,
            num_inference_steps=steps,
            generator=[seeded(SEED + i) for i in range(len(clip))][rows],
            output_type="np",
            progress=False,
        )
        parts.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def encoders(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """One sentence to CLIP and another to T5: whose words are drawn?"""
    said = [words(scene) for scene in PAIR] + [""]
    clip, t5 = zip(*((a, b) for a in said for b in said), strict=True)
    pictures = drawn(pipe, list(clip), list(t5), size.steps)
    fig, axes = plotting.figure(5.4, 4.9, 3, 3)
    short = [f"{s.colour} {s.shape}\n{s.position}, on {s.background}" for s in PAIR] + ['""']
    for i, axis in enumerate(axes.flat):
        plotting.tile(axis, pictures[i], f"T5: {short[i % 3]}" if i < 3 else "")
    for i in range(3):
        plotting.row_label(axes[i, 0], f"CLIP: {short[i]}")
    plotting.save(fig, folder, "encoders")
    return {"rows": {"encoders": shares(pipe, size)}}


def shares(pipe: FluxPipeline, size: Size) -> list[list[str]]:
    """For each attribute how many pictures have it as CLIP read it, as T5 did, as neither."""
    firsts, pool = scenes(size.pictures, 2), iter(scenes(400 * size.pictures, 3))
    seconds = [next(b for b in pool if differ(a, b)) for a in firsts]
    pictures = drawn(pipe, [words(a) for a in firsts], [words(b) for b in seconds], size.steps)
    verdicts = [judge(picture) for picture in pictures]
    rows = []
    for field in FIELDS:
        found = [getattr(v, field) for v in verdicts]
        clip, t5 = (
            sum(getattr(s, field) == f for s, f in zip(read, found, strict=True))
            for read in (firsts, seconds)
        )
        counts = (clip, t5, len(found) - clip - t5)
        rows.append([f"`{field}`", *(f"{100 * n / len(found):.0f} %" for n in counts)])
    return rows


def differ(a: Scene, b: Scene) -> bool:
    return all(getattr(a, field) != getattr(b, field) for field in FIELDS)


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Collects the weights [B, H, L, L] of every joint attention, in the order of the calls."""
    found: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
        found.append(scores.softmax(-1))
        return reference.attention(q, k, v)

    def rope_attention(q, k, v, q_weight, k_weight, cos, sin, **_) -> Tensor:
        return attention(*reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin), v)

    with (
        patch.object(ops, "attention", attention),
        patch.object(ops, "rope_attention", rope_attention),
    ):
        yield found


def block_names(pipe: FluxPipeline) -> list[str]:
    config = pipe.transformer.config
    doubles = [f"double_blocks.{i}" for i in range(config.depth)]
    return doubles + [f"single_blocks.{i}" for i in range(config.depth_single_blocks)]


def attention_of(pipe: FluxPipeline, prompts: list[str], steps: int) -> tuple[Tensor, np.ndarray]:
    """Weights [steps, blocks, B, L, L] of the pass with the prompt, mean of heads; pictures."""
    with recorded_attention() as found:
        path = trajectory(pipe, prompts, steps)
    blocks = len(block_names(pipe))
    weights = torch.stack([w[: len(prompts)].mean(1) for w in found])
    return weights.unflatten(0, (steps, blocks)), decoded(pipe, path.places[-1])


def tokens(pipe: FluxPipeline, prompt: str) -> list[str]:
    tokenizer = pipe.text_encoder.t5_tokenizer
    return [t.lstrip("▁") for t in tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids)]


def attention_maps(pipe: FluxPipeline, size: Size, folder: Path) -> dict:
    """Where in the picture each word is looked at, block by block."""
    weights, pictures = attention_of(pipe, [PROMPT], size.steps)
    of_words = to_words(pipe, weights.mean(0))[:, 0]  # [blocks, Li, Lt]
    names, read = block_names(pipe), tokens(pipe, PROMPT)
    chosen = [read.index(w) for w in ("large", "red", "star", "top", "left", "blue", "background")]
    fig, axes = plotting.figure(9.0, 6.9, len(names), len(chosen) + 1)
    for i, row in enumerate(axes):
        for axis, word in zip(row, chosen, strict=False):
            of_word = of_words[i, :, word].unflatten(0, (sampling_side(pipe), -1))
            plotting.tile(axis, of_word, read[word] if i == 0 else "", cmap=plotting.POSITIVE)
        plotting.row_label(row[0], names[i])
        row[-1].set_axis_off()
    axes[0, -1].set_axis_on()
    plotting.tile(axes[0, -1], pictures[0], "the picture")
    plotting.save(fig, folder, "words")
    return on_its_word(pipe, size)


def sampling_side(pipe: FluxPipeline) -> int:
    """Image tokens along a side."""
    return pipe.default_size // sampling.PATCH


def to_words(pipe: FluxPipeline, weights: Tensor) -> Tensor:
    """Of joint weights [..., L, L] those of image queries on text keys, [..., Li, Lt]."""
    return weights[..., -(sampling_side(pipe) ** 2) :, : pipe.text_encoder.max_sequence_length]


def on_its_word(pipe: FluxPipeline, size: Size) -> dict:
    """How much more the object's tokens look at the object's colour than the others do."""
    found = [replace(scene, size="large") for scene in scenes(max(1, size.pictures // 4), 4)]
    prompts = [words(scene) for scene in found]
    weights, pictures = attention_of(pipe, prompts, size.steps)
    of_words = to_words(pipe, weights.mean((0, 1)))  # [B, Li, Lt]
    ratios: dict[str, list[float]] = {"colour": [], "background": []}
    for i, scene in enumerate(found):
        inside = object_tokens(pictures[i])
        if 0 < inside.sum() < len(inside):
            read = tokens(pipe, prompts[i])
            for name, where in (("colour", inside), ("background", ~inside)):
                of_word = of_words[i, :, read.index(getattr(scene, name))]
                ratios[name].append(float(of_word[where].mean() / of_word[~where].mean()))
    return {f"attention_{name}": f"{np.median(r or [0]):.1f}" for name, r in ratios.items()}


def object_tokens(picture: np.ndarray) -> Tensor:
    """Which 16 x 16 px patches are mostly not the background, bool [Li]."""
    away = np.abs(picture.astype(int) - picture[0, -1]).sum(-1) > 90
    n = len(picture) // sampling.PATCH
    share = away.reshape(n, sampling.PATCH, n, sampling.PATCH).mean((1, 3))
    return torch.from_numpy(share > 0.5).flatten()
