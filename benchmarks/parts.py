"""What surrounds the transformer: autoencoder both ways and text encoders, by diffusers too.

    python3 -m benchmarks.parts --json parts.json

The compact model's parts at its own size, and an autoencoder of FLUX.1's width with random weights
at 128 px. The text encoders are transformers' modules in both.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fluxkern import bench, checkpoint
from fluxkern.cases import SHAPES
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig

from . import whole
from .pipeline import PROMPT, Pipelines
from .runs import Report, options
from .whole import BASELINE, OURS, Provider, Truth

LIMIT = 1e-5  # relative L2
FLUX_SIZE = 128  # pixels
VAE = ("VAE encode", "VAE decode")
TEXT = "text encoders"  # none of our ops is in them


@dataclass(frozen=True)
class Part:
    """One part by diffusers and by us; `exact` is theirs in fp32."""

    what: str
    size: str
    theirs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[[], tuple[Tensor, ...]]
    exact: tuple[Tensor, ...]
    dtype: str = "fp32"
    device: str = "cpu"

    def measure(self, rounds: int = whole.ROUNDS) -> bench.Comparison:
        """Half precision is held to twice the error of diffusers'."""
        truth = Truth(self.exact, tuple(map(torch.zeros_like, self.exact)))
        theirs, ours = (partial(whole.without_gradients, c) for c in (self.theirs, self.ours))
        limit = LIMIT if self.dtype == "fp32" else 2 * truth.error(theirs())
        providers = {
            BASELINE: Provider(theirs, limit),
            OURS: Provider(ours, limit, ours=self.what != TEXT),
        }
        about = (self.what, self.size, self.dtype, providers, truth)
        return whole.measure(*about, rounds, device=self.device)


def flux_autoencoders() -> tuple[AutoencoderKL, AutoEncoder]:
    """Theirs and ours on the same random weights of FLUX.1's sizes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        ours = AutoEncoder(AutoEncoderConfig())
        theirs = AutoencoderKL.from_config(checkpoint.autoencoder_config_to_diffusers(ours.config))
    whole.draw(ours, torch.float32)
    theirs.load_state_dict(checkpoint.autoencoder_to_diffusers(ours.state_dict()), assign=True)
    return theirs.eval(), ours


@torch.no_grad()
def autoencoder(
    name: str,
    theirs: AutoencoderKL,
    ours: AutoEncoder,
    pixels: int,
    batch: int = 1,
    device: str = "cpu",
) -> Iterator[Part]:
    """Both ways, on a GPU in bf16."""
    dtype = "fp32" if device == "cpu" else "bf16"
    theirs, ours = theirs.to(device), ours.to(device)
    picture = torch.rand(batch, 3, pixels, pixels, device=device) * 2 - 1
    latents = torch.randn(batch, 16, pixels // 8, pixels // 8, device=device)
    scale, shift = ours.config.scale_factor, ours.config.shift_factor

    def encode(x: Tensor) -> tuple[Tensor]:
        return ((theirs.encode(x).latent_dist.mean - shift) * scale,)

    def decode(z: Tensor) -> tuple[Tensor]:
        return (theirs.decode(z / scale + shift).sample,)

    ways = (
        (encode, lambda x: (ours.encode(x),), picture.bfloat16()),
        (decode, lambda z: (ours.decode(z),), latents.bfloat16()),
    )
    exact = [by_them(x.float()) for by_them, _, x in ways]
    to = bench.DTYPES[dtype]
    theirs.to(to), ours.to(to)
    size = f"{name}, {f'{batch} x ' * (batch > 1)}{pixels} px"
    for what, (by_them, by_us, x), right in zip(VAE, ways, exact, strict=True):
        calls = (partial(by, x.to(to)) for by in (by_them, by_us))
        yield Part(what, size, *calls, right, dtype, device)


def text_encoders(pipelines: Pipelines) -> Part:
    length = pipelines.text_length

    def theirs() -> tuple[Tensor, ...]:
        return pipelines.theirs.encode_prompt(PROMPT, PROMPT, max_sequence_length=length)[:2]

    def ours() -> tuple[Tensor, ...]:
        return pipelines.ours.text_encoder.encode([PROMPT], [PROMPT], length)

    return Part(TEXT, f"compact, {length} tokens", theirs, ours, whole.without_gradients(theirs))


def compact(batch: int = 1, device: str = "cpu") -> Iterator[Part]:
    """Text encoders, which stay on the CPU, and autoencoder."""
    pipelines = Pipelines()
    yield text_encoders(pipelines)
    pair = pipelines.theirs.vae, pipelines.ours.vae
    yield from autoencoder("compact", *pair, pipelines.ours.default_size, batch, device)


def of_shape(shape: str, device: str) -> Iterator[Part]:
    """The parts of its model at its size."""
    sizes = SHAPES[shape]
    if shape == "compact":
        return compact(sizes.batch, device)
    pixels = 16 * round(sizes.img**0.5)
    return autoencoder("FLUX.1", *flux_autoencoders(), pixels, sizes.batch, device)


def main(argv: list[str] | None = None) -> int:
    args = options("parts", __doc__, whole.ROUNDS).parse_args(argv)
    report = Report("parts", args, planned=5)
    for part in (*compact(), *autoencoder("FLUX.1", *flux_autoencoders(), FLUX_SIZE)):
        report.add(f"{part.what}, {part.size}", partial(part.measure, args.rounds), whole.table)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
