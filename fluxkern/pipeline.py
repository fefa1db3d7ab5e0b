"""A prompt becomes a picture: the FLUX.1 text-to-image pipeline."""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from . import checkpoint
from ._files import new_folder, read_json, write_json
from .model import memory, sampling
from .model.adapters import Adapters
from .model.autoencoder import AutoEncoder
from .model.layers import adapters_scaled
from .model.sampling import Conditioning, Generators, ScheduleConfig, Step
from .model.text_encoder import T5_LIMIT, TextEncoder, check_texts
from .model.transformer import Flux

if TYPE_CHECKING:
    from PIL.Image import Image

COMPACT_WEIGHTS = Path(__file__).parent / "compact" / "weights"
COMPACT = {  # what comes with fluxkern; the first is for who has no reason to choose
    "compact": COMPACT_WEIGHTS,
    "compact-base": COMPACT_WEIGHTS,
    "compact-dev": COMPACT_WEIGHTS / "dev",
    "compact-schnell": COMPACT_WEIGHTS / "schnell",
}
DEFAULT_SIZE = 1024
MAX_SIZE = 8192
MAX_STEPS = 1000
MAX_IMAGES = 1000  # of a prompt
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_TENSORS = ("latents", "prompt_embeds")

Texts = str | list[str] | None


@dataclass
class FluxPipelineOutput:
    """What a pipeline returns: the pictures, one after another for each prompt."""

    images: list[Image] | np.ndarray | Tensor


@dataclass(eq=False)
class _Call:
    """A running call of a pipeline; `outer` is the one whose callback made it."""

    pipeline: FluxPipeline
    outer: _Call | None
    stop: bool = False


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)  # the innermost


def _as_a_call(method: Callable) -> Callable:
    @wraps(method)
    def called(self: FluxPipeline, *args: object, **options: object) -> object:
        call = _Call(self, _CALL.get())
        token = _CALL.set(call)
        self._calls.append(call)
        try:
            return method(self, *args, **options)
        finally:
            self._calls.remove(call)
            _CALL.reset(token)

    return called


