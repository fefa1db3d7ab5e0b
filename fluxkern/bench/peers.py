"""Other libraries with the same ops, timed beside ours where they are installed.

They are taken from their packages and are no dependencies. One that is not installed is listed as
absent; one that is installed and does not run is a failure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .system import version

Args = dict[str, Any]
Make = Callable[[Args], Callable | None]  # None: it does not take these arguments


@dataclass(frozen=True)
class Peer:
    """A package; `ops` makes a function with the signature of an op from the op's arguments."""

    package: str
    on_cpu: bool = False
    has_backward: bool = False
    ops: dict[str, Make] = field(default_factory=dict)


def rows_of(x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """[B, L, C] and [1, 1, C] as [L, C] and [C], where there is one batch element."""
    return x.flatten(0, 1), *(v.flatten() for v in vectors)


def one_stream(args: Args) -> bool:
    """Others take one vector for all tokens."""
    return args["scale"].shape[1] == 1


def comfy_norm_modulate(args: Args) -> Callable | None:
    import comfy_kitchen

    run = lambda x, scale, shift, txt_len: comfy_kitchen.adaln(x, scale, shift)  # noqa: E731
    return run if one_stream(args) else None


def comfy_qk_norm_rope(args: Args) -> Callable:
    """Its rotations are 2 x 2 matrices, made ahead as a model would."""
    import comfy_kitchen

    cos, sin = args["cos"], args["sin"]
    matrices = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))[None, :, None]

    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, **_: Tensor) -> tuple:
        return comfy_kitchen.rms_rope(q, k, matrices, q_weight, k_weight)

    return run


def liger_norm_modulate(args: Args) -> Callable | None:
    """A LayerNorm with weights, which the vectors of one batch element are."""
    from liger_kernel.transformers.functional import liger_layer_norm

    def run(x: Tensor, scale: Tensor, shift: Tensor, txt_len: int) -> Tensor:
        rows, weight, bias = rows_of(x, 1 + scale, shift)
        return liger_layer_norm(rows, weight, bias, 1e-6).view(x.shape)

    return run if args["x"].shape[0] == 1 and one_stream(args) else None


def quack_norm_modulate(args: Args) -> Callable | None:
    from quack.rmsnorm import layernorm_fwd

    def run(x: Tensor, scale: Tensor, shift: Tensor, txt_len: int) -> Tensor:
        rows, weight, bias = rows_of(x, 1 + scale.float(), shift.float())
        return layernorm_fwd(rows, weight, bias, 1e-6).view(x.shape)

    return run if args["x"].shape[0] == 1 and one_stream(args) else None


def flash_attention(args: Args) -> Callable | None:
    from flash_attn import flash_attn_func

    return flash_attn_func if args["q"].dtype != torch.float32 else None


def xformers_attention(args: Args) -> Callable:
    from xformers.ops import memory_efficient_attention

    return lambda q, k, v: memory_efficient_attention(q, k, v)


PEERS = {
    peer.package: peer
    for peer in (
        Peer(
            "comfy-kitchen",
            on_cpu=True,
            ops={"norm_modulate": comfy_norm_modulate, "qk_norm_rope": comfy_qk_norm_rope},
        ),
        Peer("liger-kernel", has_backward=True, ops={"norm_modulate": liger_norm_modulate}),
        Peer("quack-kernels", ops={"norm_modulate": quack_norm_modulate}),
        Peer("flash-attn", has_backward=True, ops={"attention": flash_attention}),
        Peer("torchao", on_cpu=True),  # whole blocks, below
        Peer("xformers", has_backward=True, ops={"attention": xformers_attention}),
    )
}


def installed() -> dict[str, str | None]:
    """Versions; None: it is absent."""
    return {package: version(package) for package in PEERS}


def of(op: str, args: Args, direction: str) -> Iterator[tuple[str, Make]]:
    """Names of the installed that have this op for this direction and device, and their makers."""
    device = next(v.device.type for v in args.values() if isinstance(v, Tensor))
    for package, peer in PEERS.items():
        fits = (device != "cpu" or peer.on_cpu) and (direction == "forward" or peer.has_backward)
        if op in peer.ops and fits and version(package) is not None:
            yield package, peer.ops[op]


def torchao_int8(module: nn.Module) -> nn.Module:
    """The module with 8-bit weights and inputs in its linears, by torchao."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module
