"""The linear layers of a transformer's blocks in 8 bits."""

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._modules import autocast_dtype

BLOCK = 64  # rows of an output that are changed together
_BESIDE = ("down", "up", "delta", "delta_scale")


class LowRank(NamedTuple):
    """up down, what an adapter adds to a weight: down [r, Cin], up [Cout, r]."""

    down: Tensor
    up: Tensor

    def split(self, sizes: tuple[int, ...], dim: int = 0) -> list["LowRank"]:
        if dim == 0:
            return [LowRank(self.down, up) for up in self.up.split(sizes)]
        return [LowRank(down, self.up) for down in self.down.split(sizes, 1)]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return (self.up @ self.down).to(dtype)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Adds the product with x [..., Cin] to y [..., Cout]."""
        inner, up = F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)
        if y.ndim < 2:
            y += F.linear(inner, up)
            return
        for rows, own in zip(_blocks(y), _blocks(inner), strict=True):  # without a second y
            rows.addmm_(own, up.mT)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Views [L, C] of [..., L, C] with so few rows that they stay in a cache."""
    for index in product(*map(range, x.shape[:-2])):
        yield from x[index].split(BLOCK)


class Int8Weight:
    """int8 [Cout, Cin] and fp32 [Cout], which split and slice as the one weight that they are.

    With a rotation its columns are turned in groups of so many, as `ops.linear_int8` has it. What
    lies beside it, on the columns as they were, is added to its products.
    """

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        rotation: int = 0,
        beside: tuple["LowRank | Int8Weight", ...] = (),
    ):
        self.values, self.scale, self.rotation, self.beside = values, scale, rotation, beside
        self.shape = values.shape

    def split(self, sizes: tuple[int, ...], dim: int = 0) -> list["Int8Weight"]:
        values = self.values.split(sizes, dim)
        scales = self.scale.split(sizes) if dim == 0 else [self.scale] * len(values)
        parts = [part.split(sizes, dim) for part in self.beside]
        beside = zip(*parts, strict=True) if parts else [()] * len(values)
        return [
            Int8Weight(v, scale, self.rotation, of)
            for v, scale, of in zip(values, scales, beside, strict=True)
        ]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[Cout, Cin], a new tensor; columns that are turned stay so."""
        weight = self.values.to(self.scale.dtype) * self.scale[:, None]
        for part in self.beside:
            weight += part.dequantised(weight.dtype)
        return weight.to(dtype)

    def sampled(self, step: int) -> list[Tensor]:
        """Every so manieth row, [Cout / step, Cin] in fp32: of itself, then of what is beside."""
        own = self.values[::step].to(self.scale.dtype) * self.scale[::step, None]
        low = [LowRank(p.down, p.up[::step]) for p in self.beside if isinstance(p, LowRank)]
        full = [part for part in self.beside if isinstance(part, Int8Weight)]
        return [own, *(part.up @ part.down for part in low), *(p.sampled(step)[0] for p in full)]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Adds the product with x [..., Cin] to y [..., Cout]."""
        ops.linear_int8(x, self.values, self.scale, out=y, add=True, rotation=self.rotation)

    def product(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: str | None = None,
        out: Tensor | None = None,
        add: bool = False,
    ) -> Tensor:
        """`ops.linear_int8` of this weight, and of what lies beside it."""
        options = {"out": out, "add": add, "rotation": self.rotation}
        if not self.beside:
            options["activation"] = activation
            return ops.linear_int8(x, self.values, self.scale, bias, **options)
        y = ops.linear_int8(x, self.values, self.scale, bias, **options)
        for part in self.beside:
            part.add_to(y, x)
        for rows in _blocks(y) if activation else ():
            rows.copy_(ops.gelu_tanh(rows))
        return y


class Int8Linear(nn.Module):
    """A linear layer whose weight has 8 bits; made for inference, without parameters.

    Args:
        layer: the layer it is made of, which is left as it is; it may lie on the meta device.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.rotation = 0  # of ConvRot; set by who reads such a weight
        values, scale = ops.quantize_int8(layer.weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        for name in _BESIDE:  # of adapters, no part of the state
            self.register_buffer(name, None, persistent=False)

    @property
    def weight(self) -> Int8Weight:
        beside: tuple[LowRank | Int8Weight, ...] = ()
        if self.down is not None:
            beside += (LowRank(self.down, self.up),)
        if self.delta is not None:
            beside += (Int8Weight(self.delta, self.delta_scale),)
        return Int8Weight(self.values, self.scale, self.rotation, beside)

    def put_beside(self, low: LowRank | None, delta: tuple[Tensor, Tensor] | None) -> None:
        """Adds these to the products of the weight, in the place of any that were added before.

        Args:
            low: a weight of low rank; None takes it away.
            delta: another weight as `ops.quantize_int8` gives it; None takes it away.
        """
        self.down, self.up = low or (None, None)
        self.delta, self.delta_scale = delta or (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x) or x.dtype)
        return self.weight.product(x, None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Scales stay fp32 where the model is cast."""
        before = {name: getattr(self, name) for name in ("scale", "delta_scale")}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(self.scale.device))
        return self


def block_linears(model: nn.Module) -> list[str]:
    """Names of the layers of a Flux that `to_int8` turns: all of its blocks'."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "_blocks." in name
    ]


def int8_state(name: str, values: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """What the state of an `Int8Linear` holds in the place of this weight of a state dict."""
    layer = name.removesuffix("weight")
    return {f"{layer}values": values, f"{layer}scale": scale}


def to_int8(model: nn.Module, layers: list[str] | None = None) -> nn.Module:
    """Puts an `Int8Linear` in the place of each of the layers; None: of `block_linears`."""
    for name in block_linears(model) if layers is None else layers:
        model.set_submodule(name, Int8Linear(model.get_submodule(name)))
    return model


def comfy_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model in int8 as files of Comfy's `int8_tensorwise` hold it, without a copy.

    `weight` int8 [N, K], `weight_scale` fp32 [N, 1], and the name of the format in `comfy_quant`.
    """
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear):
            state[f"{name}.weight"] = state.pop(f"{name}.values")
            state[f"{name}.weight_scale"] = state.pop(f"{name}.scale")[:, None]
            note = {"format": "int8_tensorwise"}
            if layer.rotation:
                note |= {"convrot": True, "convrot_groupsize": layer.rotation}
            text = list(json.dumps(note).encode())
            state[f"{name}.comfy_quant"] = torch.tensor(text, dtype=torch.uint8, device="cpu")
    return state


def is_int8(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())


def with_adapters(model: nn.Module) -> list[str]:
    """Names of the int8 layers that have something beside them, which no file holds."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Int8Linear) and module.weight.beside
    ]
