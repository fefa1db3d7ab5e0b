"""Memory of a GPU that sampling and decoding take beside the weights: derived, not measured."""

import torch

from .transformer import FluxConfig

STREAMS = 20  # tensors of [tokens, C] at the widest of a step: a single block's, and some to spare
MAPS = 4  # of 256 channels in the picture's size, at the widest of a decoding
RESERVE = 10**9  # bytes: cuBLAS, cuDNN, the CUDA context, and what fragments


def step_bytes(config: FluxConfig, tokens: int, batch: int, itemsize: int) -> int:
    """Of one step: x, its norm, QKV, the MLP's 4 C, attention and what is joined of them.

    Args:
        config: of the transformer.
        tokens: of text and image.
        batch: pictures, twice of them with two-pass guidance.
        itemsize: bytes of a number.
    """
    return STREAMS * batch * tokens * config.hidden_size * itemsize


def decode_bytes(height: int, width: int, batch: int, itemsize: int) -> int:
    """Of the autoencoder's last blocks, whose maps have the picture's size and 256 channels."""
    return MAPS * batch * height * width * 256 * itemsize


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU; None of another device, where nothing asks for it."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
