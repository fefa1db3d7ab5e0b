"""Training of the compact FLUX, from nothing to a folder that `FluxPipeline` loads.

Stages: vae, text, flow, decoder. Each writes its state to the run's folder as it goes; started
again in the same folder, training goes on where it stopped. All chance is drawn from (seed, stage,
step), so a run that was stopped and resumed is the run that was not.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..model.autoencoder import AutoEncoder, AutoEncoderConfig
from ..model.sampling import (
    ScheduleConfig,
    get_img_ids,
    get_txt_ids,
    pack,
    shift_mu,
    time_shift,
)
from ..model.text_encoder import TextEncoder
from ..model.transformer import CONFIGS, Flux
from ..pipeline import FluxPipeline
from . import text
from .drawings import BASE, POSITIONS, Scene, caption, draw, random_scene
from .judge import judge, matches

RECIPE = Path(__file__).parent / "recipe.toml"
CROP = 64  # px
SAVE_EVERY = 120.0  # seconds between saved states
SAMPLES = 64  # pictures of a sample sheet
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # parameters are fp32 in both
VAE_SIZES = {"ch": 16, "ch_mult": (1, 1, 2, 4), "num_res_blocks": 1, "norm_num_groups": 2}


@dataclass(frozen=True)
class VaeRecipe:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float
    kl_weight: float


@dataclass(frozen=True)
class TextRecipe:
    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class FlowRecipe:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float
    dropped_captions: float
    evaluate_every: int
    dtype: str


@dataclass(frozen=True)
class DecoderRecipe:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run, as read from a TOML file of the same layout."""

    seed: int
    vae: VaeRecipe
    text: TextRecipe
    flow: FlowRecipe
    decoder: DecoderRecipe

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Reads a recipe.

        Raises:
            ValueError: not TOML, or a field that is missing, unknown or of the wrong type.
        """
        try:
            data = tomllib.loads(Path(path).read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a TOML file: {error}") from None
        stages = {
            "vae": VaeRecipe,
            "text": TextRecipe,
            "flow": FlowRecipe,
            "decoder": DecoderRecipe,
        }
        _check_names(path, data, {"seed", *stages})
        parts = {name: _stage(path, name, data[name], kind) for name, kind in stages.items()}
        return cls(seed=_value(path, "seed", data["seed"], int), **parts)


def _check_names(where: object, data: object, names: set[str]) -> None:
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{where} must hold {sorted(names)}, got {found}")


def _value(where: object, name: str, value: object, kind: type) -> int | float | str:
    if kind is str:
        if value not in DTYPES:
            raise ValueError(f"{where}: {name} must be one of {sorted(DTYPES)}, got {value!r}")
        return value
    good = isinstance(value, int | float) if kind is float else isinstance(value, int)
    if not good or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where}: {name} must be {kind.__name__} >= 0, got {value!r}")
    return kind(value)


def _stage(path: object, stage: str, data: dict, kind: type) -> object:
    where = f"{path}, [{stage}]"
    _check_names(where, data, {field.name for field in fields(kind)})
    types = {"int": int, "float": float, "str": str}
    return kind(
        **{f.name: _value(where, f.name, data[f.name], types[f.type]) for f in fields(kind)}
    )


STAGES = {
    name: number for number, name in enumerate(("pictures", "vae", "text", "flow", "decoder"))
}


def _chance(recipe: Recipe, stage: str, step: int) -> np.random.Generator:
    return np.random.default_rng((recipe.seed, STAGES[stage], step))


def _torch_chance(rng: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(rng.integers(2**62)))


@dataclass
class Optimised:
    """Parameters under training with AdamW, their running mean, and where their state is kept."""

    path: Path
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    steps: int
    decay: float

    def __post_init__(self) -> None:
        self.step = 0
        self.mean = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        if self.path.exists():
            self._load()

    def update(self) -> None:
        """One step down the parameters' gradients, which are then cleared."""
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad()
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
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value).contiguous()
        _save_tensors(self.path, tensors, {"step": str(self.step)})

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            self.step = int(file.metadata()["step"])
        self._assign({name: tensors[f"parameter.{name}"] for name in self.parameters})
        self.mean = {name: tensors[f"mean.{name}"] for name in self.parameters}
        keys = ("step", "exp_avg", "exp_avg_sq")
        for name, p in self.parameters.items():
            self.optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in keys}


