"""Tiny transformers in the formats that people have, and the weights that they stand for.

Laid out from descriptions of the formats, or by the packages that define them; nothing here uses
fluxkern's readers.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from checkpoint_files import tiny_flux
from safetensors.torch import save_file
from torch import Tensor

from fluxkern.model.transformer import Flux

State = dict[str, Tensor]
E4M3 = torch.float8_e4m3fn
NF4 = torch.tensor(  # of QLoRA: quantiles of a normal distribution
    [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    + [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
)


def model(hidden: int = 64) -> Flux:
    heads = {64: 1, 256: 4}[hidden]
    return tiny_flux(hidden_size=hidden, num_heads=heads, depth=1, depth_single_blocks=1)


def is_quantised(name: str) -> bool:
    return "_blocks." in name and name.endswith(".weight")


def write(
    path: Path,
    state: Mapping[str, Tensor],
    quantise: Callable[[str, Tensor], tuple[State, Tensor]],
    metadata: dict[str, str] | None = None,
    extra: State | None = None,
    prefix: str = "",
) -> State:
    """Writes a file whose block weights are quantised, and returns what all of it stands for.

    Args:
        quantise: (name, weight) -> (the tensors in the file, the numbers they stand for).
    """
    file, meaning = dict(extra or {}), {}
    for name, tensor in state.items():
        if is_quantised(name) and tensor.ndim == 2:
            parts, meaning[name] = quantise(name, tensor.detach())
        else:
            parts, meaning[name] = {name: tensor.detach()}, tensor.detach()
        file |= {prefix + part: value.contiguous() for part, value in parts.items()}
    save_file(file, path, metadata=metadata)
    return meaning


# fp8


def fp8_plain(name: str, weight: Tensor) -> tuple[State, Tensor]:
    codes = weight.to(E4M3)
    return {name: codes}, codes.float()


def fp8_scaled(name: str, weight: Tensor) -> tuple[State, Tensor]:
    """Comfy's old form: beside a tensor `scaled_fp8` in the file."""
    scale = weight.abs().max() / 448
    codes, layer = (weight / scale).to(E4M3), name.removesuffix("weight")
    scales = {f"{layer}scale_weight": scale, f"{layer}scale_input": torch.tensor(1.0)}
    return {name: codes} | scales, codes.float() * scale


def note(about: Mapping[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def fp8_comfy(name: str, weight: Tensor, dtype: torch.dtype = E4M3) -> tuple[State, Tensor]:
    scale = weight.abs().max() / torch.finfo(dtype).max
    codes, layer = (weight / scale).to(dtype), name.removesuffix("weight")
    about = {"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True}
    parts = {name: codes, f"{layer}weight_scale": scale, f"{layer}comfy_quant": note(about)}
    return parts | {f"{layer}input_scale": torch.tensor(0.5)}, codes.float() * scale


def fp8_rows(name: str, weight: Tensor) -> tuple[State, Tensor]:
    """BFL's fp8r."""
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(E4M3)
    parts = {name: codes, f"{name.removesuffix('weight')}weight_scale": scale}
    return parts, codes.float() * scale[:, None]


# int8


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def int8(name: str, weight: Tensor) -> tuple[State, Tensor]:
    codes, scale = int8_codes(weight)
    layer = name.removesuffix("weight")
    parts = {name: codes, f"{layer}weight_scale": scale}
    parts[f"{layer}comfy_quant"] = note({"format": "int8_tensorwise"})
    return parts, codes.float() * scale


def hadamard(size: int) -> Tensor:
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    turned = torch.ones(1, 1)
    while len(turned) < size:
        turned = torch.kron(turned, four)
    return turned


def int8_convrot(name: str, weight: Tensor, group: int = 64) -> tuple[State, Tensor]:
    turn = hadamard(group)
    codes, scale = int8_codes((weight.unflatten(1, (-1, group)) @ turn).flatten(1))
    layer = name.removesuffix("weight")
    about = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    parts = {name: codes, f"{layer}weight_scale": scale, f"{layer}comfy_quant": note(about)}
    numbers = codes.double() * scale.double()
    return parts, (numbers.unflatten(1, (-1, group)) @ turn.double()).flatten(1).float()


# nf4


def nf4(name: str, weight: Tensor, nested: bool = False) -> tuple[State, Tensor]:
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None] - NF4[:, None, None]).abs().argmin(0).to(torch.uint8)
    about = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*weight.shape]}
    parts = {f"{name}.absmax": absmax, f"{name}.quant_map": NF4.clone()}
    if nested:
        offset, table = float(absmax.mean()), torch.linspace(-1, 1, 256)
        runs = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        most = runs.abs().amax(1)
        near = (runs / most[:, None])[..., None] - table
        eight = near.abs().argmin(-1).flatten()[: len(absmax)].to(torch.uint8)
        absmax = table[eight.int()] * most.repeat_interleave(256)[: len(absmax)] + offset
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {f"{name}.absmax": eight, f"{name}.nested_absmax": most}
        parts |= {f"{name}.nested_quant_map": table}
    pairs = codes.view(-1, 2)
    parts[name] = (pairs[:, :1] << 4) | pairs[:, 1:]  # the even element is in the high half
    parts[f"{name}.quant_state.bitsandbytes__nf4"] = note(about)
    return parts, (NF4[codes.int()] * absmax[:, None]).view(weight.shape)


# GGUF


def write_gguf(
    path: Path,
    state: Mapping[str, Tensor],
    kind: str,
    others: str = "F32",
    names: Callable[[str], str] = lambda name: name,
    selected: Callable[[str], bool] = is_quantised,
) -> State:
    """As `write`, by the gguf package; blocks that it cannot make are drawn."""
    from ggml_blocks import gguf, random_blocks, read_by_gguf

    writer, meaning = gguf.GGUFWriter(path, "flux"), {}
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "longer text"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_quantization_version(2)
    for seed, (name, tensor) in enumerate(state.items()):
        tensor = tensor.detach().numpy()
        raw_kind = kind if selected(name) else "F32" if tensor.ndim == 1 else others
        raw_type = gguf.GGMLQuantizationType[raw_kind]
        try:
            raw = gguf.quants.quantize(tensor, raw_type)
        except NotImplementedError:
            raw = random_blocks(raw_kind, *tensor.shape, seed=seed)
        if raw_kind in ("F32", "F16"):
            meaning[name] = torch.from_numpy(raw.astype(np.float32))
        else:
            meaning[name] = read_by_gguf(raw_kind, raw)
        writer.add_tensor(names(name), raw, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning
