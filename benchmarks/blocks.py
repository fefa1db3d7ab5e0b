"""A double and a single block of FLUX.1 against diffusers' on the same weights, and their memory.

    python3 -m benchmarks.blocks --dtype fp32 bf16 --json blocks.json

Weights and inputs are random and the same in every dtype: bf16 numbers, which fp32 holds exactly.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from fluxkern import bench, checkpoint
from fluxkern.cases import SHAPES, Sizes
from fluxkern.model.int8 import to_int8
from fluxkern.model.sampling import get_img_ids, get_txt_ids
from fluxkern.model.transformer import Flux, FluxConfig, Stream, rope_tables

from . import whole
from .runs import Report, options
from .whole import BASELINE, COMPILED, INT8, OURS, Provider, Truth

KINDS = ("double", "single")
DTYPES = ("fp32", "bf16")
FP32_LIMIT, INT8_LIMIT = 1e-5, 2e-2  # relative L2 of what a block adds
logging.set_verbosity_error()


def config_of(kind: str, sizes: Sizes) -> FluxConfig:
    """One block, and narrow layers around it."""
    side = (sizes.head_dim - 16) // 2
    return FluxConfig(
        vec_in_dim=16,
        context_in_dim=16,
        hidden_size=sizes.heads * sizes.head_dim,
        num_heads=sizes.heads,
        depth=int(kind == "double"),
        depth_single_blocks=int(kind == "single"),
        axes_dim=(16, side, side),
        guidance_embed=False,
    )


def bf16_normal(*shape: int) -> Tensor:
    """fp32 of bf16's numbers."""
    return torch.randn(shape).bfloat16().float()


