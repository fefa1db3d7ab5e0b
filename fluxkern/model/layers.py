"""The layers of a model: their weights go to an op, or they are called where something stands on
them."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._modules import Site, Sites, autocast_dtype, hooked, replaced
from .int8 import Int8Linear, Int8Weight

_PLACES = {  # what an op does at a place -> the classes of layers whose weights it takes
    "linear": (nn.Linear, Int8Linear),
    "modulation": (nn.Linear, Int8Linear),
    "group_norm_silu": (nn.GroupNorm,),
    "conv1x1": (nn.Conv2d,),
    "gelu": (nn.GELU,),
    "silu": (nn.SiLU,),
    "sequential": (nn.Sequential,),
}
_FORWARDS = {  # None where it is not the class's own
    cls: None if replaced(cls, "forward") else cls.forward
    for classes in _PLACES.values()
    for cls in classes
}


def why_called(layer: nn.Module, place: str = "linear") -> str | None:
    """The reason why a layer must be called; None where an op may take its weight.

    Adapters, quantised layers, parametrizations, offload and casting are hooks, classes or weights
    that are not torch's own. It is a few reads of attributes, to be asked at every call.
    """
    cls = type(layer)
    if cls not in _PLACES[place]:
        return f"a layer is a {cls.__module__}.{cls.__qualname__}"
    if cls.forward is not _FORWARDS[cls]:
        return f"{cls.__qualname__}.forward was replaced"
    weight = layer._parameters.get("weight")
    if weight is not None and type(weight) not in (nn.Parameter, Tensor):
        kind = type(weight)
        if not kind.__module__.startswith("torch._subclasses."):  # of tracing
            return f"a weight is a {kind.__module__}.{kind.__qualname__}"
    return hooked(layer)


def by_op(layer: nn.Module, x: Tensor) -> bool:
    """Whether an op takes the weight of a linear layer for this input."""
    return why_called(layer) is None and autocast_dtype(x) is None


class Part(NamedTuple):
    """Some rows or columns of a linear layer, or all of them, as views."""

    weight: Tensor | Int8Weight
    bias: Tensor | None


def row_parts(layer: nn.Linear, sizes: tuple[int, ...]) -> tuple[Part, ...]:
    pairs = zip(layer.weight.split(sizes), layer.bias.split(sizes), strict=True)
    return tuple(Part(weight, bias) for weight, bias in pairs)


def column_parts(layer: nn.Linear, sizes: tuple[int, int]) -> tuple[Part, Part]:
    first, second = layer.weight.split(sizes, 1)
    return Part(first, layer.bias), Part(second, None)


def product(
    x: Tensor,
    layer: nn.Linear | Part,
    activation: str | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """`ops.linear`, or its int8 form, of the weight of a layer that need not be called."""
    weight = layer.weight
    if isinstance(weight, Int8Weight):
        return weight.product(x, layer.bias, activation, out, add)
    return ops.linear(x, weight, layer.bias, activation=activation, out=out, add=add)


def linear(x: Tensor, layer: nn.Module, activation: str | None = None) -> Tensor:
    """A linear layer, [..., Cin] to [..., Cout], by its op or called."""
    if by_op(layer, x):
        return product(x, layer, activation)
    y = layer(x)
    return ops.gelu_tanh(y) if activation else y


def mlp(x: Tensor, layers: nn.Module) -> Tensor:
    """Linear, GELU-tanh, linear, [..., C] to [..., C]; what must be called is."""
    if why_called(layers, "sequential"):
        return layers(x)
    first, gelu, second = layers
    if why_called(gelu, "gelu"):
        return linear(gelu(linear(x, first)), second)
    return linear(linear(x, first, "gelu_tanh"), second)


def modulation(vec: Tensor, layer: nn.Module) -> Tensor:
    """`ops.modulation` of a linear layer, uncut: [..., Cin] to [..., 1, Cout].

    Of an int8 layer the weight alone has 8 bits: its results scale whole rows of a block, and the
    few rows of vec cost next to nothing.
    """
    weight = layer.weight if by_op(layer, vec) else None
    if isinstance(weight, Int8Weight):
        weight = None if weight.rotation else weight.dequantised(vec.dtype)
    if weight is None:
        return linear(F.silu(vec), layer).unsqueeze(-2)
    return ops.modulation(vec, weight, layer.bias, 1)[0]


def group_norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    """GroupNorm, SiLU of [B, C, H, W], by the op or with the norm called."""
    if why_called(norm, "group_norm_silu"):
        return F.silu(norm(x))
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)  # x has autocast's
    return ops.group_norm_silu(x, weight, bias, norm.num_groups, eps=norm.eps)


def conv1x1(tokens: Tensor, conv: nn.Module) -> Tensor:
    """A 1 x 1 convolution of [B, L, C], which is a linear layer."""
    if why_called(conv, "conv1x1"):
        return conv(tokens.mT.unsqueeze(-1)).squeeze(-1).mT.contiguous()
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


@contextmanager
def adapters_scaled(scale: float, *models: nn.Module) -> Iterator[None]:
    """The LoRA adapters of peft in these models count `scale` times as much meanwhile."""
    layers = [m for model in models for m in model.modules() if hasattr(m, "scale_layer")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


# where a model is, and in what it computes


def execution_device(model: nn.Module) -> torch.device:
    """Where a model runs, also where hooks bring its weights there."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)  # of accelerate
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
        group = getattr(_diffusers_hook(module, "group_offloading"), "group", None)
        if group is not None:
            return torch.device(group.onload_device)
    return next(model.parameters()).device


