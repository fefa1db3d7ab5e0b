"""How well the compact FLUX draws what it is told, by the judge; pictures beside the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._files import write_files
from ..model.autoencoder import AutoEncoder
from ..pipeline import FluxPipeline
from . import DEV_GUIDANCE, GUIDANCE, STEPS
from .drawings import caption, draw, random_scene
from .judge import judge, matches

BATCH = 32  # pictures at a time
SHOWN = 64  # pictures on a sheet
FIELDS = ("shape", "colour", "background", "texture", "size", "position", "layout")


def adherence(
    pipe: FluxPipeline,
    count: int,
    seed: int,
    sheet: Path | None = None,
    *,
    objects: int | None = None,
    texture: str | None = None,
    steps: int = STEPS,
    true_cfg_scale: float = GUIDANCE,
    guidance_scale: float = DEV_GUIDANCE,
) -> dict[str, float]:
    """How often the judge finds in a picture what its prompt asked for.

    Args:
        pipe: the compact pipeline.
        count: pictures; every second prompt is of a triple that training never shows.
        seed: of prompts and noise.
        sheet: where a PNG of the first pictures goes, if anywhere.
        objects, texture: of the scenes, as `random_scene` takes them.
        steps: of sampling.
        true_cfg_scale: of classifier-free guidance.
        guidance_scale: given to a model that takes it.

    Returns:
        Shares of pictures with the right shape, colour, background and so on, of two objects with
        both right; `all` is shape, colour, background, texture and layout together, `seen` and
        `held_out` the same by kind of prompt, `one` and `two` by the number of objects.
    """
    rng = np.random.default_rng((seed, 98))
    scenes = [random_scene(rng, i % 2 == 1, objects, texture) for i in range(count)]
    prompts = [caption(scene, rng) for scene in scenes]
    parts = []
    for start in range(0, count, BATCH):
        out = pipe(
            prompts[start : start + BATCH],
            true_cfg_scale=true_cfg_scale,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
            output_type="np",
            progress=False,
        )
        parts.append((out.images * 255).round().astype(np.uint8))
    pictures = np.concatenate(parts)  # [count, H, W, 3]
    if sheet is not None:
        draw_sheet(pictures[:SHOWN], sheet)
    pairs = [(judge(p), s) for p, s in zip(pictures, scenes, strict=True)]
    figures = {name: mean([matches(v, s, (name,)) for v, s in pairs]) for name in FIELDS}
    right = [matches(v, s) for v, s in pairs]
    two = [scene.other is not None for scene in scenes]
    return figures | {
        "all": mean(right),
        "seen": mean(right[::2]),
        "held_out": mean(right[1::2]),
        **_shares(right, {"one": [not both for both in two], "two": two}),
    }


def _shares(right: list[bool], kinds: dict[str, list[bool]]) -> dict[str, float]:
    """The share that is right of each kind that there is."""
    return {name: mean(np.array(right)[of]) for name, of in kinds.items() if any(of)}


@torch.no_grad()
def reconstruction(
    vae: AutoEncoder,
    count: int,
    seed: int,
    sheet: Path | None = None,
    *,
    objects: int | None = None,
    texture: str | None = None,
) -> dict[str, float]:
    """How often the judge finds in a reconstruction what was drawn.

    Args:
        vae: the autoencoder.
        count: drawings; every second one is of a triple that training never shows.
        seed: of the drawings.
        sheet: where a PNG of drawings and their reconstructions, side by side, goes.
        objects, texture: of the scenes, as `random_scene` takes them.

    Returns:
        `right`: share with shape, colour, background, texture and layout right; `small`, `two`: the
        same of small shapes and of two objects; `textured`: of backgrounds that are not plain;
        `psnr`: mean, in dB.
    """
    rng = np.random.default_rng((seed, 99))
    device = next(vae.parameters()).device
    scenes = [random_scene(rng, i % 2 == 1, objects, texture) for i in range(count)]
    drawings = np.stack([draw(scene, rng) for scene in scenes])
    parts = []
    for start in range(0, count, BATCH):
        z = vae.encode(to_tensor(drawings[start : start + BATCH]).to(device))
        parts.append(to_pictures(vae.decode(z)))
    pictures = np.concatenate(parts)
    if sheet is not None:
        pairs = np.stack((drawings, pictures), 1).reshape(-1, *pictures.shape[1:])
        draw_sheet(pairs[:SHOWN], sheet)
    right = [matches(judge(p), s) for p, s in zip(pictures, scenes, strict=True)]
    kinds = {
        "small": [scene.size == "small" for scene in scenes],
        "two": [scene.other is not None for scene in scenes],
        "textured": [scene.texture != "plain" for scene in scenes],
    }
    error = np.square(drawings.astype(np.float64) - pictures).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-9))
    return {"right": mean(right), **_shares(right, kinds), "psnr": mean(psnr)}


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to fp32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x: Tensor) -> np.ndarray:
    """[B, 3, H, W] in -1..1 to uint8 [B, H, W, 3]."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round()
    return x.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


def draw_sheet(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    """Writes uint8 [N, H, W, 3] as one PNG, row by row."""
    rows = -(-len(pictures) // columns)
    side = pictures.shape[1] + 2
    sheet = np.full((rows * side, columns * side, 3), 128, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * side, i % columns * side
        sheet[top : top + side - 2, left : left + side - 2] = picture
    image = Image.fromarray(sheet)
    write_files(path.parent, {path.name: lambda file: image.save(file, format="PNG")})


def mean(values: list | np.ndarray) -> float:
    """The mean to four places; 0 of nothing."""
    return round(float(np.mean(values)), 4) if len(values) else 0.0
