"""The linear layers of a transformer's blocks in 8 bits."""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from .._modules import autocast_dtype


class Int8Weight:
    """int8 [Cout, Cin] and fp32 [Cout], which split and slice as the one weight that they are.

    With a rotation its columns are turned in groups of so many, as `ops.linear_int8` has it.
    """

    def __init__(self, values: Tensor, scale: Tensor, rotation: int = 0):
        self.values, self.scale, self.rotation = values, scale, rotation
        self.shape = values.shape

    def split(self, sizes: tuple[int, ...], dim: int = 0) -> list["Int8Weight"]:
        values = self.values.split(sizes, dim)
        scales = self.scale.split(sizes) if dim == 0 else [self.scale] * len(values)
        return [Int8Weight(*pair, self.rotation) for pair in zip(values, scales, strict=True)]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[Cout, Cin], a new tensor; columns that are turned stay so."""
        return (self.values.to(self.scale.dtype) * self.scale[:, None]).to(dtype)


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

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale, self.rotation)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_dtype(x) or x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.linear_int8(x, self.values, self.scale, bias, rotation=self.rotation)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Scales stay fp32 where the model is cast."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
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
