"""Training of the compact FLUX, from nothing to a folder that `FluxPipeline` loads.

Stages: vae, text, flow, decoder. Each writes its state to the run's folder as it goes; started
again in the same folder, training goes on where it stopped. All chance is drawn from (seed, stage,
step), so a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from .._files import write_files, write_json
from ..model.autoencoder import AutoEncoder, AutoEncoderConfig
from ..model.sampling import (
    ScheduleConfig,
    get_img_ids,
    get_txt_ids,
    pack,
)
from ..model.text_encoder import TextEncoder
from ..model.transformer import CONFIGS, Flux
from ..pipeline import FluxPipeline
from . import text
from .drawings import BASE, POSITIONS, Scene, caption, draw, random_scene
from .evaluate import adherence, mean, reconstruction, to_tensor
from .recipe import Recipe

CROP = 64  # px
SAVE_EVERY = 120.0  # seconds between saved states
JUDGED = {"flow": 64, "vae": 200}  # pictures of an evaluation
VAE_SIZES = {"ch": 16, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1, "norm_num_groups": 2}
STREAMS = {"pictures": 0, "vae": 1, "text": 2, "flow": 3, "decoder": 4}  # of chance


def _chance(recipe: Recipe, stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng((recipe.seed, STREAMS[stage], step))


def _torch_chance(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


@dataclass
class Optimised:
    """Parameters under training, their running mean, and where their state is kept.

    AdamW moves all of them, but the matrices of the blocks where Muon has a learning rate.
    """

    path: Path
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    steps: int
    decay: float
    muon_learning_rate: float | None = None

    def __post_init__(self) -> None:
        self.step = 0
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}
        rates, matrices = {"lr": self.learning_rate, "weight_decay": 0.01}, {}
        if self.muon_learning_rate is not None:
            matrices = {n: p for n, p in self.parameters.items() if p.ndim == 2 and "blocks." in n}
        rest = [p for n, p in self.parameters.items() if n not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, betas=(0.9, 0.98), **rates)
        ]
        if matrices:
            rates["lr"] = self.muon_learning_rate
            muon = torch.optim.Muon(matrices.values(), adjust_lr_fn="match_rms_adamw", **rates)
            self.optimizers.append(muon)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["highest"] = group["lr"]
        if self.path.exists():
            self._load()

    def update(self) -> None:
        """One step down the parameters' gradients, which are then cleared."""
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * self._schedule()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.mean.values()), [p.detach() for p in self.parameters.values()], 1 - keep
            )

    def _schedule(self) -> float:
        left = (self.steps - self.step) / max(self.decay * self.steps, 1)
        return min(1.0, (self.step + 1) / 100, left)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the parameters are their running means."""
        now = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._assign(self.mean)
        try:
            yield
        finally:
            self._assign(now)

    def keep_mean(self) -> None:
        self._assign(self.mean)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def save(self) -> None:
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"parameter.{name}"] = p.detach().contiguous()
            tensors[f"mean.{name}"] = self.mean[name].contiguous()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"{key}.{name}"] = torch.as_tensor(value).contiguous()
        _save_tensors(self.path, tensors, {"step": str(self.step)})

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            self.step = int(file.metadata()["step"])
        self._assign({name: tensors[f"parameter.{name}"] for name in self.parameters})
        self.mean = {name: tensors[f"mean.{name}"] for name in self.parameters}
        for optimizer in self.optimizers:
            of_muon = isinstance(optimizer, torch.optim.Muon)
            keys = ("momentum_buffer",) if of_muon else ("step", "exp_avg", "exp_avg_sq")
            moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, p in self.parameters.items():
                if id(p) in moved:
                    optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in keys}


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_files(path.parent, {path.name: lambda file: save_file(tensors, file, metadata)})


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Gives a list that a first Ctrl-C or SIGTERM fills; a second one does what it always does."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """One training run in one folder.

    Args:
        folder: states, sample sheets, `log.jsonl` and at the end `weights/`.
        recipe: the numbers of the run.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """

    def __init__(self, folder: str | Path, recipe: Recipe):
        self.folder, self.recipe = Path(folder), recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_recipe()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            config = AutoEncoderConfig(**VAE_SIZES, scale_factor=1.0, shift_factor=0.0)
            self.vae, self.flux = AutoEncoder(config), Flux(CONFIGS["compact"])
            initialise(self.flux)

    def _check_recipe(self) -> None:
        path = self.folder / "recipe.json"
        now = asdict(self.recipe)
        if path.exists() and (before := json.loads(path.read_text())) != now:
            different = [name for name in now if before.get(name) != now[name]]
            raise ValueError(
                f"{self.folder} holds a run of another recipe: {different[0]} is "
                f"{before.get(different[0])} there, got {now[different[0]]}"
            )
        write_files(path.parent, {path.name: lambda file: write_json(file, now)})

    def __call__(self) -> Path:
        """Goes through the stages that are not finished yet; returns the folder of the weights."""
        self.train_vae()
        self.train_text()
        self.train_flow()
        self.train_decoder()
        return self.export()

    def log(self, **values: object) -> None:
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"time": round(time.time(), 1)} | values) + "\n")

    def _fit(
        self,
        stage: str,
        optimised: Optimised,
        backward: Callable[[int], float],
        evaluate: Callable[[], dict[str, float]],
        evaluate_every: int,
    ) -> None:
        """The loop of every stage: saves the state now and then, logs, draws a sample sheet.

        `backward(step)` leaves the gradients of that step's loss in the parameters and returns it.
        """
        bar = tqdm(total=optimised.steps, initial=optimised.step, desc=stage, dynamic_ncols=True)
        saved, losses, figures = time.monotonic(), deque(maxlen=100), {}
        with bar, _asked_to_stop() as asked:
            while optimised.step < optimised.steps:
                losses.append(backward(optimised.step))
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

    def _pictures(self, count: int) -> tuple[list[Scene], np.ndarray]:
        """The first `count` training drawings: scenes and uint8 [count, 128, 128, 3]."""
        scenes, pictures = [], np.empty((count, BASE, BASE, 3), np.uint8)
        for i in tqdm(range(count), desc="drawing", dynamic_ncols=True, leave=False):
            rng = _chance(self.recipe, "pictures", i)
            scenes.append(random_scene(rng))
            pictures[i] = draw(scenes[-1], rng)
        return scenes, pictures

    # autoencoder

    def train_vae(self) -> None:
        recipe = self.recipe.vae
        optimised = Optimised(
            self.folder / "vae.safetensors",
            dict(self.vae.named_parameters()),
            recipe.learning_rate,
            recipe.steps,
            recipe.decay,
        )
        if optimised.step < recipe.steps:
            scenes, pictures = self._pictures(recipe.pictures)

        def backward(step: int) -> float:
            rng = _chance(self.recipe, "vae", step)
            x = _vae_batch(scenes, pictures, rng, step, recipe.batch_size)
            out, kl = _reconstruct(self.vae, x, _torch_chance(rng))
            loss = _difference(out, x) + recipe.kl_weight * kl
            loss.backward()
            return loss.item()

        self._fit("vae", optimised, backward, lambda: self._judge_vae("vae"), 500)

    def train_decoder(self) -> None:
        recipe, decoder = self.recipe.decoder, self.vae.decoder
        optimised = Optimised(
            self.folder / "decoder.safetensors",
            dict(decoder.named_parameters()),
            recipe.learning_rate,
            recipe.steps,
            recipe.decay,
        )
        if optimised.step < recipe.steps:
            scenes, pictures = self._pictures(recipe.pictures)

        def backward(step: int) -> float:
            x = _vae_batch(
                scenes, pictures, _chance(self.recipe, "decoder", step), step, recipe.batch_size
            )
            with torch.no_grad():
                z = self.vae.moments(x)[0]
            loss = _difference(decoder(z), x)
            loss.backward()
            return loss.item()

        self._fit("decoder", optimised, backward, lambda: self._judge_vae("decoder"), 500)

    def _judge_vae(self, stage: str) -> dict[str, float]:
        sheet = self.folder / f"{stage}.png"
        return reconstruction(self.vae, JUDGED["vae"], self.recipe.seed, sheet)

    # text

    def train_text(self) -> None:
        recipe, done = self.recipe.text, self.folder / "text" / "metrics.json"
        self.tokenizers = text.build_tokenizers(self.folder / "text")
        if done.exists():
            self.clip, self.t5 = text.load_text(self.folder / "text")
            return
        self.clip, self.t5 = text.build_encoders(self.tokenizers, self.recipe.seed)
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

    # flow

    def _latents(self) -> tuple[list[Scene], Tensor]:
        """Scenes and packed latents [N, 64, 64] of the training drawings, normalised."""
        path, count = self.folder / "latents.safetensors", self.recipe.flow.pictures
        scenes = []
        for i in range(count):
            scenes.append(random_scene(_chance(self.recipe, "pictures", i)))
        if not path.exists():
            parts = []
            for start in tqdm(range(0, count, 50), desc="encoding", dynamic_ncols=True):
                batch = []
                for i in range(start, min(start + 50, count)):
                    rng = _chance(self.recipe, "pictures", i)
                    batch.append(draw(random_scene(rng), rng))
                with torch.no_grad():
                    parts.append(self.vae.moments(to_tensor(np.stack(batch)))[0])
            z = torch.cat(parts)  # [N, 16, 16, 16]
            shift, scale = float(z.mean()), float(1 / z.std())
            metadata = {"shift_factor": str(shift), "scale_factor": str(scale)}
            _save_tensors(path, {"latents": pack((z - shift) * scale)}, metadata)
        with safe_open(path, "pt") as file:
            factors = {name: float(value) for name, value in file.metadata().items()}
            latents = file.get_tensor("latents")
        self.vae.config = AutoEncoderConfig(**VAE_SIZES, **factors)
        return scenes, latents

    def train_flow(self) -> None:
        recipe = self.recipe.flow
        optimised = Optimised(
            self.folder / "flow.safetensors",
            dict(self.flux.named_parameters()),
            recipe.learning_rate,
            recipe.steps,
            recipe.decay,
            recipe.muon_learning_rate,
        )
        scenes, latents = self._latents()
        encode = partial(text.encode, self.clip, self.t5, self.tokenizers)
        halves = _Halves(self.flux, getattr(torch, recipe.dtype), encode)

        def backward(step: int) -> float:
            rng = _chance(self.recipe, "flow", step)
            chosen = rng.integers(len(scenes), size=recipe.batch_size)
            captions = [_training_caption(scenes[i], rng, recipe.dropped_captions) for i in chosen]
            noise = _torch_chance(rng)
            x0 = latents[torch.from_numpy(chosen)]
            x1 = torch.randn(x0.shape, generator=noise)
            t = (recipe.noise_mean + torch.randn(len(chosen), generator=noise)).sigmoid()
            img = torch.lerp(x0, x1, t[:, None, None])
            return halves.backward(captions, img, t, x1 - x0)

        self._fit("flow", optimised, backward, self._judge_flow, recipe.evaluate_every)

    def _judge_flow(self) -> dict[str, float]:
        sheet = self.folder / "flow.png"
        return adherence(self.pipeline(), JUDGED["flow"], self.recipe.seed, sheet)

    # results

    def pipeline(self) -> FluxPipeline:
        encoder = TextEncoder(self.clip, self.tokenizers.clip, self.t5, self.tokenizers.t5)
        schedule = ScheduleConfig(use_dynamic_shifting=True)
        return FluxPipeline(self.flux, self.vae, encoder, schedule, default_size=BASE)

    def export(self) -> Path:
        """Writes the whole model in half precision, in diffusers' folder layout."""
        weights = self.folder / "weights"
        if not weights.exists():
            self.pipeline().to(dtype=torch.float16).save_pretrained(weights)
        return weights