def draw(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights that keep the size of what goes through, gates and scales far from zero."""
    module = module.to(dtype).to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.data.normal_(float("norm" in name and name.endswith("weight")), 0.1)
        parameter.data.copy_(parameter.data.bfloat16())
    return module.eval()


def models(kind: str, sizes: Sizes) -> tuple[FluxTransformer2DModel, Flux]:
    """Theirs and ours, without memory for their weights."""
    config = config_of(kind, sizes)
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(checkpoint.flux_config_to_diffusers(config))
        return theirs, Flux(config)


def their_block(model: FluxTransformer2DModel, kind: str) -> nn.Module:
    return (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]


def our_block(model: Flux, kind: str) -> nn.Module:
    return (model.double_blocks if kind == "double" else model.single_blocks)[0]


@dataclass(frozen=True)
class Inputs:
    """txt [B, Lt, C], img [B, Li, C], vec [B, C]; angles of the rotation as each model has them."""

    txt: Tensor
    img: Tensor
    vec: Tensor
    theirs: tuple[Tensor, Tensor]
    ours: tuple[Tensor, Tensor]

    @staticmethod
    def of(kind: str, sizes: Sizes, rotation: Callable) -> "Inputs":
        side = 16 * round(sizes.img**0.5)
        ids = torch.cat((get_txt_ids(sizes.txt), get_img_ids(side, side)))
        config = config_of(kind, sizes)
        lengths = ((sizes.txt, sizes.hidden), (sizes.img, sizes.hidden), (sizes.hidden,))
        drawn = (bf16_normal(sizes.batch, *shape) for shape in lengths)
        return Inputs(*drawn, rotation(ids), rope_tables(ids, config.axes_dim, config.theta))

    def to(self, dtype: torch.dtype) -> "Inputs":
        return replace(self, **{n: getattr(self, n).to(dtype) for n in ("txt", "img", "vec")})

    def call_theirs(self, block: nn.Module) -> Callable:
        """Gives txt and img."""
        inputs = (self.img, self.txt, self.vec, self.theirs)
        return partial(whole.without_gradients, block, *inputs)

    def call_ours(self, kind: str, block: nn.Module) -> Callable:
        """On the joint stream of a step, with the modulations, as diffusers' block has them."""
        vec, angles, txt_len = self.vec, self.ours, self.txt.shape[1]
        x = torch.cat((self.txt, self.img), 1)

        def call() -> tuple[Tensor, ...]:
            stream = Stream(x, txt_len)
            mods = (block.txt_mod, block.img_mod) if kind == "double" else (block.modulation,)
            block(stream, *(mod(vec) for mod in mods), *angles)
            return stream.split(stream.sum())

        return partial(whole.without_gradients, call)


class Pair:
    """One block by diffusers and by us, with the same weights."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        torch.manual_seed(0)
        theirs, ours = models(kind, sizes)
        draw(theirs, torch.float32)
        ours.load_state_dict(checkpoint.flux_from_diffusers(theirs.state_dict()), assign=True)
        self.kind, self.sizes = kind, sizes
        self.inputs = Inputs.of(kind, sizes, theirs.pos_embed)
        self.theirs, self.ours = their_block(theirs, kind), our_block(ours, kind)
        self.model = ours
        results = self.inputs.call_theirs(self.theirs)()
        self.truth = Truth(results, (self.inputs.txt, self.inputs.img))

    def providers(self, dtype: str) -> dict[str, Provider]:
        """Half precision is held to twice the error of diffusers'; int8 is beside fp32."""
        to = bench.DTYPES[dtype]
        theirs, ours = (copy.deepcopy(block).to(to) for block in (self.theirs, self.ours))
        inputs = self.inputs.to(to)
        eager = inputs.call_theirs(theirs)
        limit = FP32_LIMIT if dtype == "fp32" else 2 * self.truth.error(eager())
        torch._dynamo.reset()
        compiled = torch.compile(theirs, fullgraph=True, dynamic=False)
        found = {
            BASELINE: Provider(eager, limit, whole.torch_parts),
            COMPILED: Provider(inputs.call_theirs(compiled), limit),
            OURS: Provider(inputs.call_ours(self.kind, ours), limit, whole.our_parts),
        }
        if dtype == "fp32":
            in_int8 = our_block(to_int8(copy.deepcopy(self.model)), self.kind)
            call = inputs.call_ours(self.kind, in_int8)
            found[INT8] = Provider(call, INT8_LIMIT, whole.our_parts)
        return found

    def measure(
        self, dtype: str, rounds: int = whole.ROUNDS, only: tuple[str, ...] | None = None
    ) -> bench.Comparison:
        size = f"{self.sizes.img} + {self.sizes.txt} tokens, {self.sizes.hidden} wide"
        about = (f"{self.kind} block", size, dtype)
        return whole.measure(*about, self.providers(dtype), self.truth, rounds, only)


def memory(kind: str, dtype: str, provider: str, shape: str) -> dict:
    """Peak of one call in a process of its own, against the size of the block's weights."""
    command = [sys.executable, "-m", "benchmarks.memory", kind, dtype, provider, shape]
    done = subprocess.run(command, capture_output=True, text=True, cwd=bench.ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = options("blocks", __doc__, whole.ROUNDS)
    add = parser.add_argument
    add("--block", nargs="+", choices=KINDS, default=KINDS)
    add("--shape", choices=SHAPES, default="flux-512")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    report = Report("blocks", args, shape=args.shape, memory=[])
    for kind in args.block:
        pair = Pair(kind, SHAPES[args.shape])
        for dtype in args.dtype:
            measure = partial(pair.measure, dtype, args.rounds)
            report.add(f"{kind} block, {dtype}", measure, whole.table)
        del pair
    if args.rounds and "bf16" in args.dtype:
        for kind in args.block:
            for provider in (BASELINE, OURS):
                report.data["memory"].append(memory(kind, "bf16", provider, args.shape))
                print(
                    "{what}, {dtype}, {provider}: peak {ratio:.2f} of its weights".format_map(
                        report.data["memory"][-1]
                    )
                )
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
