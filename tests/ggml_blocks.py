"""Random blocks of ggml's types, and the numbers that the gguf package reads in them."""

import numpy as np
import pytest
import torch
from torch import Tensor

gguf = pytest.importorskip("gguf")  # the oracle; never a dependency of fluxkern

HALVES = {  # where a block has numbers in fp16: its scale, then its minimum
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes of a row]; every bit is drawn but those of the fp16 numbers."""
    rng = np.random.default_rng(seed)
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (rows * columns // size, nbytes), dtype=np.uint8)
    for at in HALVES[name]:
        half = rng.normal(0, 0.002, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = half.view(np.uint8)
    return blocks.reshape(rows, -1)


def read_by_gguf(name: str, blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]))