class _Halves:
    """Gradients of the flow loss: each half of a batch on its own thread and copy of the model.

    At this size two threads of one core each are faster than two cores on every op.
    """

    def __init__(self, flux: Flux, dtype: torch.dtype, encode: Callable):
        self.flux, self.dtype, self.encode = flux, dtype, encode
        self.copies = [Flux(flux.config).to(dtype) for _ in range(2)]
        self.threads = ThreadPoolExecutor(len(self.copies))
        self.ids = get_img_ids(BASE, BASE), get_txt_ids(text.T5_LENGTH)

    def backward(self, captions: list[str], img: Tensor, t: Tensor, target: Tensor) -> float:
        """Leaves the gradients of the mean loss in the model's parameters; returns the loss."""
        middle = len(captions) // 2
        halves = (captions[:middle], captions[middle:])
        tensors = (tensor.tensor_split([middle]) for tensor in (img, t, target))
        with sdpa_kernel(SDPBackend.MATH):  # one core, bf16: 1.2 s a step, flash 1.4
            losses = list(self.threads.map(self._half, self.copies, halves, *tensors))
        share = [len(half) / len(captions) for half in halves]
        copies = zip(*(copy.parameters() for copy in self.copies), strict=True)
        for parameter, (first, second) in zip(self.flux.parameters(), copies, strict=True):
            parameter.grad = share[0] * first.grad.float() + share[1] * second.grad.float()
        return share[0] * losses[0] + share[1] * losses[1]

    def _half(
        self, copy: Flux, captions: list[str], img: Tensor, t: Tensor, target: Tensor
    ) -> float:
        with torch.no_grad():
            for ours, theirs in zip(copy.parameters(), self.flux.parameters(), strict=True):
                ours.copy_(theirs)
                ours.grad = None
            txt, vec = self.encode(captions)
        img, txt, t, vec = (a.to(self.dtype) for a in (img, txt, t, vec))
        velocity = copy(img, self.ids[0], txt, self.ids[1], t, vec)
        loss = F.mse_loss(velocity.float(), target)
        loss.backward()
        return loss.item()