def _save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file(tensors, unfinished, metadata)
    os.replace(unfinished, path)


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
        torch.manual_seed(recipe.seed)
        self.vae = AutoEncoder(AutoEncoderConfig(**VAE_SIZES, scale_factor=1.0, shift_factor=0.0))
        self.flux = Flux(CONFIGS["compact"])
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
        path.write_text(json.dumps(now, indent=2) + "\n")

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
        saved, recent, figures = time.monotonic(), [], {}
        while optimised.step < optimised.steps:
            recent.append(backward(optimised.step))
            optimised.update()
            bar.update()
            if optimised.step % evaluate_every == 0 or optimised.step == optimised.steps:
                with optimised.averaged(), torch.no_grad():
                    figures = evaluate()
                self.log(stage=stage, step=optimised.step, loss=_mean(recent), **figures)
            if optimised.step % 20 == 0:
                bar.set_postfix(loss=f"{_mean(recent[-100:]):.4f}", **figures)
            if time.monotonic() - saved > SAVE_EVERY or optimised.step == optimised.steps:
                optimised.save()
                saved, recent = time.monotonic(), recent[-100:]
        bar.close()
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

    def _judge_vae(self, stage: str, count: int = 200) -> dict[str, float]:
        """Reconstructions of drawings that training never shows: share judged right, and PSNR."""
        rng = np.random.default_rng((self.recipe.seed, 99))
        scenes = [random_scene(rng, held_out=i % 2 == 1) for i in range(count)]
        right, small, psnr, shown = [], [], [], []
        for scene in scenes:
            x = draw(scene, rng)
            mean = self.vae.moments(_to_tensor(x[None]))[0]
            z = (mean - self.vae.config.shift_factor) * self.vae.config.scale_factor
            y = _to_pictures(self.vae.decode(z))[0]
            good = matches(judge(y), scene)
            right.append(good)
            small += [good] if scene.size == "small" else []
            error = np.mean((x.astype(np.float64) - y) ** 2)
            psnr.append(10 * np.log10(255**2 / max(error, 1e-9)))
            shown += [x, y] if len(shown) < 64 else []
        _sheet(np.stack(shown), self.folder / f"{stage}.png")
        return {"right": _mean(right), "small": _mean(small), "psnr": _mean(psnr)}

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
        done.write_text(json.dumps(metrics, indent=2) + "\n")
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
                    parts.append(self.vae.moments(_to_tensor(np.stack(batch)))[0])
            mean = torch.cat(parts)
            shift, scale = float(mean.mean()), float(1 / mean.std())
            metadata = {"shift_factor": str(shift), "scale_factor": str(scale)}
            _save_tensors(path, {"latents": pack((mean - shift) * scale)}, metadata)
        with safe_open(path, "pt") as file:
            factors = {name: float(value) for name, value in file.metadata().items()}
            latents = file.get_tensor("latents")
        object.__setattr__(self.vae, "config", AutoEncoderConfig(**VAE_SIZES, **factors))
        return scenes, latents

    def train_flow(self) -> None:
        recipe = self.recipe.flow
        optimised = Optimised(
            self.folder / "flow.safetensors",
            dict(self.flux.named_parameters()),
            recipe.learning_rate,
            recipe.steps,
            recipe.decay,
        )
        scenes, latents = self._latents()
        encode = partial(text.encode, self.clip, self.t5, self.tokenizers)
        halves = _Halves(self.flux, DTYPES[recipe.dtype], encode)
        mu = shift_mu(latents.shape[1])

        def backward(step: int) -> float:
            rng = _chance(self.recipe, "flow", step)
            chosen = rng.integers(len(scenes), size=recipe.batch_size)
            captions = [_training_caption(scenes[i], rng, recipe.dropped_captions) for i in chosen]
            noise = _torch_chance(rng)
            x0 = latents[torch.from_numpy(chosen)]
            x1 = torch.randn(x0.shape, generator=noise)
            t = time_shift(mu, torch.randn(len(chosen), generator=noise).sigmoid())
            img = torch.lerp(x0, x1, t[:, None, None])
            return halves.backward(captions, img, t, x1 - x0)

        self._fit("flow", optimised, backward, self._judge_flow, recipe.evaluate_every)

    def _judge_flow(self) -> dict[str, float]:
        """Pictures of prompts that were never seen, half of them held-out triples, at CFG 3."""
        return adherence(self.pipeline(), SAMPLES, self.recipe.seed, self.folder / "flow.png")

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
        with sdpa_kernel(SDPBackend.MATH):  # in bf16 at this size 10 times the flash kernel
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
        return _to_tensor(pictures[rng.integers(len(pictures), size=max(batch_size // 4, 1))])
    crops = []
    for i in rng.integers(len(pictures), size=batch_size):
        x, y = POSITIONS[scenes[i].position]
        left, top = (
            int(np.clip(place * BASE - CROP / 2 + rng.uniform(-24, 24), 0, BASE - CROP))
            for place in (x, y)
        )
        crops.append(pictures[i, top : top + CROP, left : left + CROP])
    return _to_tensor(np.stack(crops))


def _training_caption(scene: Scene, rng: np.random.Generator, dropped: float) -> str:
    if rng.random() < dropped:
        return ""
    return caption(scene, rng, complete=rng.random() >= text.INCOMPLETE_SHARE)


def adherence(
    pipe: FluxPipeline,
    count: int,
    seed: int,
    sheet: Path | None = None,
    *,
    steps: int = 16,
    true_cfg_scale: float = 3.0,
) -> dict[str, float]:
    """How often the judge finds in a picture what its prompt asked for.

    Args:
        pipe: the compact pipeline.
        count: pictures; every second prompt is of a triple that training never shows.
        seed: of prompts and noise.
        sheet: where a PNG of the pictures goes, if anywhere.
        steps: of sampling.
        true_cfg_scale: of classifier-free guidance.

    Returns:
        Shares of pictures with the right shape, colour, background, size, position; `all` is shape,
        colour and background together, `seen` and `held_out` the same by kind of prompt.
    """
    rng = np.random.default_rng((seed, 98))
    scenes = [random_scene(rng, held_out=i % 2 == 1) for i in range(count)]
    prompts = [caption(scene, rng) for scene in scenes]
    pictures = []
    for start in range(0, count, 32):
        part = prompts[start : start + 32]
        pictures += list(
            pipe(
                part,
                true_cfg_scale=true_cfg_scale,
                negative_prompt=[""] * len(part) if true_cfg_scale > 1 else None,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
                output_type="np",
                progress=False,
            ).images
        )
    pictures = (np.stack(pictures) * 255).round().astype(np.uint8)
    if sheet is not None:
        _sheet(pictures, sheet)
    verdicts = [judge(picture) for picture in pictures]
    pairs = list(zip(verdicts, scenes, strict=True))
    figures = {
        name: _mean([matches(v, s, (name,)) for v, s in pairs])
        for name in ("shape", "colour", "background", "size", "position")
    }
    right = [matches(v, s) for v, s in pairs]
    return figures | {
        "all": _mean(right),
        "seen": _mean(right[::2]),
        "held_out": _mean(right[1::2]),
    }


def initialise(flux: Flux) -> None:
    """Xavier weights and zero gates: every block begins as the identity (adaLN-zero)."""
    for name, parameter in flux.named_parameters():
        zero = "_mod." in name or ".modulation." in name or name.startswith("final_layer.")
        if zero or name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)


def _to_tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W]


def _to_pictures(x: Tensor) -> np.ndarray:
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round()
    return x.permute(0, 2, 3, 1).to(torch.uint8).numpy()  # [B, H, W, 3]


def _sheet(pictures: np.ndarray, path: Path, columns: int = 8) -> None:
    rows = -(-len(pictures) // columns)
    side = pictures.shape[1] + 2
    sheet = np.full((rows * side, columns * side, 3), 128, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * side, i % columns * side
        sheet[top : top + side - 2, left : left + side - 2] = picture
    unfinished = path.with_name(f".{path.name}")
    Image.fromarray(sheet).save(unfinished, format="PNG")
    os.replace(unfinished, path)


def _mean(values: list) -> float:
    return round(float(np.mean(values)), 4) if len(values) else 0.0
