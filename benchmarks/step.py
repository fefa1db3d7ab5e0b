"""One step of the transformer, or a few and the autoencoder, with random weights of FLUX.1's sizes.

    python3 -m benchmarks.step --config compact --size 128 512 --dtype fp32 bf16 --json step.json
    python3 -m benchmarks.step --config schnell --size 1024 --whole picture --device cuda
    python3 -m benchmarks.step --shape flux-2048-batch-4 --device cuda

Ours is held to the same weights in fp32 on the reference of every op, and timed beside that
reference in its dtype ("eager") and, where it is installed, diffusers, eager and compiled. The
gradients are of latents, text and pooled vector; weights are frozen, as beside adapters.
"""

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fluxkern import bench, ops
from fluxkern.cases import SHAPES
from fluxkern.model import sampling
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig
from fluxkern.model.int8 import to_int8
from fluxkern.model.transformer import CONFIGS, Flux, FluxConfig

from . import profile, whole
from .runs import Report, default_device, options
from .whole import BASELINE, COMPILED, EAGER, INT8, OURS, Provider, Truth

WHOLES = {"step": "step", "gradients": "step, forward + backward", "picture": "picture"}
SIZES = CONFIGS | {"one block each": replace(CONFIGS["dev"], depth=1, depth_single_blocks=1)}
STEPS = 4  # of a picture: schnell's
FP32_LIMIT, INT8_LIMIT = 1e-5, 2e-2  # relative L2
SIDES = {"cpu": (128, 512), "cuda": (1024,)}  # pixels
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
COMPILE = {"cpu": "default", "cuda": "max-autotune-no-cudagraphs"}  # mode of torch.compile
WHY_BYTES = (
    "each weight once, and what the products and attention read and write: all else could be done"
    " where these load or store"
)


def inputs(
    config: FluxConfig,
    pixels: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    batch: int = 1,
) -> dict[str, Any]:
    """Of `Flux.forward`, for pictures of that height and width."""
    # time and guidance whose thousandfold bf16 holds: else its sinusoids are of another time
    txt_len = 512 if config.hidden_size > 1024 else 64

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().to(dtype)

    img_ids = sampling.get_img_ids(*pixels, device)
    found = {
        "img": normal(batch, len(img_ids), config.in_channels),
        "img_ids": img_ids,
        "txt": normal(batch, txt_len, config.context_in_dim),
        "txt_ids": sampling.get_txt_ids(txt_len, device),
        "timesteps": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "y": normal(batch, config.vec_in_dim),
    }
    if config.guidance_embed:
        found["guidance"] = torch.full((batch,), 4.0, device=device)
    return found


def meta_step(config: FluxConfig, size: int, dtype: torch.dtype = torch.bfloat16) -> bench.Counted:
    """What a step calls, and its FLOPs and bytes; nothing is computed."""
    with torch.device("meta"):
        model, given = Flux(config).to(dtype), inputs(config, (size, size), dtype, "meta")
    return bench.counted(lambda: model(**given))


def least_bytes(step: bench.Counted) -> int:
    """The sentence is WHY_BYTES."""
    return sum(cost.bytes for cost in step.costs if cost.flops)


