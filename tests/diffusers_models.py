"""Tiny random diffusers FLUX models and inputs, and what their tests share."""

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn


def tiny_transformer(**changes: object) -> FluxTransformer2DModel:
    settings = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    }
    model = FluxTransformer2DModel(**{**settings, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs(
    model: FluxTransformer2DModel, batch: int = 2, side: int = 4, txt_len: int = 5
) -> dict[str, Tensor]:
    """What one call of the model takes, in its dtype; ids as a picture and a prompt have them."""
    config, img_len = model.config, side * side
    dtype = model.dtype  # the dtype of computing where weights are stored in another
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    found = {
        "hidden_states": torch.randn(batch, img_len, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(
            batch, txt_len, config.joint_attention_dim, dtype=dtype
        ),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.rand(batch).to(dtype),
        "img_ids": torch.cat((torch.zeros(img_len, 1), grid), 1),
        "txt_ids": torch.zeros(txt_len, 3),
    }
    if config.guidance_embeds:
        found["guidance"] = torch.full((batch,), 3.5).to(dtype)
    return found


def run(model: nn.Module, given: dict) -> Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def fused(sites: list) -> set[str]:
    return {site.name for site in sites if site.runs != "original"}
