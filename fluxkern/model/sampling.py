"""From noise to latents: noise, packing, position ids, the schedule and the Euler loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .._modules import hooked
from .step_graph import StepGraphs
from .transformer import Workspace

LATENT_CHANNELS = 16
PATCH = 16  # pixels along a side of one image token: 8 of the VAE times 2 of packing

Generators = torch.Generator | list[torch.Generator] | None


def get_noise(
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    generator: Generators = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the latents a picture starts from.

    The numbers are drawn in `dtype` on the generator's own device and moved afterwards, so dtype
    and device of the generator are part of what a seed means.

    Args:
        batch: number of pictures.
        height: picture height in pixels.
        width: picture width in pixels.
        dtype: dtype the noise is drawn in.
        generator: one generator for the whole batch, one for each picture, or None for torch's own.
        device: where the result is wanted, and drawn when `generator` is None.

    Returns:
        [B, 16, 2*ceil(H/16), 2*ceil(W/16)] in `dtype` on `device`.

    Raises:
        ValueError: as many generators as pictures were not given.

    Source: BFL flux `get_noise`; diffusers `randn_tensor`.
    """
    shape = (LATENT_CHANNELS, 2 * math.ceil(height / PATCH), 2 * math.ceil(width / PATCH))
    if isinstance(generator, list):
        if len(generator) != batch:
            raise ValueError(f"generator: {len(generator)} given for {batch} pictures")
        return torch.cat([_randn((1, *shape), dtype, one, device) for one in generator])
    return _randn((batch, *shape), dtype, generator, device)


def _randn(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator | None,
    device: torch.device | str,
) -> Tensor:
    drawn_on = device if generator is None else generator.device
    return torch.randn(shape, dtype=dtype, generator=generator, device=drawn_on).to(device)


def pack(latent: Tensor) -> Tensor:
    """Turn 2x2 patches of a latent picture into tokens.

    `b c (h 2) (w 2) -> b (h w) (c 2 2)`

    Args:
        latent: [B, C, H, W], H and W even, any strides.

    Returns:
        [B, (H/2)(W/2), 4C], channels outermost in a token.

    Raises:
        ValueError: H or W is odd.

    Source: BFL flux `prepare`.
    """
    batch, channels, height, width = latent.shape
    if height % 2 or width % 2:
        raise ValueError(f"latent height and width must be even, got {height} and {width}")
    patches = latent.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


def unpack(img: Tensor, height: int, width: int) -> Tensor:
    """Turn tokens back into a latent picture, the inverse of `pack`.

    Args:
        img: [B, L, 4C] with L = ceil(height/16) * ceil(width/16).
        height: picture height in pixels.
        width: picture width in pixels.

    Returns:
        [B, C, 2*ceil(height/16), 2*ceil(width/16)].

    Raises:
        ValueError: L does not belong to this height and width.

    Source: BFL flux `unpack`.
    """
    batch, tokens, channels = img.shape
    rows, columns = math.ceil(height / PATCH), math.ceil(width / PATCH)
    if tokens != rows * columns:
        raise ValueError(f"img: {tokens} tokens, but {height}x{width} pixels have {rows * columns}")
    patches = img.reshape(batch, rows, columns, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * rows, 2 * columns)


def get_img_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Give each image token its place: (0, row, column) on the packed grid.

    Args:
        height: picture height in pixels.
        width: picture width in pixels.
        device: where the ids are made.

    Returns:
        fp32 [ceil(height/16) * ceil(width/16), 3].

    Source: BFL flux `prepare`.
    """
    rows = torch.arange(math.ceil(height / PATCH), dtype=torch.float32, device=device)
    columns = torch.arange(math.ceil(width / PATCH), dtype=torch.float32, device=device)
    places = torch.cartesian_prod(rows, columns)
    return torch.nn.functional.pad(places, (1, 0))


def get_txt_ids(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Give each text token its place, which is the origin.

    Args:
        length: number of text tokens.
        device: where the ids are made.

    Returns:
        fp32 zeros [length, 3].

    Source: BFL flux `prepare`.
    """
    return torch.zeros(length, 3, dtype=torch.float32, device=device)


