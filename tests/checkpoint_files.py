"""Small checkpoints for tests."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import nn

from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig
from fluxkern.model.transformer import Flux, FluxConfig

TINY_FLUX = FluxConfig(
    in_channels=8,
    out_channels=8,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=64,
    num_heads=1,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(16, 24, 24),
    guidance_embed=True,
)
TINY_AUTOENCODER = AutoEncoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tiny_flux(**changes: object) -> Flux:
    return randomise(Flux(FluxConfig(**{**vars(TINY_FLUX), **changes})))


def tiny_autoencoder() -> AutoEncoder:
    return randomise(AutoEncoder(TINY_AUTOENCODER))


def write_raw_safetensors(path: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    """Writes a header by hand: name -> (dtype code, shape, bytes); the data are zeros."""
    header, offset = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and _bits(x).equal(_bits(b[name]))
        for name, x in a.items()
    )


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().flatten().view(torch.uint8)