def _reconstruct(vae: AutoEncoder, x: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Picture to latent sample and back; the KL term per latent element."""
    mean, logvar = vae.moments(x)
    out = vae.decoder(mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=noise))
    return out, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def _difference(out: Tensor, x: Tensor) -> Tensor:
    return F.l1_loss(out, x) + F.mse_loss(out, x)


def _vae_batch(
    scenes: list[Scene],
    pictures: np.ndarray,
    rng: np.random.Generator,
    step: int,
    batch_size: int,
) -> Tensor:
    """Every third step whole pictures, else crops that show the shape or a part of it."""
    if step % 3 == 2:
        return to_tensor(pictures[rng.integers(len(pictures), size=max(batch_size // 4, 1))])
    crops = []
    for i in rng.integers(len(pictures), size=batch_size):
        x, y = POSITIONS[scenes[i].position]
        left, top = (
            int(np.clip(place * BASE - CROP / 2 + rng.uniform(-24, 24), 0, BASE - CROP))
            for place in (x, y)
        )
        crops.append(pictures[i, top : top + CROP, left : left + CROP])
    return to_tensor(np.stack(crops))


def _training_caption(scene: Scene, rng: np.random.Generator, dropped: float) -> str:
    if rng.random() < dropped:
        return ""
    return caption(scene, rng, complete=rng.random() >= text.INCOMPLETE_SHARE)


def initialise(flux: Flux) -> None:
    """Xavier weights and zero gates: every block begins as the identity (adaLN-zero)."""
    for name, parameter in flux.named_parameters():
        zero = "_mod." in name or ".modulation." in name or name.startswith("final_layer.")
        if zero or name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