_HARMLESS_SCHEDULER_KEYS = {
    "_class_name",
    "_diffusers_version",
    "num_train_timesteps",
    "time_shift_type",
}
_SWITCHED_OFF = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)


@dataclass(frozen=True)
class ScheduleConfig:
    """How the noise levels of a model are spaced: `scheduler_config.json` of a diffusers folder.

    With `use_dynamic_shifting` the shift grows with the number of image tokens and `shift` is not
    used; without, `shift` is a constant factor and 1 leaves the even spacing.
    """

    use_dynamic_shifting: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self) -> None:
        if not isinstance(self.use_dynamic_shifting, bool):
            raise ValueError(
                f"use_dynamic_shifting must be true or false, got {self.use_dynamic_shifting!r}"
            )
        for name in ("shift", "base_shift", "max_shift"):
            _check_number(name, getattr(self, name))
        if self.shift <= 0:
            raise ValueError(f"shift must be above 0, got {self.shift}")
        for name in ("base_image_seq_len", "max_image_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len must differ from max_image_seq_len, "
                f"both are {self.base_image_seq_len}"
            )

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> ScheduleConfig:
        """Read the settings of diffusers' FlowMatchEulerDiscreteScheduler.

        Args:
            config: the parsed `scheduler_config.json`; what it leaves out has diffusers' default.

        Returns:
            The schedule.

        Raises:
            ValueError: another scheduler, a setting FLUX.1 does not use, an unknown key or a value
                out of bounds.
        """
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"scheduler must be FlowMatchEulerDiscreteScheduler, got {str(name)[:80]!r}"
            )
        for key in _SWITCHED_OFF:
            if config.get(key):
                raise ValueError(f"scheduler: {key} must be off, got {str(config[key])[:80]!r}")
        kind = config.get("time_shift_type", "exponential")
        if kind != "exponential":
            raise ValueError(
                f"scheduler: time_shift_type must be 'exponential', got {str(kind)[:80]!r}"
            )
        if config.get("num_train_timesteps", 1000) != 1000:
            raise ValueError(
                f"scheduler: num_train_timesteps must be 1000, "
                f"got {str(config['num_train_timesteps'])[:80]}"
            )
        own = {field.name for field in fields(cls)}
        unknown = sorted(config.keys() - own - _HARMLESS_SCHEDULER_KEYS - set(_SWITCHED_OFF))
        if unknown:
            raise ValueError(f"scheduler: unknown key {unknown[0][:80]!r}")
        defaults = {"use_dynamic_shifting": False, "shift": 1.0}
        return cls(**(defaults | {key: config[key] for key in own & config.keys()}))

    def to_diffusers(self) -> dict[str, Any]:
        """Write the settings as diffusers' FlowMatchEulerDiscreteScheduler reads them.

        Returns:
            The content of `scheduler_config.json`.
        """
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            **asdict(self),
        }


def _check_number(name: str, value: object) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 100:
        raise ValueError(f"{name} must be a number between -100 and 100, got {str(value)[:80]!r}")


def shift_mu(image_seq_len: int, config: ScheduleConfig | None = None) -> float:
    """Read the shift for a number of image tokens off the line through the config's two points.

    `mu = base_shift + (L - base_len) (max_shift - base_shift) / (max_len - base_len)`

    Args:
        image_seq_len: number L of image tokens.
        config: the two points; None has FLUX.1's, (256, 0.5) and (4096, 1.15).

    Returns:
        mu.

    Source: BFL flux `get_lin_function`.
    """
    config = config or ScheduleConfig()
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return image_seq_len * slope + (config.base_shift - slope * config.base_image_seq_len)


