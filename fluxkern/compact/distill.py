"""Distillation of the compact FLUX: two-pass guidance into one pass, then paths into few steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import ops
from ..model.sampling import ScheduleConfig, combine_cfg, euler_step, get_schedule, pack
from ..model.transformer import TIME_DIM, Flux
from ..pipeline import FluxPipeline
from .drawings import BASE, caption, draw, random_scene
from .evaluate import adherence, to_tensor
from .optimise import Gradients, read_tensors, save_tensors, workers
from .recipe import FewStepsStage
from .train import (
    JUDGED,
    Batches,
    Run,
    flow_loss,
    in_half,
    torch_chance,
    training_caption,
    velocity,
)

GUIDANCES = (1.0, 2.0, 3.5, 5.0)  # of the error of its velocity
TOKENS = (BASE // 16) ** 2  # of a picture
AT_ONCE = 32  # paths
EVEN = ScheduleConfig(use_dynamic_shifting=False, shift=1.0)  # FLUX.1 [schnell]'s schedule


class DistillRun(Run):
    """`fluxkern train distill`: the guided student, then the few-step student.

    Source: Meng et al., On Distillation of Guided Diffusion Models, for the first.
    """

    command = "distill"

    def train(self) -> Path:
        """Returns the folder of `dev` and `schnell`."""
        start = Path(self.recipe.start or self.folder / "weights")
        if not start.is_dir():
            first = "" if self.recipe.start else ": `fluxkern train flow` comes first"
            raise ValueError(f"{start} is missing{first}")
        self.keep_recipe()
        self.teacher = FluxPipeline.from_pretrained(start, device=self.device)
        dev = self.train_guidance()
        schnell = self.train_few_steps(dev)
        for name, pipe in (("dev", dev), ("schnell", schnell)):
            if not (self.folder / name).exists():
                in_half(pipe).save_pretrained(self.folder / name)
        return self.folder

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.teacher.text_encoder.encode(captions)

    def _with(self, flux: Flux, schedule: ScheduleConfig) -> FluxPipeline:
        parts = self.teacher
        return FluxPipeline(flux, parts.vae, parts.text_encoder, schedule, default_size=BASE)

    def _judged(self, pipe: FluxPipeline, name: str, **how: float) -> Callable:
        sheet, seed = self.folder / f"{name}.png", self.recipe.seed
        return partial(adherence, pipe, JUDGED["flow"], seed, sheet, true_cfg_scale=1.0, **how)

    def train_guidance(self) -> FluxPipeline:
        numbers = self.recipe.guidance
        dtype = getattr(torch, numbers.dtype)
        student = guided(self.teacher.transformer, self.recipe.seed).to(self.device)
        pipe = self._with(student, self.teacher.schedule)
        optimised = self.optimised("guidance", student)
        latents = pack(self.latents(self.teacher.vae.encode, numbers.pictures))
        batches = Batches(self.scenes(numbers.pictures), latents, numbers)
        teacher = frozen(self.teacher.transformer, dtype)
        gradients = Gradients(student, dtype, partial(guidance_loss, teacher, self._encode, dtype))

        def backward(step: int) -> float:
            rng = self.chance("guidance", step)
            captions, img, t, _ = batches(rng, dropped=0.0)
            span = numbers.most - numbers.least
            chance = torch.rand(t.shape, dtype=t.dtype, device="cpu", generator=torch_chance(rng))
            w = numbers.least + span * chance
            return gradients.backward(captions, img, t, w)

        judged = self._judged(pipe, "dev")

        def figures() -> dict[str, float]:
            errors = velocity_error(pipe, self.teacher, 16, self.recipe.seed)
            return judged() | {f"error at {w:g}": round(e, 4) for w, e in errors.items()}

        self.fit("guidance", optimised, backward, figures, numbers.evaluate_every)
        return pipe

    def train_few_steps(self, dev: FluxPipeline) -> FluxPipeline:
        numbers = self.recipe.few_steps
        dtype = getattr(torch, numbers.dtype)
        student = unguided(dev.transformer, numbers.guidance).to(self.device)
        pipe = self._with(student, EVEN)
        optimised = self.optimised("few_steps", student)
        captions, places = self.paths(frozen(dev.transformer, dtype))
        loss = partial(flow_loss, self._encode, dtype)
        gradients = Gradients(student, dtype, loss)

        def backward(step: int) -> float:
            rng = self.chance("few_steps", step)
            return gradients.backward(*pieces(captions, places, numbers.batch_size, rng))

        judged = self._judged(pipe, "schnell", steps=numbers.student_steps)
        self.fit("few_steps", optimised, backward, judged, numbers.evaluate_every)
        return pipe

    def paths(self, teacher: Flux) -> tuple[list[str], Tensor]:
        """Captions and where the teacher's paths are: [paths, student_steps + 1, L, 64]."""
        numbers, file = self.recipe.few_steps, self.folder / "paths.safetensors"
        rngs = [self.chance("paths", i) for i in range(numbers.paths)]
        captions = [training_caption(random_scene(rng), rng, 0.0) for rng in rngs]
        if not file.exists():
            seeds = [torch_chance(rng) for rng in rngs]
            size = TOKENS, teacher.config.in_channels

            def followed(start: int) -> Tensor:
                part = slice(start, start + AT_ONCE)
                drawn = {"dtype": torch.float32, "device": "cpu"}
                noise = torch.stack([torch.randn(size, generator=s, **drawn) for s in seeds[part]])
                text = self._encode(captions[part])
                return follow(teacher, numbers, noise.to(self.device), *text).cpu()

            starts = range(0, numbers.paths, AT_ONCE)
            with ThreadPoolExecutor(workers(self.device)) as threads:
                parts = list(tqdm(threads.map(followed, starts), "paths", len(starts)))
            save_tensors(file, {"places": torch.cat(parts)}, {})
        return captions, read_tensors(file)["places"]


