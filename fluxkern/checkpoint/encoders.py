"""CLIP and T5 from the files that people have: single ones, quantised ones, parts of a pipeline."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..model.text_encoder import empty_encoder
from . import files
from .files import read_header
from .names import ALL_ROWS, Piece
from .stored import Quantised, Stored

if TYPE_CHECKING:
    from transformers import CLIPTextModel, T5EncoderModel

CLIP_PREFIX = "text_encoders.clip_l.transformer."
T5_PREFIX = "text_encoders.t5xxl.transformer."
UNUSED = (  # of CLIP as a whole; a pipeline of FLUX.1 takes its pooled state as it is
    "text_projection.weight",
    "logit_scale",
    "embeddings.position_ids",
)
TIED = "encoder.embed_tokens.weight"  # T5's embedding under a second name
OUTLIERS = "DenseReluDense.wo"  # T5's layers whose inputs are too uneven for 8 bits
T5_BLOCK = r"encoder.block.\1.layer."
GGUF_T5 = [  # llama.cpp's names, in the order of the layers
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", f"{T5_BLOCK}0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", rf"{T5_BLOCK}0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", f"{T5_BLOCK}0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", f"{T5_BLOCK}1.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", f"{T5_BLOCK}1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", f"{T5_BLOCK}1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", f"{T5_BLOCK}1.DenseReluDense.wo."),
]


PARTS = {  # of a pipeline: the prefixes that it has in a file, and a tensor that it alone has
    "transformer": (files.FLUX_PREFIXES, ("double_blocks.0.img_attn.proj.weight",)),
    "vae": (files.AUTOENCODER_PREFIXES, ("decoder.conv_in.weight",)),
    "text_encoder": ((CLIP_PREFIX,), ("text_model.embeddings.token_embedding.weight",)),
    "text_encoder_2": (
        (T5_PREFIX,),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "enc.blk.0.attn_q.weight"),
    ),
}


def parts_in(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Which parts of a pipeline lie in which of some files.

    Args:
        paths: .safetensors, .sft or .gguf files, each with one part or several.
    Returns:
        name of the component in a diffusers folder -> file.
    Raises:
        ValueError: a file that is not read or holds no part, or a part in two files.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        names = read_header(path)
        here = [part for part in PARTS if _holds(names, *PARTS[part])]
        if not here:
            first = next(iter(names), "nothing")
            raise ValueError(f"{path} holds no part of a FLUX.1 pipeline, but {first:.200}")
        for part in here:
            if part in found:
                raise ValueError(f"{part} must be in one file, got {found[part]} and {path}")
            found[part] = path
    return found


def _holds(names: Container[str], prefixes: tuple[str, ...], marks: tuple[str, ...]) -> bool:
    return any(prefix + mark in names for prefix in ("", *prefixes) for mark in marks)


def load_clip(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> "CLIPTextModel":
    """Loads CLIP-L's text model from a file, tensor by tensor.

    Args:
        path: a .safetensors, .sft or .gguf file under transformers' names, or with them behind
            "text_encoders.clip_l.transformer.".
        folder: whose config.json has its sizes.
        dtype: floating dtype of every parameter.
        device: where they are made.
    Raises:
        ValueError: as load_flux, for these files.
    """
    clip = empty_encoder("text_encoder", Path(folder))
    renames = ((r"^(?:text_model\.)?", ""),)
    stored = files.stored_in_single(Path(path), (CLIP_PREFIX,), renames)
    for name in UNUSED:
        stored.pop(name, None)
    _fill(clip, Path(path), stored, dtype, device)
    positions = torch.arange(clip.config.max_position_embeddings, device=device)
    clip.embeddings.position_ids = positions[None]
    return clip.eval().requires_grad_(False)


def load_t5(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    int8: bool = False,
) -> "T5EncoderModel":
    """Loads T5's encoder from a file or a folder, tensor by tensor, after a comparison of all.

    Args:
        path: a .safetensors, .sft or .gguf file, under transformers' names or llama.cpp's, or
            behind "text_encoders.t5xxl.transformer."; or a folder with model.safetensors.
        folder: whose config.json has its sizes.
        dtype: floating dtype of every parameter.
        device: where they are made.
        int8: linear layers are made 8 bits wide, each as it is read, but `wo`: its inputs have
            outliers.
    Raises:
        ValueError: as load_flux, for these files.
    """
    path = Path(path)
    t5 = empty_encoder("text_encoder_2", Path(folder))
    if path.is_dir():
        stored = files.stored_in_folder(path, "model")
    else:
        stored = files.stored_in_single(path, (T5_PREFIX,), GGUF_T5)
    if "shared.weight" in stored:
        stored.pop(TIED, None)
    elif TIED in stored:
        stored["shared.weight"] = stored.pop(TIED)
    linears = [
        name
        for name, module in t5.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(OUTLIERS)
    ]
    _fill(t5, path, stored, dtype, device, linears if int8 else [])
    t5.encoder.embed_tokens.weight = t5.shared.weight
    return t5.eval().requires_grad_(False)


def _fill(
    encoder: nn.Module,
    path: Path,
    stored: dict[str, Stored | Quantised],
    dtype: torch.dtype,
    device: torch.device | str,
    int8: Sequence[str] = (),
) -> None:
    shapes = {name: list(t.shape) for name, t in encoder.named_parameters()}  # what is tied once
    files.compare(path, stored, shapes)
    pieces = [Piece(name, ALL_ROWS, name, ALL_ROWS) for name in shapes]
    files.fill(encoder, pieces, stored, dtype, device, list(int8))