def time_shift(mu: float, t: Tensor) -> Tensor:
    """Move times towards the noise.

    `t' = e^mu / (e^mu + 1/t - 1)`

    Args:
        mu: strength; 0 changes nothing.
        t: times in (0, 1], any shape.

    Returns:
        Shifted times in the dtype of `t`.

    Source: BFL flux `time_shift` with sigma 1.
    """
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def get_schedule(
    num_steps: int,
    image_seq_len: int,
    config: ScheduleConfig | None = None,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """List the noise levels a picture passes through, from 1 to 0.

    `num_steps` evenly spaced levels from 1 to 1/num_steps, shifted as `config` says, then 0.

    Args:
        num_steps: number N of steps.
        image_seq_len: number of image tokens.
        config: the shift; None has FLUX.1 [dev]'s.
        sigmas: N levels of one's own in place of the even ones, shifted likewise.

    Returns:
        fp32 [N + 1] on the CPU.

    Raises:
        ValueError: `num_steps` is not positive.

    Source: diffusers `FlowMatchEulerDiscreteScheduler.set_timesteps` as FluxPipeline calls it.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    config = config or ScheduleConfig()
    if sigmas is None:
        t = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64, device="cpu").float()
    else:
        t = torch.tensor(sigmas, dtype=torch.float32, device="cpu")
    if config.use_dynamic_shifting:
        t = time_shift(shift_mu(image_seq_len, config), t)
    else:
        t = config.shift * t / (1 + (config.shift - 1) * t)
    return torch.cat([t, t.new_zeros(1)])


def model_time(sigma: Tensor, like: Tensor) -> Tensor:
    """Form the time that the model is given at a noise level, rounded as diffusers rounds it.

    `t = dtype(1000 sigma) / 1000`

    Args:
        sigma: fp32 scalar.
        like: [B, ...], whose batch, dtype and device the result has.

    Returns:
        [B].

    Source: diffusers `FluxPipeline.__call__`.
    """
    return (sigma * 1000).to(like.device, like.dtype).expand(like.shape[0]) / 1000


def euler_step(img: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Follow the velocity from one noise level to the next.

    `img + (sigma_next - sigma) * velocity`, in fp32

    Args:
        img: [B, L, C].
        velocity: [B, L, C].
        sigma: fp32 scalar, the level of `img`.
        sigma_next: fp32 scalar, the level of the result.

    Returns:
        [B, L, C] in the dtype of `velocity`.

    Source: diffusers `FlowMatchEulerDiscreteScheduler.step`.
    """
    width = (sigma_next - sigma).to(velocity.dtype)  # stays on the host: a copy waits for the GPU
    moved = img.float() + width * velocity
    return moved.to(velocity.dtype)


def combine_cfg(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Lead away from the negative prompt.

    `uncond + scale * (cond - uncond)`

    Args:
        cond: velocity for the prompt, any shape.
        uncond: velocity for the negative prompt, the same shape.
        scale: 1 gives `cond`; a number, or a tensor that broadcasts, like [B, 1, 1].

    Returns:
        The combined velocity.

    Source: classifier-free diffusion guidance (Ho and Salimans, 2022).
    """
    return uncond + scale * (cond - uncond)


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say of a batch: txt [B, Lt, context], vec [B, vec]."""

    txt: Tensor
    vec: Tensor


@dataclass
class Step:
    """One finished Euler step; who is shown it may change `img` and `cond`, or stop the loop."""

    index: int
    timestep: Tensor  # 1000 sigma, as diffusers counts
    img: Tensor
    cond: Conditioning
    stop: bool = False


class _Pass:
    """One call of the model a step: its prompts, and what every step needs of the model ahead."""

    def __init__(
        self,
        model: torch.nn.Module,
        img: Tensor,
        img_ids: Tensor,
        text: Conditioning,
        sigmas: Tensor,
        guidance_scale: float | None,
    ) -> None:
        self.model, self.text, self.guidance = model, text, None
        batch = text.txt.shape[0]
        if guidance_scale is not None:
            self.guidance = torch.full(
                (batch,), guidance_scale, dtype=torch.float32, device=img.device
            )
        self.ids = img_ids, get_txt_ids(text.txt.shape[1], img.device)
        times = torch.stack([model_time(sigma, img[:1]) for sigma in sigmas[:-1]])
        self.times = times.expand(-1, batch)  # [S, B]
        self.workspaces: list[Workspace | None] = [None] * len(self.times)
        if not hooked(model):  # a hook may bring the weights when the model is called
            self.workspaces = model.workspaces(*self.ids, self.times, text.vec, self.guidance)

    def velocity(self, img: Tensor, index: int, graphs: StepGraphs) -> Tensor:
        img = img.repeat(self.text.txt.shape[0] // img.shape[0], 1, 1)
        img_ids, txt_ids = self.ids

        def step(img: Tensor, txt: Tensor, workspace: Workspace | None) -> Tensor:
            args = (img, img_ids, txt, txt_ids, self.times[index], self.text.vec, self.guidance)
            return self.model(*args, workspace)

        return graphs.run(step, img, self.text.txt, self.workspaces[index])


def _passes(cond: Conditioning, uncond: Conditioning | None) -> list[Conditioning]:
    """Prompts and negative prompts in one batch where their lengths agree, else one by one."""
    if uncond is None:
        return [cond]
    if cond.txt.shape != uncond.txt.shape:
        return [cond, uncond]
    return [Conditioning(torch.cat((cond.txt, uncond.txt)), torch.cat((cond.vec, uncond.vec)))]


def denoise(
    model: torch.nn.Module,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    sigmas: Tensor,
    *,
    guidance_scale: float | None = None,
    uncond: Conditioning | None = None,
    true_cfg_scale: float = 1.0,
    release_modulation: bool = False,
    cuda_graph: bool | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Turn noise into packed latents by Euler steps along the model's velocity.

    What depends on the prompts and the noise levels alone, the modulation above all, is computed
    for all steps before the first.

    Args:
        model: a Flux.
        img: [B, L, C] packed noise.
        img_ids: fp32 [L, 3].
        cond: the prompts, B of them.
        sigmas: fp32 [N + 1] falling noise levels, those of `get_schedule`.
        guidance_scale: embedded guidance; None for a model that has no such input.
        uncond: the negative prompts, B of them; None for the prompts alone.
        true_cfg_scale: scale of the two velocities; not used without `uncond`.
        release_modulation: the modulation layers wait in the memory of the CPU while it samples.
        cuda_graph: whether steps after the first are replayed as a CUDA graph, which lives for this
            call and calls no hooks of modules; None does so on a GPU at sizes where it gains.
        on_step: called after each step.

    Returns:
        [B, L, C] packed latents.

    Source: BFL flux `denoise`; diffusers `FluxPipeline.__call__`.
    """

    def prepared(cond: Conditioning) -> list[_Pass]:
        model.modulation_to(img.device)
        passes = [
            _Pass(model, img, img_ids, text, sigmas, guidance_scale)
            for text in _passes(cond, uncond)
        ]
        if release_modulation:
            model.modulation_to("cpu")
        return passes

    passes, graphs = prepared(cond), StepGraphs(model, cuda_graph)
    for index, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        flow = torch.cat([one.velocity(img, index, graphs) for one in passes])
        if uncond is not None:
            flow = combine_cfg(*flow.chunk(2), true_cfg_scale)
        img = euler_step(img, flow.to(img.dtype), sigma, sigma_next)  # autocast's is another
        if on_step is not None:
            step = Step(index, sigma * 1000, img, cond)
            on_step(step)
            if step.cond is not cond:
                passes = prepared(step.cond)
            img, cond = step.img, step.cond
            if step.stop:
                break
    return img
