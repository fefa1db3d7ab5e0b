"""A double and a single block of FLUX.1 against diffusers' on the same weights, and their memory.

    python3 -m benchmarks.blocks --dtype fp32 bf16 --json blocks.json

Weights and inputs are random and the same in every dtype: bf16 numbers, which fp32 holds exactly.
The backward gives the gradients of streams and vec; weights are frozen, as beside adapters.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

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
from .runs import Report, default_device, default_shape, options
from .whole import BASELINE, COMPILED, INT8, OURS, TORCHAO, Provider, Truth

KINDS = ("double", "single")
DTYPES = ("fp32", "bf16")
DIRECTIONS = ("forward", "forward + backward")
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
    def of(kind: str, sizes: Sizes, rotation: Callable, device: str = "cpu") -> "Inputs":
        side = 16 * round(sizes.img**0.5)
        ids = torch.cat((get_txt_ids(sizes.txt, device), get_img_ids(side, side, device)))
        config = config_of(kind, sizes)
        lengths = ((sizes.txt, sizes.hidden), (sizes.img, sizes.hidden), (sizes.hidden,))
        drawn = (bf16_normal(sizes.batch, *shape).to(device) for shape in lengths)
        return Inputs(*drawn, rotation(ids), rope_tables(ids, config.axes_dim, config.theta))

    def to(self, dtype: torch.dtype) -> "Inputs":
        return replace(self, **{n: getattr(self, n).to(dtype) for n in ("txt", "img", "vec")})

    def call_theirs(self, block: nn.Module, direction: str = "forward") -> Callable:
        """Gives txt and img, or the gradients of txt, img and vec."""

        def run(txt: Tensor, img: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
            return block(img, txt, vec, self.theirs)

        return self.in_direction(run, (self.txt, self.img, self.vec), direction)

    def call_ours(self, kind: str, block: nn.Module, direction: str = "forward") -> Callable:
        """On the joint stream of a step, with the modulations, as diffusers' block has them."""
        angles, txt_len = self.ours, self.txt.shape[1]
        x = torch.cat((self.txt, self.img), 1)

        def run(x: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
            stream = Stream(x, txt_len)
            block(stream, block.vectors(vec), *angles)
            return stream.split(stream.sum())

        call = self.in_direction(run, (x, self.vec), direction)
        if direction == "forward":
            return call

        def split() -> tuple[Tensor, ...]:
            dx, dvec = call()
            return dx[:, :txt_len], dx[:, txt_len:], dvec

        return split

    def in_direction(
        self, run: Callable, given: tuple[Tensor, ...], direction: str
    ) -> Callable[[], tuple[Tensor, ...]]:
        """The streams stand for the gradients of the results."""
        if direction == "forward":
            return partial(whole.without_gradients, run, *given)
        return partial(whole.gradients, run, given, (self.txt, self.img))


class Pair:
    """One block by diffusers and by us, with the same weights."""

    def __init__(self, kind: str, sizes: Sizes, device: str = "cpu") -> None:
        torch.manual_seed(0)
        theirs, ours = models(kind, sizes)
        whole.draw(theirs, torch.float32, device)
        ours.load_state_dict(checkpoint.flux_from_diffusers(theirs.state_dict()), assign=True)
        self.kind, self.sizes, self.device = kind, sizes, device
        self.inputs = Inputs.of(kind, sizes, theirs.pos_embed, device)
        self.theirs, self.ours = their_block(theirs, kind), our_block(ours, kind)
        self.model = ours
        self.truths: dict[str, Truth] = {}  # by direction
        for block in (self.theirs, self.ours):
            block.requires_grad_(False)

    def truth(self, direction: str = "forward") -> Truth:
        """Gradients have gone around the block too: what it adds to them is what may be wrong."""
        if direction not in self.truths:
            results, inputs = self.inputs.call_theirs(self.theirs, direction)(), self.inputs
            start = (inputs.txt, inputs.img, torch.zeros_like(inputs.vec))
            self.truths[direction] = Truth(results, start[: len(results)])
        return self.truths[direction]

    def providers(self, dtype: str, direction: str = "forward") -> dict[str, Provider]:
        """Half precision is held to twice the error of diffusers'; int8 is beside fp32."""
        to = bench.DTYPES[dtype]
        theirs, ours = (copy.deepcopy(block).to(to) for block in (self.theirs, self.ours))
        inputs = self.inputs.to(to)
        eager, forward = inputs.call_theirs(theirs, direction), direction == "forward"
        limit = FP32_LIMIT if dtype == "fp32" else 2 * self.truth(direction).error(eager())
        torch._dynamo.reset()
        compiled = torch.compile(theirs, fullgraph=True, dynamic=False)
        call = inputs.call_ours(self.kind, ours, direction)
        torch_parts, our_parts = (whole.torch_parts, whole.our_parts) if forward else (None, None)
        found = {
            BASELINE: Provider(eager, limit, torch_parts),
            COMPILED: Provider(inputs.call_theirs(compiled, direction), limit),
            OURS: Provider(call, limit, our_parts, ours=True),
        }
        if dtype == "fp32" and self.device == "cpu" and forward:
            in_int8 = our_block(to_int8(copy.deepcopy(self.model)), self.kind)
            call = inputs.call_ours(self.kind, in_int8)
            found[INT8] = Provider(call, INT8_LIMIT, whole.our_parts, ours=True)
            found |= self.peers(inputs)
        return found

    def peers(self, inputs: Inputs) -> dict[str, Provider]:
        """torchao's int8 in diffusers' block, eager, where torchao is installed."""
        if bench.peers.installed()["torchao"] is None:
            return {}

        @cache
        def call() -> Callable:  # made when it is asked for
            return inputs.call_theirs(bench.peers.torchao_int8(copy.deepcopy(self.theirs)))

        return {TORCHAO: Provider(lambda: call()(), INT8_LIMIT)}

    def what(self, direction: str) -> str:
        return f"{self.kind} block" + f", {direction}" * (direction != "forward")

    def measure(
        self,
        dtype: str,
        direction: str = "forward",
        rounds: int = whole.ROUNDS,
        only: tuple[str, ...] | None = None,
    ) -> bench.Comparison:
        sizes, batch = self.sizes, f"{self.sizes.batch} x " * (self.sizes.batch > 1)
        size = f"{batch}{sizes.img} + {sizes.txt} tokens, {sizes.hidden} wide"
        about = (self.what(direction), size, dtype, self.providers(dtype, direction))
        return whole.measure(*about, self.truth(direction), rounds, only, self.device)


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
    add("--shape", nargs="+", choices=SHAPES, default=[default_shape()])
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    add("--direction", nargs="+", choices=DIRECTIONS, default=["forward"])
    add("--device", choices=("cpu", "cuda"), default=default_device())
    add("--only", nargs="+", help="providers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    planned = len(args.shape) * len(args.block) * len(args.dtype) * len(args.direction)
    report = Report("blocks", args, planned, memory=[])
    only = args.only and tuple(args.only)
    for shape, kind in product(args.shape, args.block):
        pair = Pair(kind, SHAPES[shape], args.device)
        for dtype, direction in product(args.dtype, args.direction):
            measure = partial(pair.measure, dtype, direction, args.rounds, only)
            report.add(f"{shape}, {pair.what(direction)}, {dtype}", measure, whole.table)
        del pair
    if args.rounds and "bf16" in args.dtype and args.device == "cpu":
        for shape, kind, provider in product(args.shape, args.block, (BASELINE, OURS)):
            found = memory(kind, "bf16", provider, shape)
            report.data["memory"].append(found)
            print("{what}, {dtype}, {provider}: peak {ratio:.2f} of its weights".format_map(found))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