def frozen(flux: Flux, dtype: torch.dtype) -> Flux:
    """A copy that computes in dtype and learns nothing."""
    copy = Flux(flux.config).to(next(flux.parameters()).device)
    copy.load_state_dict(flux.state_dict())
    return copy.to(dtype).eval().requires_grad_(False)


def guided(teacher: Flux, seed: int) -> Flux:
    """The teacher with guidance as a further input, which changes nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Flux(replace(teacher.config, guidance_embed=True))
    student.load_state_dict(teacher.state_dict() | _of(student, "guidance_in"))
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    return student


def _of(flux: Flux, name: str) -> dict[str, Tensor]:
    return {key: value for key, value in flux.state_dict().items() if key.startswith(f"{name}.")}


@torch.no_grad()
def unguided(student: Flux, guidance: float) -> Flux:
    """The same velocities at one guidance, which is no input any more: it became part of a bias."""
    state = student.state_dict()
    bias = student.img_in.bias
    strength = torch.full((1,), guidance, dtype=bias.dtype, device=bias.device)
    constant = student.guidance_in(ops.timestep_embedding(strength, TIME_DIM))[0]
    state = {name: t for name, t in state.items() if not name.startswith("guidance_in.")}
    state["vector_in.out_layer.bias"] = state["vector_in.out_layer.bias"] + constant
    flux = Flux(replace(student.config, guidance_embed=False))
    flux.load_state_dict(state)
    return flux


@torch.no_grad()
def velocity_error(
    student: FluxPipeline, teacher: FluxPipeline, count: int, seed: int
) -> dict[float, float]:
    """Relative L2 of the student's velocity in one pass to the teacher's guided one in two.

    On straight paths from noise to `count` drawings, every second one of a triple that training
    never shows.

    Returns:
        guidance -> mean over ten times of the norm of the difference in that of the teacher's.
    """
    rng = np.random.default_rng((seed, 97))
    noise, device = torch_chance(rng), student.device
    scenes = [random_scene(rng, held_out=i % 2 == 1) for i in range(count)]
    drawings = to_tensor(np.stack([draw(scene, rng) for scene in scenes])).to(device)
    text = teacher.text_encoder.encode([caption(scene, rng) for scene in scenes])
    empty = teacher.text_encoder.encode([""] * count)
    x0, errors = pack(teacher.vae.encode(drawings)), {w: [] for w in GUIDANCES}

    def pass_of(pipe: FluxPipeline, txt: Tensor, vec: Tensor, w: Tensor | None = None) -> Tensor:
        return velocity(pipe.transformer, torch.float32, img, txt, times, vec, w)

    for t in np.linspace(0.05, 0.95, 10):
        x1 = torch.randn(x0.shape, dtype=torch.float32, device="cpu", generator=noise).to(device)
        img = torch.lerp(x0, x1, float(t))
        times = x0.new_full((count,), float(t))
        cond, uncond = (pass_of(teacher, *which) for which in (text, empty))
        for w, found in errors.items():
            target = combine_cfg(cond, uncond, w)
            ours = pass_of(student, *text, x0.new_full((count,), w))
            found.append(float((ours - target).norm() / target.norm()))
    return {w: float(np.mean(found)) for w, found in errors.items()}


Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


def guidance_loss(
    teacher: Flux,
    encode: Encode,
    dtype: torch.dtype,
    student: Flux,
    captions: list[str],
    img: Tensor,
    t: Tensor,
    w: Tensor,
) -> Tensor:
    """Mean square error of one pass with guidance w to the teacher's two passes, in terms of w.

    img [B, L, 64], t and w [B]; a scalar with a gradient to the student alone. Errors grow with w:
    undivided, the strongest guidance would have nearly all of the loss.
    """
    with torch.no_grad():
        txt, vec = encode(captions)
        no_txt, no_vec = (a.expand_as(b) for a, b in zip(encode([""]), (txt, vec), strict=True))
        cond, uncond = (
            velocity(teacher, dtype, img, *text).float()
            for text in ((txt, t, vec), (no_txt, t, no_vec))
        )
        target = combine_cfg(cond, uncond, w[:, None, None])
    found = velocity(student, dtype, img, txt, t, vec, w).float()
    return F.mse_loss(found / w[:, None, None], target / w[:, None, None])


@torch.no_grad()
def follow(
    teacher: nn.Module, numbers: FewStepsStage, noise: Tensor, txt: Tensor, vec: Tensor
) -> Tensor:
    """Where the teacher's paths from noise [B, L, 64] are at each of the student's steps.

    [B, student_steps + 1, L, 64], the noise first.
    """
    dtype = getattr(torch, numbers.dtype)
    sigmas = get_schedule(numbers.teacher_steps, TOKENS, EVEN)
    w = noise.new_full((len(noise),), numbers.guidance)
    img, places = noise, [noise]
    for i in range(numbers.teacher_steps):
        t = sigmas[i].to(noise.device).expand(len(noise))
        flow = velocity(teacher, dtype, img, txt, t, vec, w).float()
        img = euler_step(img, flow, *sigmas[i : i + 2])
        if (i + 1) % (numbers.teacher_steps // numbers.student_steps) == 0:
            places.append(img)
    return torch.stack(places, 1)


def pieces(
    captions: list[str], places: Tensor, count: int, rng: np.random.Generator
) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """Draws pieces of paths for `flow_loss`: captions, starts, times, velocities to the ends.

    Every piece of a path is as frequent as the others. places [paths, steps + 1, L, 64].

    Source: Luhman and Luhman, Knowledge Distillation in Iterative Generative Models, a piece of the
    path at a time.
    """
    steps = places.shape[1] - 1
    sigmas = get_schedule(steps, TOKENS, EVEN)
    path = torch.from_numpy(rng.integers(len(places), size=count))
    piece = torch.arange(count, dtype=torch.int64, device="cpu") % steps
    start, end = places[path, piece], places[path, piece + 1]
    length = (sigmas[piece] - sigmas[piece + 1])[:, None, None]
    return [captions[i] for i in path], start, sigmas[piece], (start - end) / length
