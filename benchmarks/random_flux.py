"""Random weights of FLUX.1 at full size, written tensor by tensor: files to load, not to draw with.

    python -m benchmarks.random_flux FILE [--variant schnell] [--dtype int8|bfloat16]

int8 is Comfy's `int8_tensorwise`, 12 GB; bf16 takes 24 GB.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fluxkern.model.int8 import block_linears
from fluxkern.model.transformer import CONFIGS, Flux

COMFY_NOTE = b'{"format": "int8_tensorwise"}'
SPREAD = 0.02  # of the weights, about that of FLUX.1
CODES = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
Header = dict[str, dict[str, object]]


def tensors(variant: str, dtype: str) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of everything in the file."""
    with torch.device("meta"):
        flux = Flux(CONFIGS[variant])
    quantised = {f"{name}.weight" for name in block_linears(flux)} if dtype == "int8" else set()
    for name, tensor in flux.state_dict().items():
        if name not in quantised:
            yield name, torch.bfloat16, tuple(tensor.shape)
            continue
        layer = name.removesuffix("weight")
        yield name, torch.int8, tuple(tensor.shape)
        yield f"{layer}weight_scale", torch.float32, (tensor.shape[0], 1)
        yield f"{layer}comfy_quant", torch.uint8, (len(COMFY_NOTE),)


def drawn(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if dtype == torch.uint8:
        return torch.tensor(list(COMFY_NOTE), dtype=torch.uint8)
    if dtype == torch.int8:  # a normal distribution to four deviations
        return (torch.randn(shape) * 32).round_().clamp_(-127, 127).to(dtype)
    if name.endswith("weight_scale"):
        return torch.full(shape, SPREAD / 32)
    return torch.randn(shape).mul_(SPREAD).add_(name.endswith("_norm.scale")).to(dtype)


def write(path: Path, variant: str, dtype: str) -> None:
    """Writes the file with one tensor in memory at a time."""
    header: Header = {}
    offset = 0
    for name, kind, shape in tensors(variant, dtype):
        end = offset + torch.Size(shape).numel() * kind.itemsize
        header[name] = {"dtype": CODES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind, shape in tensors(variant, dtype):
            file.write(drawn(name, kind, shape).view(torch.uint8).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--variant", choices=("dev", "schnell"), default="schnell")
    parser.add_argument("--dtype", choices=("int8", "bfloat16"), default="int8")
    args = parser.parse_args()
    torch.manual_seed(0)
    write(args.path, args.variant, args.dtype)


if __name__ == "__main__":
    main()
