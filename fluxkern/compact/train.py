"""Training of the compact FLUX: the autoencoder, then text encoders and transformer.

Each stage writes its state to the run's folder as it goes; started again in the same folder,
training goes on where it stopped. All chance is drawn from (seed, stage, step) on the CPU, so a run
that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .._files import hold, read_json, write_files, write_json
from ..checkpoint import load_autoencoder, load_flux
from ..model.autoencoder import AutoEncoder, AutoEncoderConfig
from ..model.sampling import ScheduleConfig, get_img_ids, get_txt_ids, pack
from ..model.text_encoder import TextEncoder
from ..model.transformer import CONFIGS, Flux
from ..pipeline import FluxPipeline
from . import text
from .drawings import BASE, Scene, caption, draw, random_scene
from .evaluate import adherence, mean, reconstruction, to_tensor
from .optimise import (
    Diverged,
    Gradients,
    Optimised,
    asked_to_stop,
    read_tensors,
    save_tensors,
    step_of,
)
from .recipe import FlowRecipe, FlowStage, GuidanceStage, VaeRecipe

CROP = 64  # px
SAVE_EVERY = 120.0  # seconds between saved states
JUDGED = {"flow": 64, "vae": 200}  # pictures of an evaluation
VAE_SIZES = {"ch": 16, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1, "norm_num_groups": 2}
STREAMS = {  # of chance
    "pictures": 0,
    "vae": 1,
    "text": 2,
    "flow": 3,
    "decoder": 4,
    "guidance": 5,
    "few_steps": 6,
    "paths": 7,
}
FIRST = "vae.safetensors"  # the state of the autoencoder's first stage


class Run:
    """One command of training in a run's folder.

    Args:
        folder: states, sample sheets, `log.jsonl` and weights.
        recipe: the numbers of the command.
        device: where models compute.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """

    command: str

    def __init__(self, folder: str | Path, recipe, device: torch.device | str = "cpu"):
        self.folder, self.recipe = Path(folder), recipe
        self.device = torch.device(device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_recipe()

    def _check_recipe(self) -> None:
        path = self.folder / f"{self.command}.json"
        now = asdict(self.recipe)
        if path.exists() and (before := read_json(path)) != now:
            different = [name for name in now if before.get(name) != now[name]]
            raise ValueError(
                f"{self.folder} holds a run of another recipe: {different[0]} is "
                f"{before.get(different[0])} there, got {now[different[0]]}"
            )

    def __call__(self) -> Path:
        """Goes through what is not finished yet; returns where the result is.

        Raises:
            ValueError: another training writes to the folder, or what comes first is not there.
            Diverged: a loss, a gradient or a weight is not finite.
        """
        with open(self.folder / "log.jsonl", "a") as log:
            with suppress(OSError):  # not every file system has locks
                if not hold(log.fileno()):
                    raise ValueError(f"{self.folder}: another training writes there")
            return self.train()

    def train(self) -> Path:
        raise NotImplementedError

    def keep_recipe(self) -> None:
        """What the folder holds from now on is a run of this recipe."""
        path = self.folder / f"{self.command}.json"
        write_files(path.parent, {path.name: lambda file: write_json(file, asdict(self.recipe))})

    def log(self, **values: object) -> None:
        line = json.dumps({"time": round(time.time(), 1)} | values) + "\n"
        with open(self.folder / "log.jsonl", "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line.encode()) != len(line):
                file.truncate(end)  # no half a line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    def chance(self, stage: str, step: int) -> np.random.Generator:
        return np.random.default_rng((self.recipe.seed, STREAMS[stage], step))

    def optimised(self, stage: str, module: nn.Module) -> Optimised:
        """The parameters of a module under training by the numbers of a stage."""
        numbers = getattr(self.recipe, stage)
        return Optimised(
            self.folder / f"{stage}.safetensors",
            dict(module.named_parameters()),
            numbers.learning_rate,
            numbers.steps,
            numbers.decay,
            getattr(numbers, "muon_learning_rate", None),
        )

    def fit(
        self,
        stage: str,
        optimised: Optimised,
        backward: Callable[[int], float],
        evaluate: Callable[[], dict[str, float]],
        evaluate_every: int,
    ) -> None:
        """The loop of every stage: saves the state now and then, logs, draws a sample sheet.

        `backward(step)` leaves the gradients of that step's loss in the parameters and returns it.
        A loss, a gradient or a weight that is not finite is a Diverged; the saved state stays.
        """
        bar = tqdm(total=optimised.steps, initial=optimised.step, desc=stage, dynamic_ncols=True)
        saved, losses, figures = time.monotonic(), deque(maxlen=100), {}
        with bar, asked_to_stop() as asked:
            while optimised.step < optimised.steps:
                losses.append(backward(optimised.step))
                optimised.check("loss", losses[-1])
                optimised.update()
                bar.update()
                done = optimised.step == optimised.steps
                if optimised.step % evaluate_every == 0 or done:
                    with optimised.averaged(), torch.no_grad():
                        figures = evaluate()
                    self.log(stage=stage, step=optimised.step, loss=mean(losses), **figures)
                if optimised.step % 20 == 0:
                    shown = {name: figures[name] for name in ("right", "all") if name in figures}
                    bar.set_postfix(loss=f"{mean(losses):.4f}", **shown)
                if asked or done or time.monotonic() - saved > SAVE_EVERY:
                    optimised.save()
                    saved = time.monotonic()
                if asked:
                    raise KeyboardInterrupt
        optimised.keep_mean()

    def scenes(self, count: int) -> list[Scene]:
        """What the first `count` training drawings show."""
        return [random_scene(self.chance("pictures", i)) for i in range(count)]

    def drawing(self, i: int) -> np.ndarray:
        rng = self.chance("pictures", i)
        return draw(random_scene(rng), rng)

    def latents(self, encode: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """What `encode` makes of the training drawings, [count, 16, 16, 16]."""
        path = self.folder / f"{self.command}-latents.safetensors"
        if not path.exists():
            parts = []
            for start in tqdm(range(0, count, 50), desc="encoding", dynamic_ncols=True):
                batch = [self.drawing(i) for i in range(start, min(start + 50, count))]
                with torch.no_grad():
                    parts.append(encode(to_tensor(np.stack(batch)).to(self.device)).cpu())
            save_tensors(path, {"latents": torch.cat(parts).contiguous()}, {})
        return read_tensors(path)["latents"]


def torch_chance(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


# autoencoder


def new_vae(recipe: VaeRecipe | FlowRecipe) -> AutoEncoder:
    """The autoencoder as training begins with it, its latents as they come."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae = AutoEncoder(AutoEncoderConfig(**VAE_SIZES, scale_factor=1.0, shift_factor=0.0))
    if recipe.start:
        vae.load_state_dict(load_autoencoder(Path(recipe.start) / "vae").state_dict())
    return vae


class VaeRun(Run):
    """`fluxkern train vae`: encoder and decoder, then the decoder alone."""

    command = "vae"

    def train(self) -> Path:
        """Returns the last state."""
        latents = self.folder / "flow-latents.safetensors"
        if latents.exists() and not (self.folder / FIRST).exists():
            raise ValueError(f"{latents} is of another autoencoder")
        self.keep_recipe()
        self.vae = new_vae(self.recipe).to(self.device)
        self._train("vae", self.vae, self._whole)
        self._train("decoder", self.vae.decoder, self._decoded)
        return self.folder / "decoder.safetensors"

    def _train(self, stage: str, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        optimised, numbers = self.optimised(stage, module), getattr(self.recipe, stage)
        if optimised.step < optimised.steps:
            scenes, pictures = self._pictures()
        gradients = Gradients(self.vae, torch.float32, loss)

        def backward(step: int) -> float:
            rng = self.chance(stage, step)
            x = vae_batch(scenes, pictures, rng, step, numbers.batch_size)
            shape = len(x), self.vae.config.z_channels, x.shape[2] // 8, x.shape[3] // 8
            on = {"dtype": torch.float32, "device": "cpu", "generator": torch_chance(rng)}
            return gradients.backward(x, torch.randn(shape, **on))

        sheet = self.folder / f"{stage}.png"
        judged = partial(reconstruction, self.vae, JUDGED["vae"], self.recipe.seed, sheet)
        self.fit(stage, optimised, backward, judged, 500)

    def _whole(self, vae: AutoEncoder, x: Tensor, noise: Tensor) -> Tensor:
        """L1 + MSE of a reconstruction, and the KL term per latent element."""
        average, logvar = vae.moments(x)
        out = vae.decoder(average + torch.exp(0.5 * logvar) * noise)
        kl = 0.5 * (average.square() + logvar.exp() - 1 - logvar).mean()
        return difference(out, x) + self.recipe.vae.kl_weight * kl

    def _decoded(self, vae: AutoEncoder, x: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            z = vae.moments(x)[0]
        return difference(vae.decoder(z), x)

    def _pictures(self) -> tuple[list[Scene], np.ndarray]:
        """The training drawings: scenes and uint8 [count, 128, 128, 3]."""
        count = self.recipe.vae.pictures
        pictures = np.empty((count, BASE, BASE, 3), np.uint8)
        for i in tqdm(range(count), desc="drawing", dynamic_ncols=True, leave=False):
            pictures[i] = self.drawing(i)
        return self.scenes(count), pictures


def difference(out: Tensor, x: Tensor) -> Tensor:
    return F.l1_loss(out, x) + F.mse_loss(out, x)


def vae_batch(
    scenes: list[Scene],
    pictures: np.ndarray,
    rng: np.random.Generator,
    step: int,
    batch_size: int,
) -> Tensor:
    """Every third step whole pictures, else crops that show a shape or a part of it."""
    if step % 3 == 2:
        return to_tensor(pictures[rng.integers(len(pictures), size=max(batch_size // 4, 1))])
    crops = []
    for i in rng.integers(len(pictures), size=batch_size):
        x, y = rng.choice(scenes[i].places)
        left, top = (
            int(np.clip(place * BASE - CROP / 2 + rng.uniform(-24, 24), 0, BASE - CROP))
            for place in (x, y)
        )
        crops.append(pictures[i, top : top + CROP, left : left + CROP])
    return to_tensor(np.stack(crops))


# transformer


class FlowRun(Run):
    """`fluxkern train flow`: the text encoders, then the transformer on latents of the folder's
    autoencoder, or of that of the recipe's start where the folder has none.

    Raises:
        ValueError: there is no autoencoder, or its training is not finished.
    """

    command = "flow"

    def train(self) -> Path:
        """Returns the folder of the weights."""
        self.vae = self._new_vae().to(self.device)
        self.keep_recipe()
        self.train_text()
        self.train_flow()
        weights = self.folder / "weights"
        if not weights.exists():
            if (self.folder / FIRST).exists():
                assign_mean(self.vae.decoder, self._finished("decoder"))
            in_half(self.pipeline()).save_pretrained(weights)
        return weights

    def _new_vae(self) -> AutoEncoder:
        """The encoder is finished; the decoder need not be before the weights are written."""
        vae, decoder = new_vae(self.recipe), self.folder / "decoder.safetensors"
        if self.recipe.start and not (self.folder / FIRST).exists():
            return vae
        assign_mean(vae, self._finished("vae"))
        if decoder.exists():
            assign_mean(vae.decoder, decoder)
        return vae

    def _finished(self, stage: str) -> Path:
        """The state of a stage of `fluxkern train vae`, all of whose steps were done."""
        path, recipe = self.folder / f"{stage}.safetensors", self.folder / "vae.json"
        for file in (path, recipe):
            if not file.exists():
                raise ValueError(f"{file} is missing: `fluxkern train vae` comes first")
        done, steps = step_of(path), read_json(recipe)[stage]["steps"]
        if done < steps:
            raise ValueError(f"{path}: `fluxkern train vae` did {done} of its {steps} steps")
        return path

    def train_text(self) -> None:
        recipe, done = self.recipe.text, self.folder / "text" / "metrics.json"
        self.tokenizers = text.build_tokenizers(self.folder / "text")
        if done.exists():
            self.clip, self.t5 = text.load_text(self.folder / "text")
        else:
            self.clip, self.t5 = text.build_encoders(self.tokenizers, self.recipe.seed)
            if self.recipe.start:
                text.start_from(self.recipe.start, self.clip, self.t5, self.tokenizers)
        self.clip.to(self.device), self.t5.to(self.device)
        if done.exists():
            return
        bar = tqdm(total=recipe.steps, desc="text", dynamic_ncols=True)
        metrics = text.pretrain_encoders(
            self.clip,
            self.t5,
            self.tokenizers,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            seed=self.recipe.seed,
            progress=lambda step, loss: (bar.update(), bar.set_postfix(loss=f"{loss:.4f}")),
        )
        bar.close()
        text.save_text(self.folder / "text", self.clip, self.t5)
        write_files(done.parent, {done.name: lambda file: write_json(file, metrics)})
        self.log(stage="text", **metrics)

    def train_flow(self) -> None:
        recipe = self.recipe.flow
        self.flux = self._new_flux().to(self.device)
        optimised = self.optimised("flow", self.flux)
        z = self.latents(lambda x: self.vae.moments(x)[0], recipe.pictures)
        shift, scale = float(z.mean()), float(1 / z.std())
        self.vae.config = AutoEncoderConfig(**VAE_SIZES, shift_factor=shift, scale_factor=scale)
        batches = Batches(self.scenes(recipe.pictures), pack((z - shift) * scale), recipe)
        encode = partial(text.encode, self.clip, self.t5, self.tokenizers)
        loss = partial(flow_loss, encode, getattr(torch, recipe.dtype))
        gradients = Gradients(self.flux, getattr(torch, recipe.dtype), loss)

        def backward(step: int) -> float:
            rng = self.chance("flow", step)
            captions, img, t, target = batches(rng, recipe.dropped_captions)
            return gradients.backward(captions, img, t, target)

        sheet = self.folder / "flow.png"
        self.fit(
            "flow",
            optimised,
            backward,
            lambda: adherence(self.pipeline(), JUDGED["flow"], self.recipe.seed, sheet),
            recipe.evaluate_every,
        )

    def _new_flux(self) -> Flux:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            flux = Flux(CONFIGS["compact"])
            initialise(flux)
        if self.recipe.start:
            flux.load_state_dict(load_flux(Path(self.recipe.start) / "transformer").state_dict())
        return flux

    def pipeline(self) -> FluxPipeline:
        encoder = TextEncoder(self.clip, self.tokenizers.clip, self.t5, self.tokenizers.t5)
        schedule = ScheduleConfig(use_dynamic_shifting=True)
        return FluxPipeline(self.flux, self.vae, encoder, schedule, default_size=BASE)


class Batches:
    """Draws batches of the flow: captions, points of straight paths, times, velocities."""

    def __init__(self, scenes: list[Scene], latents: Tensor, numbers: FlowStage | GuidanceStage):
        self.scenes, self.latents, self.numbers = scenes, latents, numbers
        often = np.cumsum([numbers.fine if fine(scene) else 1.0 for scene in scenes])
        self.up_to = often / often[-1]

    def __call__(
        self, rng: np.random.Generator, dropped: float
    ) -> tuple[list[str], Tensor, Tensor, Tensor]:
        chosen = self.up_to.searchsorted(rng.random(self.numbers.batch_size), side="right")
        captions = [training_caption(self.scenes[i], rng, dropped) for i in chosen]
        on = {"dtype": torch.float32, "device": "cpu", "generator": torch_chance(rng)}
        x0 = self.latents[torch.from_numpy(chosen)]
        x1 = torch.randn(x0.shape, **on)
        t = torch.randn(len(chosen), **on)
        t = (self.numbers.noise_mean + self.numbers.noise_std * t).sigmoid()
        return captions, torch.lerp(x0, x1, t[:, None, None]), t, x1 - x0


def fine(scene: Scene) -> bool:
    """Its outline is thin for few tokens, so little of the loss tells of it."""
    return scene.size == "small" and scene.shape in ("star", "ring", "cross")


def training_caption(scene: Scene, rng: np.random.Generator, dropped: float) -> str:
    if rng.random() < dropped:
        return ""
    return caption(scene, rng, complete=rng.random() >= text.INCOMPLETE_SHARE)


def flow_loss(
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    flux: Flux,
    captions: list[str],
    img: Tensor,
    t: Tensor,
    target: Tensor,
) -> Tensor:
    """Mean square error of the velocity, a scalar with a gradient to flux alone.

    img, target [B, L, 64], t [B] in 0..1; `encode` gives txt [B, Lt, context] and vec [B, vec].

    Source: Liu et al., Flow Straight and Fast (rectified flow).
    """
    with torch.no_grad():
        txt, vec = encode(captions)
    return F.mse_loss(velocity(flux, dtype, img, txt, t, vec).float(), target)


def velocity(
    flux: Flux,
    dtype: torch.dtype,
    img: Tensor,
    txt: Tensor,
    t: Tensor,
    vec: Tensor,
    guidance: Tensor | None = None,
) -> Tensor:
    """One pass over pictures of BASE, computed in dtype: [B, L, 64], of img's shape.

    img [B, L, 64], txt [B, Lt, context], t and guidance [B], vec [B, vec].
    """
    ids = get_img_ids(BASE, BASE, img.device), get_txt_ids(txt.shape[1], img.device)
    img, txt, t, vec = (a.to(dtype) for a in (img, txt, t, vec))
    return flux(img, ids[0], txt, ids[1], t, vec, guidance)


def assign_mean(module: nn.Module, path: Path) -> None:
    """Gives a module, in place, the running means of a state; a wrong shape is a ValueError."""
    state = read_tensors(path)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = state[f"mean.{name}"]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{path}: {name} must be {list(parameter.shape)}, got {list(value.shape)}"
                )
            parameter.copy_(value)


def in_half(pipe: FluxPipeline) -> FluxPipeline:
    """The pipeline on the CPU in float16, as it is stored; Diverged where a weight is too large."""
    pipe.to(dtype=torch.float16, device="cpu")
    text = pipe.text_encoder
    parts = {"transformer": pipe.transformer, "vae": pipe.vae, "CLIP": text.clip, "T5": text.t5}
    for name, part in parts.items():
        if not all(p.isfinite().all() for p in part.parameters()):
            raise Diverged(f"the weights are not written: the {name} does not fit in float16")
    return pipe


def initialise(flux: Flux) -> None:
    """Xavier weights and zero gates: every block begins as the identity (adaLN-zero)."""
    for name, parameter in flux.named_parameters():
        zero = "_mod." in name or ".modulation." in name or name.startswith("final_layer.")
        if zero or name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
