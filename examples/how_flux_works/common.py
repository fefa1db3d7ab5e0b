"""What the sections share: the checkpoints of the package, sizes of a run, prompts, paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluxkern import FluxPipeline
from fluxkern.compact.drawings import POSITION_WORDS, Scene, draw, random_scene
from fluxkern.compact.evaluate import to_pictures, to_tensor
from fluxkern.model import sampling
from fluxkern.model.sampling import Conditioning, Step

SEED = 20261124
CFG = 3.0  # of compact-base, where one strength is wanted
PROMPT = "a large red star at the top left on a blue background"
STEPS = 16
CHECKPOINTS = ("compact-base", "compact-dev", "compact-schnell")


@dataclass(frozen=True)
class Size:
    """How much is run: steps of sampling, pictures that the judge reads, rounds of timing.

    canvas is the side in pixels of the plain background around a drawing that is shifted.
    """

    steps: int = STEPS
    pictures: int = 64
    rounds: int = 7
    canvas: int = 384


def checkpoints() -> dict[str, FluxPipeline]:
    """Those of the package by their names; compact-base is always there."""
    found = {}
    for name in CHECKPOINTS:
        try:
            found[name] = FluxPipeline.from_pretrained(name)
        except ValueError as error:
            print(f"without {name}: {error}")
    return found if "compact-base" in found else {"compact-base": base()} | found


def base() -> FluxPipeline:
    return FluxPipeline.from_pretrained("compact")


def seeded(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(count: int, stream: int) -> list[Scene]:
    """One object on a plain background, of combinations that training has."""
    rng = np.random.default_rng((SEED, stream))
    return [random_scene(rng, objects=1, texture="plain") for _ in range(count)]


def words(scene: Scene) -> str:
    """The same sentence for every scene, each attribute a word of it."""
    where = POSITION_WORDS[scene.position][0]
    thing = f"a {scene.size} {scene.colour} {scene.shape} {where}"
    return f"{thing} on a {scene.background} background"


def drawings(found: list[Scene]) -> Tensor:
    """[B, 3, 128, 128] in -1..1."""
    rng = np.random.default_rng(SEED)
    return to_tensor(np.stack([draw(scene, rng) for scene in found]))


@torch.no_grad()
def decoded(pipe: FluxPipeline, img: Tensor) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of packed latents."""
    side = pipe.default_size
    return to_pictures(pipe.vae.decode(sampling.unpack(img, side, side)))


@torch.no_grad()
def conditioning(pipe: FluxPipeline, prompts: list[str]) -> Conditioning:
    return Conditioning(*pipe.text_encoder.encode(prompts))


def noise(pipe: FluxPipeline, count: int, seed: int = SEED) -> Tensor:
    """Packed noise, that of picture i the same whatever the count."""
    side = pipe.default_size
    generators = [seeded(seed + i) for i in range(count)]
    return sampling.pack(sampling.get_noise(count, side, side, torch.float32, generators))


@dataclass(frozen=True)
class Trajectory:
    """A path: sigmas [N + 1], places [N + 1, B, L, C], the velocities [N, B, L, C] between them."""

    sigmas: Tensor
    places: Tensor

    @property
    def velocities(self) -> Tensor:
        steps = (self.sigmas[1:] - self.sigmas[:-1])[:, None, None, None]
        return (self.places[1:] - self.places[:-1]) / steps

    @property
    def estimates(self) -> Tensor:
        """The picture that each velocity points at, [N, B, L, C]."""
        return self.places[:-1] - self.sigmas[:-1, None, None, None] * self.velocities


@torch.no_grad()
def trajectory(
    pipe: FluxPipeline, prompts: list[str], steps: int, cfg: float = CFG, guidance: float = 3.5
) -> Trajectory:
    """Every place that `denoise` goes through from noise to the latents of the prompts."""
    side, img = pipe.default_size, noise(pipe, len(prompts))
    img_ids, places = sampling.get_img_ids(side, side), [img]

    def on_step(step: Step) -> None:
        places.append(step.img)

    sigmas = sampling.get_schedule(steps, len(img_ids), pipe.schedule)
    sampling.denoise(
        pipe.transformer,
        img,
        img_ids,
        conditioning(pipe, prompts),
        sigmas,
        guidance_scale=guidance if pipe.transformer.config.guidance_embed else None,
        uncond=conditioning(pipe, [""] * len(prompts)) if cfg > 1 else None,
        true_cfg_scale=cfg,
        on_step=on_step,
    )
    return Trajectory(sigmas, torch.stack(places))


def guidance(pipe: FluxPipeline, count: int, strength: float = 3.5) -> Tensor | None:
    """What the transformer takes as guidance, [B]; None where it takes none."""
    embedded = pipe.transformer.config.guidance_embed
    return torch.full((count,), strength) if embedded else None


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def power(x: float) -> str:
    """Like 3e-7; 0 is 0."""
    return f"{x:.0e}".replace("e-0", "e-") if x else "0"


def relative(a: Tensor, b: Tensor) -> float:
    """L2 of a - b in terms of b's."""
    return float((a - b).norm() / b.norm())