def compute_dtype(model: nn.Module, norm: type[nn.Module]) -> torch.dtype:
    """What a model computes in: that of its norms' weights, which few store otherwise."""
    weights = []
    for module in model.modules():
        if casting := _diffusers_hook(module, "layerwise_casting"):
            return casting.compute_dtype
        if isinstance(module, norm):
            weights.extend(module.parameters())
    return next(chain(weights, model.parameters())).dtype


def _diffusers_hook(module: nn.Module, name: str) -> object | None:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


# explain

Places = dict[str, tuple[str, nn.Module]]  # path below its owner -> its place and the layer
_KINDS = {"gelu": "gelu", "group_norm_silu": "norm", "modulation": "modulation"}


def must_be_called(model: nn.Module) -> bool:
    """Whether something stands on a module of a model or on a layer that an op could take."""
    for module in model.modules():
        if hooked(module):
            return True
        for place, layer in getattr(module, "places", dict)().values():
            if why_called(layer, place):
                return True
    return False


def explain(obj: object) -> Sites:
    """How each layer of our own models goes that an op can take.

    Args:
        obj: a `FluxPipeline`, or a module that holds a `Flux` or an `AutoEncoder`.

    Returns:
        One `Site` a layer; "called" runs the layer itself, with the reason. Without any where obj
        holds none of our models.
    """
    parts = {"": obj} if isinstance(obj, nn.Module) else _parts(obj)
    return Sites(chain.from_iterable(_sites(*named) for named in parts.items()))


def _parts(pipeline: object) -> dict[str, nn.Module]:
    found = {name: getattr(pipeline, name, None) for name in ("transformer", "vae")}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def _sites(prefix: str, root: nn.Module) -> Iterator[Site]:
    for path, module in root.named_modules(prefix=prefix):
        for name, (place, layer) in getattr(module, "places", dict)().items():
            full, kind = ".".join(filter(None, (path, name))), _KINDS.get(place, "linear")
            if reason := why_called(layer, place):
                yield Site(full, kind, "called", None, reason)
            elif place in ("linear", "modulation", "group_norm_silu"):
                op = "linear_int8" if isinstance(layer, Int8Linear) else place
                yield Site(full, kind, op, ops.explain(op)[0].chosen, None)