class FluxPipeline:
    """Text to image with FLUX.1: transformer, autoencoder, two text encoders and a schedule.

    Setting `interrupt`, or diffusers' `_interrupt`, to True ends a running call after its current
    step: in a callback the call that it belongs to, elsewhere all calls that run at that moment.

    Args:
        transformer: a text-to-image Flux.
        vae: the autoencoder, 16 channels at an eighth of the size.
        text_encoder: CLIP and T5 of the widths that the transformer takes.
        schedule: spacing of the noise levels.
        default_size: height and width in pixels of a picture whose size is not given.

    Raises:
        ValueError: parts that do not fit together; names both sizes.
    """

    def __init__(
        self,
        transformer: Flux,
        vae: AutoEncoder,
        text_encoder: TextEncoder,
        schedule: ScheduleConfig,
        default_size: int = DEFAULT_SIZE,
    ) -> None:
        self.transformer = transformer.eval()
        self.vae = vae.eval()
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.default_size = default_size
        self._calls: list[_Call] = []  # those that run
        self._loras = Adapters(self._lora_parts())
        self._t5_home: torch.device | None = None  # while T5 waits on the CPU for its next prompt
        self._check_parts()

    def _check_parts(self) -> None:
        flux, vae, text = self.transformer.config, self.vae.config, self.text_encoder
        fits = {
            "the transformer's in_channels": (flux.in_channels, 4 * sampling.LATENT_CHANNELS),
            "the transformer's out_channels": (flux.out_channels, flux.in_channels),
            "the vae's z_channels": (vae.z_channels, sampling.LATENT_CHANNELS),
            "the vae's downscale": (vae.downscale, sampling.PATCH // 2),
            "CLIP's width": (text.clip.config.hidden_size, flux.vec_in_dim),
            "T5's width": (text.t5.config.d_model, flux.context_in_dim),
        }
        for name, (found, wanted) in fits.items():
            if found != wanted:
                raise ValueError(f"{name} must be {wanted}, got {found}")
        self.default_size = check_size("default_size", self.default_size)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        weights: Sequence[str | Path] = (),
        dtype: torch.dtype | Literal["int8"] | None = None,
        device: torch.device | str | None = None,
    ) -> FluxPipeline:
        """Load a diffusers folder of a FLUX.1 text-to-image model.

        Args:
            path_or_id: a folder, "org/name" on the Hugging Face hub, or one of the small models
                that come with fluxkern: "compact-base" (two passes with `true_cfg_scale`),
                "compact-dev" (one pass with `guidance_scale`), "compact-schnell" (4 steps, no
                guidance), "compact" for the first (a folder of that name is "./compact").
            revision: branch, tag or commit on the hub.
            weights: .safetensors, .sft or .gguf files that take the place of the folder's weights,
                quantised ones too (docs/on-a-cpu.md); each holds one part of the pipeline, or
                several. Configs and tokenizers are the folder's.
            dtype: floating dtype of all weights; None is bfloat16 on a GPU, where float32 asks for
                68 GB, and float32 on a CPU. "int8" holds the linear layers
                of the transformer's blocks in 8 bits, with `fluxkern.ops.linear_int8`, and of a T5
                from `weights`, whose other layers are bfloat16; all else is float32: for a CPU, and
                not to be saved.
            device: where all parts go; None is the CPU. On a GPU that has no room for T5 beside the
                others it stays on the CPU.

        Returns:
            The pipeline.

        Raises:
            ValueError: not a FLUX.1 text-to-image checkpoint, or one that breaks a rule of loading;
                a file of `weights` that holds no part, or a part that another holds; a compact
                model that is not in the package; "int8" on another device than the CPU.
        """
        device, int8 = torch.device(device or "cpu"), dtype == "int8"
        if int8 and device.type != "cpu":
            raise ValueError(f"device must be cpu where dtype is 'int8', got {device}")
        dtype = default_dtype(device) if int8 or dtype is None else dtype
        files = checkpoint.parts_in(weights)
        folder = folder_of(path_or_id, revision, tuple(files))
        checkpoint.check_model_index(folder)
        transformer = files.get("transformer", folder / "transformer")
        checkpoint.require_text_to_image(checkpoint.flux_config(transformer))
        with _no_default_device():
            text_encoder = _text_encoder(folder, files, dtype, int8)
        pipe = cls(
            checkpoint.load_flux(transformer, dtype=dtype, device=device, int8=int8),
            checkpoint.load_autoencoder(
                files.get("vae", folder / "vae"), dtype=dtype, device=device
            ),
            text_encoder,
            ScheduleConfig.from_diffusers(
                read_json(folder / "scheduler" / "scheduler_config.json")
            ),
            _default_size(read_json(folder / "vae" / "config.json")),
        )
        pipe.text_encoder.clip.to(device)
        pipe._t5_home = device
        pipe._bring_t5()
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a diffusers folder that diffusers and fluxkern load; whole or not at all.

        Args:
            folder: a new or empty folder.

        Raises:
            ValueError: `folder` is no new or empty folder, or the pipeline is in int8.
        """
        with new_folder(Path(folder)) as unfinished:
            self._write(unfinished)

    def _write(self, folder: Path) -> None:
        checkpoint.save_flux(self.transformer, folder / "transformer")
        checkpoint.save_autoencoder(self.vae, folder / "vae")
        self.text_encoder.save(folder)
        vae_config = read_json(folder / "vae" / "config.json")
        write_json(folder / "vae" / "config.json", vae_config | {"sample_size": self.default_size})
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.to_diffusers())
        write_json(folder / "model_index.json", MODEL_INDEX)

    def _lora_parts(self) -> dict[str, torch.nn.Module]:
        text = self.text_encoder
        return {
            "transformer": self.transformer,
            "text_encoder": text.clip,
            "text_encoder_2": text.t5,
        }

    def load_lora(
        self,
        path_or_id: str | Path,
        scale: float = 1.0,
        name: str | None = None,
        *,
        allow_unused: bool = False,
    ) -> checkpoint.Lora:
        """Add a LoRA to the pipeline, whole or not at all; those that it has stay as they are.

        Read are the layouts of diffusers and peft, kohya, ComfyUI, XLabs, fal, ai-toolkit,
        OneTrainer and SimpleTuner; LoRA with alpha, rsLoRA or DoRA, LoHa, LoKr, GLoRA and full
        differences. Floating-point weights are merged, in fp32 from the kept base, at no cost to
        a step; int8 weights stay and the LoRA is added to their products.

        Args:
            path_or_id: a .safetensors file, a folder that holds one, "org/name" or
                "org/name/file.safetensors" on the Hugging Face hub.
            scale: how much it counts; 0 leaves the bits of the base.
            name: for `set_loras`; None is the name of the file without its ending.
            allow_unused: a key that fits nothing in the model is listed and no error.

        Returns:
            What it changes, and what became of each of its keys.

        Raises:
            ValueError: no LoRA for this model, a key that is not used, a shape that does not fit, a
                value that is not finite, a kind that is not read, or a name that is taken.
        """
        path = checkpoint.lora_file(path_or_id)
        scale = check_finite("scale", scale)
        self._loras.parts = self._lora_parts()
        lora = checkpoint.read_lora(path, self._loras.parts, allow_unused=allow_unused)
        self._loras.add(path.stem if name is None else name, lora.updates, scale)
        return lora

    def set_loras(self, scales: dict[str, float]) -> None:
        """Set how much each loaded LoRA counts; those not named count nothing.

        Raises:
            ValueError: a name that is not loaded, or a scale that is not finite.
        """
        for name in scales:
            _check_choice("scales", name, tuple(self._loras.updates))
        checked = {name: check_finite(f"the scale of {name}", s) for name, s in scales.items()}
        self._loras.set(self._loras.updates, dict.fromkeys(self._loras.updates, 0.0) | checked)

    def unload_loras(self) -> None:
        """Take all LoRAs away; the weights have the bits that they had before."""
        self._loras.set({}, {})

    @property
    def device(self) -> torch.device:
        """Where the transformer runs, also where hooks bring its weights there."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in, however its weights are stored."""
        return self.transformer.dtype

    @property
    def interrupt(self) -> bool:
        """Whether the call that this is read in, or any where it is read outside, is to end."""
        return any(call.stop for call in self._meant())

    @interrupt.setter
    def interrupt(self, stop: bool) -> None:
        for call in self._meant():
            call.stop = bool(stop)

    _interrupt = interrupt  # the name in diffusers

    def _meant(self) -> list[_Call]:
        """The innermost of this pipeline's calls around the code that asks, else all that run."""
        call = _CALL.get()
        while call is not None and call.pipeline is not self:
            call = call.outer
        return list(self._calls) if call is None else [call]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FluxPipeline:
        """Move all parts.

        Args:
            device: where to; None leaves them.
            dtype: floating dtype to cast to; None leaves it.

        Returns:
            This pipeline.
        """
        self._t5_home = None
        self.transformer.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        return self

    def _bring_t5(self) -> None:
        """T5 comes back to its device if there is room for its weights."""
        t5, home = self.text_encoder.t5, self._t5_home
        if home is not None:
            free = memory.free_memory(home)
            if free is None or free > sum(p.nbytes for p in t5.parameters()) + memory.RESERVE:
                t5.to(home)
                self._t5_home = None

    def _make_room(self, height: int, width: int, cond: Conditioning, two_passes: bool) -> None:
        """T5 leaves a GPU that has no memory for what these pictures take beside the weights."""
        t5, (pictures, tokens) = self.text_encoder.t5, cond.txt.shape[:2]
        tokens += (height // sampling.PATCH) * (width // sampling.PATCH)
        config, passes = self.transformer.config, 1 + two_passes
        step = memory.step_bytes(config, tokens, passes * pictures, self.dtype.itemsize)
        decoding = memory.decode_bytes(height, width, pictures, self.dtype.itemsize)
        device = next(t5.parameters()).device
        free = memory.free_memory(device)
        if free is not None and free < max(step, decoding) + memory.RESERVE:
            t5.to("cpu")
            self._t5_home = device

    @torch.no_grad()
    @_as_a_call
    def __call__(
        self,
        prompt: Texts = None,
        prompt_2: Texts = None,
        *,
        negative_prompt: Texts = None,
        negative_prompt_2: Texts = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int | None = None,
        release_modulation: bool = False,
        progress: bool = True,
    ) -> FluxPipelineOutput | tuple:
        """Make pictures from prompts; the arguments mean what they mean in diffusers.

        Those of diffusers' IP-Adapter are not taken. Numbers may be numpy's.

        Two-pass guidance is on where `true_cfg_scale` is above 1. Unlike in diffusers it then needs
        no negative prompt: the empty one is taken.

        Args:
            prompt: one prompt or B of them; not together with `prompt_embeds`.
            prompt_2: what T5 reads in place of `prompt`.
            negative_prompt: what to lead away from, one for all or one for each prompt.
            negative_prompt_2: what T5 reads in place of `negative_prompt`.
            true_cfg_scale: scale of two-pass guidance; up to 1 there is one pass.
            height: pixels, a multiple of 16 up to 8192; None is the checkpoint's own.
            width: the same.
            num_inference_steps: Euler steps, 1 to 1000; not used with `sigmas`.
            sigmas: 1 to 1000 noise levels above 0 and up to 1, which the schedule shifts, in place
                of evenly spaced ones.
            guidance_scale: guidance given to a guidance-distilled model; others ignore it.
            num_images_per_prompt: pictures for each prompt, 1 to 1000.
            generator: one for the call, or a list with one for each picture.
            latents: [N, height/16 * width/16, 64] packed noise in place of drawn noise.
            prompt_embeds: [B, Lt, context] in place of `prompt`, with `pooled_prompt_embeds`.
            pooled_prompt_embeds: [B, vec].
            negative_prompt_embeds: [B, Lt, context] in place of `negative_prompt`.
            negative_pooled_prompt_embeds: [B, vec].
            output_type: "pil"; "np", fp32 [N, H, W, 3] in 0..1; "pt", [N, 3, H, W] in 0..1; or
                "latent", packed as `latents`.
            return_dict: False returns the pictures in a tuple of one.
            joint_attention_kwargs: {"scale": number} scales the LoRA adapters of peft that are in
                the transformer and the text encoders, for this call.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step; the
                tensors it returns by name replace those of the loop.
            callback_on_step_end_tensor_inputs: the names it is given, of `latents` and
                `prompt_embeds`.
            max_sequence_length: tokens T5 pads or cuts to, up to 512; None is the checkpoint's own.
            release_modulation: the modulation layers, a quarter of a FLUX.1, wait in the memory of
                the CPU while the pipeline samples, and come back for the next prompt.
            progress: show a progress bar.

        Returns:
            N = B * num_images_per_prompt pictures, those of one prompt together.

        Raises:
            ValueError: an argument out of bounds or two that do not fit together.

        Source: diffusers `FluxPipeline.__call__`.
        """
        # 1. Check the arguments
        height = check_size("height", self.default_size if height is None else height)
        width = check_size("width", self.default_size if width is None else width)
        if sigmas is not None:
            sigmas = _checked_sigmas(sigmas)
            num_inference_steps = len(sigmas)
        num_inference_steps = check_count("num_inference_steps", num_inference_steps, MAX_STEPS)
        num_images_per_prompt = check_count(
            "num_images_per_prompt", num_images_per_prompt, MAX_IMAGES
        )
        if max_sequence_length is not None:
            max_sequence_length = check_count("max_sequence_length", max_sequence_length, T5_LIMIT)
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            _check_choice("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)
        guidance_scale = check_finite("guidance_scale", guidance_scale)
        true_cfg_scale = check_finite("true_cfg_scale", true_cfg_scale)
        lora_scale = _lora_scale(joint_attention_kwargs)

        # 2. Encode the prompts
        positive = _Prompt("", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        negative = _Prompt(
            "negative_",
            negative_prompt,
            negative_prompt_2,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        if prompt is None and prompt_embeds is None:
            raise ValueError("prompt must be given where prompt_embeds is not, got neither")
        repeated = (num_images_per_prompt, max_sequence_length, lora_scale)
        cond, uncond = self._encode(positive, None, *repeated), None
        if true_cfg_scale > 1:
            uncond = self._encode(negative, cond.txt.shape[0] // num_images_per_prompt, *repeated)
        elif negative.given:
            warnings.warn(
                "negative_prompt has no effect without true_cfg_scale above 1, "
                f"got {true_cfg_scale}",
                stacklevel=4,
            )

        self._make_room(height, width, cond, uncond is not None)

        # 3. Draw the noise
        pictures = cond.txt.shape[0]
        img_ids = sampling.get_img_ids(height, width, self.device)
        if latents is None:
            noise = sampling.get_noise(pictures, height, width, self.dtype, generator, self.device)
            latents = sampling.pack(noise)
        _check_shape(
            "latents", latents, (pictures, len(img_ids), self.transformer.config.in_channels)
        )
        latents = latents.to(self.device, self.dtype)

        # 4. Space the noise levels
        levels = sampling.get_schedule(num_inference_steps, len(img_ids), self.schedule, sigmas)

        # 5. Denoise
        call = _CALL.get()
        with (
            adapters_scaled(lora_scale, self.transformer),
            _progress_bar(num_inference_steps, progress) as bar,
        ):

            def on_step(step: Step) -> None:
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, step)
                step.stop = call.stop
                bar.update()

            if not call.stop:
                embedded = self.transformer.config.guidance_embed
                latents = sampling.denoise(
                    self.transformer,
                    latents,
                    img_ids,
                    cond,
                    levels,
                    guidance_scale=guidance_scale if embedded else None,
                    uncond=uncond,
                    true_cfg_scale=true_cfg_scale,
                    release_modulation=release_modulation,
                    on_step=on_step,
                )

        # 6. Decode
        if output_type == "latent":
            images = latents
        else:
            z = sampling.unpack(latents, height, width).to(self.vae.device, self.vae.dtype)
            images = _to_output(self.vae.decode(z), output_type)
        return FluxPipelineOutput(images) if return_dict else (images,)

    def _encode(
        self,
        prompt: _Prompt,
        batch: int | None,
        images: int,
        length: int | None,
        lora_scale: float,
    ) -> Conditioning:
        """Encode B prompts, or take their embeddings, and repeat each for its pictures."""
        prompt.check()
        if prompt.embeds is not None:
            txt, vec = prompt.embeds, prompt.pooled
        else:
            texts, texts_2 = prompt.texts(batch)
            self._bring_t5()
            encoders = self.text_encoder.clip, self.text_encoder.t5
            with _no_default_device(), adapters_scaled(lora_scale, *encoders):
                txt, vec = self.text_encoder.encode(texts, texts_2, length)
        config = self.transformer.config
        batch = txt.shape[0] if batch is None else batch
        tokens = txt.shape[1] if txt.ndim > 1 else None
        _check_shape(f"{prompt.prefix}prompt_embeds", txt, (batch, tokens, config.context_in_dim))
        _check_shape(f"{prompt.prefix}pooled_prompt_embeds", vec, (batch, config.vec_in_dim))
        txt, vec = (x.to(self.device, self.dtype).repeat_interleave(images, 0) for x in (txt, vec))
        return Conditioning(txt, vec)

    def _call_back(self, callback: Callable[..., Any], names: Any, step: Step) -> None:
        tensors = {"latents": step.img, "prompt_embeds": step.cond.txt}
        changed = callback(self, step.index, step.timestep, {name: tensors[name] for name in names})
        tensors |= changed or {}
        step.img = tensors["latents"]
        if tensors["prompt_embeds"] is not step.cond.txt:
            step.cond = Conditioning(tensors["prompt_embeds"], step.cond.vec)


@dataclass(frozen=True)
class _Prompt:
    """The four ways to say a prompt; `prefix` is "" or "negative_"."""

    prefix: str
    prompt: Texts
    prompt_2: Texts
    embeds: Tensor | None
    pooled: Tensor | None

    @property
    def given(self) -> bool:
        return any(x is not None for x in (self.prompt, self.prompt_2, self.embeds, self.pooled))

    def check(self) -> None:
        text, embeds = f"{self.prefix}prompt", f"{self.prefix}prompt_embeds"
        pooled = f"{self.prefix}pooled_prompt_embeds"
        if (self.embeds is None) != (self.pooled is None):
            raise ValueError(f"{embeds} and {pooled} must be given together, got one")
        if self.embeds is not None:
            for name, value in ((text, self.prompt), (f"{text}_2", self.prompt_2)):
                if value is not None:
                    raise ValueError(f"{name} must not be given with {embeds}, got both")

    def texts(self, batch: int | None) -> tuple[list[str], list[str]]:
        """The texts for CLIP and for T5, `batch` of each; one text stands for all."""
        prompt = _as_list(f"{self.prefix}prompt", "" if self.prompt is None else self.prompt)
        prompt_2 = prompt
        if self.prompt_2 is not None:
            prompt_2 = _as_list(f"{self.prefix}prompt_2", self.prompt_2)
        batch = len(prompt) if batch is None else batch
        for name, texts in ((f"{self.prefix}prompt", prompt), (f"{self.prefix}prompt_2", prompt_2)):
            if len(texts) not in (1, batch):
                raise ValueError(f"{name} must be 1 or {batch} texts, got {len(texts)}")
        return prompt * (batch // len(prompt)), prompt_2 * (batch // len(prompt_2))


def _as_list(name: str, texts: str | list[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    check_texts(name, texts)
    return texts


def folder_of(
    path_or_id: str | Path, revision: str | None = None, replaced: tuple[str, ...] = ()
) -> Path:
    """The local folder of what `from_pretrained` loads; a ValueError where there is none.

    Args:
        replaced: components whose weights are not fetched.
    """
    if path_or_id not in COMPACT:
        return checkpoint.resolve(path_or_id, revision, checkpoint.component_files(replaced))
    folder = COMPACT[str(path_or_id)]
    if not folder.is_dir():
        raise ValueError(f"{path_or_id} is not in this package: there is no {folder}")
    return folder


def check_size(name: str, pixels: SupportsIndex) -> int:
    """A height or width; refuses what no picture can have."""
    number = _whole(pixels)
    if number is None or not 0 < number <= MAX_SIZE or number % sampling.PATCH:
        raise ValueError(
            f"{name} must be a multiple of {sampling.PATCH} from {sampling.PATCH} to {MAX_SIZE}, "
            f"got {pixels!r:.80}"
        )
    return number


def check_count(name: str, count: SupportsIndex, most: int | None) -> int:
    """A whole number from 1 to `most`; refuses any other."""
    number = _whole(count)
    if number is None or number < 1 or (most is not None and number > most):
        bounds = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name} must be a whole number {bounds}, got {count!r:.80}")
    return number


def _whole(value: object) -> int | None:
    """An int or what stands for one, as numpy's integers do."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be of {', '.join(choices)}, got {value!r:.80}")


def check_finite(name: str, value: SupportsFloat) -> float:
    """A finite number, or what stands for one as numpy's do; refuses any other."""
    try:
        number = float(value) if hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    return number


def _checked_sigmas(sigmas: Sequence[float]) -> list[float]:
    check_count("the number of sigmas", len(sigmas), MAX_STEPS)
    levels = [check_finite("sigmas", sigma) for sigma in sigmas]
    for level in levels:
        if not 0 < level <= 1:
            raise ValueError(f"sigmas must be above 0 and up to 1, got {level}")
    return levels


def _lora_scale(kwargs: dict[str, Any] | None) -> float:
    for name in kwargs or {}:
        _check_choice("joint_attention_kwargs", name, ("scale",))
    return check_finite("joint_attention_kwargs: scale", (kwargs or {}).get("scale", 1.0))


def _check_shape(name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Of weights where none is named."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _text_encoder(
    folder: Path, files: dict[str, Path], dtype: torch.dtype, int8: bool
) -> TextEncoder:
    options = {"dtype": dtype, "device": "cpu"}
    clip = t5 = None
    if "text_encoder" in files:
        clip = checkpoint.load_clip(files["text_encoder"], folder / "text_encoder", **options)
    if "text_encoder_2" in files:
        own = options | ({"dtype": torch.bfloat16, "int8": True} if int8 else {})
        t5 = checkpoint.load_t5(files["text_encoder_2"], folder / "text_encoder_2", **own)
    return TextEncoder.from_folder(folder, **options, clip=clip, t5=t5)


def _default_size(vae_config: dict[str, Any]) -> int:
    """FLUX.1 folders keep the size a checkpoint was made for in the autoencoder's config."""
    size = vae_config.get("sample_size", DEFAULT_SIZE)
    check_size("vae/config.json: sample_size", size)
    return size


def _no_default_device() -> torch.device:
    """Tokenizers and encoders of transformers make tensors where torch.set_default_device says."""
    return torch.device("cpu")


def _progress_bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not shown, unit="step")


def _to_output(x: Tensor, output_type: str) -> list[Image] | np.ndarray | Tensor:
    """Turn decoded pictures, [N, 3, H, W] in -1..1, into what was asked for."""
    from PIL import Image

    if not x.isfinite().all():
        warnings.warn("the picture has values that are not finite: shown black", stacklevel=5)
        x = x.nan_to_num(nan=-1.0)
    x = (x * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    array = x.permute(0, 2, 3, 1).float().cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]


PIPELINE_FILES = re.compile(  # those of the parts and of their kinds, below its folder
    r"model_index\.json|README\.md|scheduler/scheduler_config\.json"
    r"|(transformer|vae|text_encoder(_2)?)/(config\.json|(diffusion_pytorch_)?model"
    r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?)"
    r"|tokenizer(_2)?/(tokenizer|tokenizer_config|vocab|special_tokens_map|added_tokens)\.json"
    r"|tokenizer(_2)?/(merges\.txt|spiece\.model)"
)
MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