def widened(given: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in fp32."""
    return {n: t.float() if t.is_floating_point() else t for n, t in given.items()}


@contextmanager
def in_fp32(model: Flux) -> Iterator[None]:
    """The same weights in fp32 arithmetic, a block at a time where memory is short."""
    blocks = [*model.double_blocks, *model.single_blocks]
    mods = [m for b in blocks for n, m in b.named_children() if n in MODULATIONS]
    dtype = next(model.parameters()).dtype
    inside = set(map(id, (m for block in blocks for m in block.modules())))
    outside = [m for m in model.modules() if id(m) not in inside and not list(m.children())]
    hooks = []
    for module in (*blocks, *mods):
        hooks += [
            module.register_forward_pre_hook(lambda m, _: m.float() and None),
            module.register_forward_hook(lambda m, *_: m.to(dtype) and None),
        ]
    for module in outside:
        module.float()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(dtype)


MODULATIONS = ("txt_mod", "img_mod", "modulation")
DIFFERENTIABLE = ("img", "txt", "y")
THEIR_NAMES = {
    "img": "hidden_states",
    "txt": "encoder_hidden_states",
    "y": "pooled_projections",
    "timesteps": "timestep",
}


def of_shape(shape: str) -> tuple[str, int, int]:
    """Config, pixels and batch of a name in SHAPES."""
    sizes = SHAPES[shape]
    return ("compact" if shape == "compact" else "dev"), 16 * round(sizes.img**0.5), sizes.batch


class Model:
    """A transformer, its inputs, and its autoencoder where a picture is asked for."""

    def __init__(self, config: str, size: int, dtype: str, device: str, batch: int = 1) -> None:
        torch.manual_seed(0)
        self.config, self.pixels, self.device = SIZES[config], size, device
        self.dtype, self.dtype_name = bench.DTYPES[dtype], dtype
        self.name, self.batch = config, batch
        with torch.device("meta"):
            flux = Flux(self.config)
        self.flux = whole.draw(flux, self.dtype, device).requires_grad_(False)
        self.inputs = inputs(self.config, (size, size), self.dtype, device, batch)
        self.vae: AutoEncoder | None = None
        self.kinds: dict[str, dict[str, float]] = {}  # provider -> kind -> share of its time
        self.peaks: dict[str, int] = {}  # provider -> bytes of a call beside weights and inputs

    @property
    def size(self) -> str:
        tokens = (self.inputs[name].shape[1] for name in ("img", "txt"))
        batch = f"{self.batch} x " * (self.batch > 1)
        return f"{self.name}, {batch}{self.pixels} px, {' + '.join(map(str, tokens))} tokens"

    @torch.no_grad()
    def step(self, flux: nn.Module | None = None) -> tuple[Tensor]:
        return (self.flux(**self.inputs) if flux is None else flux(**self.inputs),)

    def gradients(self, flux: nn.Module | None = None) -> tuple[Tensor, ...]:
        """Of DIFFERENTIABLE; the latents stand for the gradient of the velocity."""
        given, call = self.inputs, self.flux if flux is None else flux

        def run(*leaves: Tensor) -> tuple[Tensor]:
            return (call(**given | dict(zip(DIFFERENTIABLE, leaves, strict=True))),)

        leaves = tuple(given[name] for name in DIFFERENTIABLE)
        return whole.gradients(run, leaves, (given["img"],))

    @torch.no_grad()
    def picture(self, flux: nn.Module | None = None) -> tuple[Tensor]:
        """Latents of a few steps, decoded."""
        if self.vae is None:
            ch = 128 if self.config.hidden_size > 1024 else 32
            with torch.device("meta"):
                vae = AutoEncoder(AutoEncoderConfig(ch=ch))
            self.vae = whole.draw(vae, self.dtype, self.device)
        given, guided = self.inputs, self.config.guidance_embed
        latents = sampling.denoise(
            self.flux if flux is None else flux,
            given["img"],
            given["img_ids"],
            sampling.Conditioning(given["txt"], given["y"]),
            sampling.get_schedule(STEPS, given["img"].shape[1], sampling.ScheduleConfig()),
            guidance_scale=3.5 if guided else None,
        )
        z = sampling.unpack(latents, self.pixels, self.pixels)
        return (self.vae.decode(z.to(next(self.vae.parameters()).dtype)),)

    def on_the_reference(self, call: Callable, *args: Any) -> Callable[[], tuple[Tensor]]:
        def run() -> tuple[Tensor]:
            with ops.use_backend("reference"):
                return call(*args)

        return run

    def exact(self, what: str) -> tuple[Tensor, ...]:
        """The reference in fp32."""
        before = self.inputs
        self.inputs = widened(before)
        call = getattr(self, what)
        if what == "gradients":  # whose backward reads the weights again
            self.flux.float()
        try:
            with in_fp32(self.flux), ops.use_backend("reference"):
                if self.vae is not None:
                    self.vae.float()
                return tuple(t.float() for t in call())
        finally:
            self.inputs = before
            self.flux.to(self.dtype)
            if self.vae is not None:
                self.vae.to(self.dtype)

    def least_bytes(self) -> int:
        return least_bytes(meta_step(self.config, self.pixels, self.dtype))

    def limit(self, truth: Truth, eager: Callable[[], tuple[Tensor, ...]]) -> float:
        """Half precision is held to twice the error of the reference."""
        return FP32_LIMIT if self.dtype == torch.float32 else 2 * truth.error(eager())

    def providers(self, what: str, truth: Truth) -> dict[str, Provider]:
        call = getattr(self, what)
        eager = self.on_the_reference(call)
        limit = self.limit(truth, eager)
        found = self.diffusers(what, limit) if what != "picture" else {}
        parts = None if what == "gradients" else whole.our_parts
        found |= {EAGER: Provider(eager, limit), OURS: Provider(call, limit, parts, ours=True)}
        if self.dtype == torch.float32 and self.device == "cpu" and what != "gradients":
            in_int8 = to_int8(copy.deepcopy(self.flux))
            call = partial(call, in_int8)
            found[INT8] = Provider(call, INT8_LIMIT, whole.our_parts, ours=True)
        return found

    def diffusers(self, what: str, limit: float) -> dict[str, Provider]:
        """Theirs on the same weights; nothing where it is not installed."""
        if importlib.util.find_spec("diffusers") is None:
            return {}
        from diffusers import FluxTransformer2DModel

        from fluxkern import checkpoint

        with torch.device("meta"):
            theirs = FluxTransformer2DModel.from_config(
                checkpoint.flux_config_to_diffusers(self.config)
            )
        state = checkpoint.flux_to_diffusers(self.flux.state_dict())
        theirs.load_state_dict(state, assign=True)
        theirs.requires_grad_(False)
        torch._dynamo.reset()
        compiled = copy.copy(theirs)  # on the same weights
        for name in ("transformer_blocks", "single_transformer_blocks"):
            blocks = nn.ModuleList(map(copy.copy, getattr(theirs, name)))
            compiled._modules = compiled._modules | {name: blocks}
        compiled.compile_repeated_blocks(fullgraph=True, mode=COMPILE[self.device])

        def as_ours(model: nn.Module, **given: Any) -> Tensor:
            named = {THEIR_NAMES.get(name, name): value for name, value in given.items()}
            return model(**named, return_dict=False)[0]

        def call(model: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
            return partial(getattr(self, what), partial(as_ours, model))

        parts = None if what == "gradients" else whole.torch_parts
        return {
            BASELINE: Provider(call(theirs), limit, parts),
            COMPILED: Provider(call(compiled), limit),
        }

    def measure(
        self, what: str, rounds: int = whole.ROUNDS, only: tuple[str, ...] | None = None
    ) -> bench.Comparison:
        self.kinds, self.peaks = {}, {}
        if what == "picture":
            self.picture()  # makes the autoencoder
        results = self.exact(what)
        truth = Truth(results, tuple(torch.zeros_like(t) for t in results))
        providers = self.providers(what, truth)
        size = self.size + (f", {STEPS} steps and the autoencoder" if what == "picture" else "")
        about = (WHOLES[what], size, self.dtype_name, providers, truth)
        found = whole.measure(*about, rounds, only, self.device)
        timed = (p for p in (BASELINE, COMPILED, EAGER, OURS) if found.row(p))
        calls = {name: providers[name].call for name in timed}
        with whole.best_attention(self.device):
            self.kinds = {n: profile.shares(call, self.device) for n, call in calls.items()}
            self.peaks = {n: profile.peak_memory(call, self.device) for n, call in calls.items()}
        absent = what != "picture" and BASELINE not in providers
        skipped = found.skipped | ({BASELINE: "it is not installed"} if absent else {})
        return replace(found, skipped=skipped)


def counts(config: str, size: int) -> dict[str, Any]:
    """FLOPs and bytes of a step in bf16, from the Cases of its ops."""
    found = meta_step(SIZES[config], size)
    return {
        "config": config,
        "size": size,
        "TFLOP": found.flops / 1e12,
        "GB": found.bytes / 1e9,
        "least GB": least_bytes(found) / 1e9,
        "operators": len(found.costs),
        "why": f"GB: every op reads its inputs and writes its outputs once; least: {WHY_BYTES}",
    }


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("step", __doc__, whole.ROUNDS)
    add = parser.add_argument
    device = default_device()
    add("--config", choices=SIZES, default="compact" if device == "cpu" else "dev")
    add("--size", nargs="+", type=int, default=SIDES[device], help="pixels; 128 512, on a GPU 1024")
    add("--shape", nargs="+", choices=SHAPES, help="in place of both; FLUX.1-dev's but compact")
    add("--dtype", nargs="+", choices=("fp32", "bf16"), default=DTYPES[device])
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--whole", nargs="+", choices=WHOLES, default=["step"])
    add("--only", nargs="+", help="providers, diffusers or eager among them")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    models = [of_shape(shape) for shape in args.shape or ()]
    models = models or [(args.config, size, 1) for size in args.size]
    planned = len(models) * len(args.dtype) * len(args.whole)
    report = Report("step", args, planned, counts=[], kinds=[])
    only = tuple(args.only) if args.only else None
    for dtype, (config, size, batch) in product(args.dtype, models):
        model = Model(config, size, dtype, args.device, batch)
        for what in args.whole:
            measure = partial(model.measure, what, args.rounds, only)
            report.add(f"{WHOLES[what]}, {model.size}, {dtype}", measure, whole.table)
            if model.kinds:
                about = {"what": WHOLES[what], "size": model.size, "dtype": dtype}
                shares = {"shares": bench.rounded(model.kinds), "peak": model.peaks}
                report.data["kinds"].append(about | shares)
        del model
    for config, size in dict.fromkeys((models[-1][:2], ("dev", 1024))):
        found = bench.rounded(counts(config, size))
        report.data["counts"].append(found)
        print("{config}, {size} px: {TFLOP:.4g} TFLOP, {GB:.4g} GB".format_map(found))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
