"""Names of tensors: BFL's, which the modules carry, and diffusers'."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAMES_SHOWN = 8

# A native layer is its parts joined along axis 0: each has hidden_size rows and the last the rest.
# "name:k" is the k-th stretch of hidden_size rows of a layer that is itself in stretches.
TOP = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear:1", "norm_out.linear:0"),
}
GUIDANCE = {
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
}
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# parameters of a layer: the native name and diffusers'
LINEAR = (("weight", "weight"), ("bias", "bias"))
NORM = (("scale", "weight"),)

# replaced in this order towards diffusers, in the reverse order towards the native names
AUTOENCODER = (
    ("encoder.down.", "encoder.down_blocks."),
    ("decoder.up.", "decoder.up_blocks."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
)
DECODER_LEVEL = re.compile(r"(?<=^decoder\.up)(|_blocks)\.(\d{1,4})(?=\.)")
ATTENTION_WEIGHT = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")
ALL_ROWS = slice(0, None)


class Piece(NamedTuple):
    """Some rows of a native tensor, and the tensor and rows that hold them in another layout."""

    native: str
    rows: slice
    name: str
    name_rows: slice


def flux_pieces(depth: int, singles: int, guidance: bool, hidden: int) -> list[Piece]:
    """Where diffusers keeps each part of each tensor of a transformer."""
    layers = TOP | (GUIDANCE if guidance else {})
    blocks = (
        ("double_blocks", "transformer_blocks", depth, DOUBLE),
        ("single_blocks", "single_transformer_blocks", singles, SINGLE),
    )
    for ours, theirs, count, block in blocks:
        for n in range(count):
            for stem, parts in block.items():
                layers[f"{ours}.{n}.{stem}"] = tuple(f"{theirs}.{n}.{part}" for part in parts)
    return [
        piece
        for stem, parts in layers.items()
        for kind, their_kind in (NORM if stem.endswith("_norm") else LINEAR)
        for piece in _layer_pieces(f"{stem}.{kind}", parts, their_kind, hidden)
    ]


def _layer_pieces(native: str, parts: Sequence[str], kind: str, hidden: int) -> list[Piece]:
    pieces = []
    for i, part in enumerate(parts):
        rows = slice(i * hidden, (i + 1) * hidden if i < len(parts) - 1 else None)
        stem, _, stretch = part.partition(":")
        start = int(stretch or 0) * hidden
        stop = start + hidden if stretch else None
        pieces.append(Piece(native, rows, f"{stem}.{kind}", slice(start, stop)))
    return pieces


def autoencoder_pieces(names: Iterable[str], levels: int) -> list[Piece]:
    """Where diffusers keeps each tensor of an autoencoder, from the native names."""
    return [Piece(n, ALL_ROWS, _their_autoencoder_name(n, levels), ALL_ROWS) for n in names]


def count(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow the prefix, a regular expression, in the names."""
    found = (re.match(rf"{prefix}\.(\d{{1,4}})\.", name) for name in names)
    return len({match[1] for match in found if match})


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuses names that are missing or too many, all in one error that begins with `what`."""
    found, expected = set(found), set(expected)
    if found != expected:
        problems = listed("missing", sorted(expected - found))
        problems += listed("unexpected", sorted(found - expected))
        raise ValueError(f"{what}: {'; '.join(problems)}")


def listed(what: str, items: Sequence[str]) -> list[str]:
    """One line for a message: how many, and the first of them; none where there are none."""
    if not items:
        return []
    shown = ", ".join(f"{item:.200}" for item in items[:NAMES_SHOWN])
    return [f"{len(items)} {what} ({shown}{', ...' if len(items) > NAMES_SHOWN else ''})"]


def flux_from_diffusers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a transformer's tensors from diffusers' layout to the native one, which is BFL's.

    qkv = [to_q; to_k; to_v], linear1 = [to_q; to_k; to_v; proj_mlp], and the halves of the last
    modulation change places: (scale, shift) becomes (shift, scale).

    Args:
        sd: tensors of any dtype, on any device (meta too), under diffusers' names.
    Returns:
        tensors under BFL's names; what is not joined is a view of its source.
    Raises:
        ValueError: a missing or unexpected name.
    Source: FluxTransformer2DModel of diffusers; Flux of black-forest-labs/flux.
    """
    pieces = flux_pieces(
        count(sd, "transformer_blocks"),
        count(sd, "single_transformer_blocks"),
        any(".guidance_embedder." in name for name in sd),
        _hidden(sd, "x_embedder.weight"),
    )
    check_names(sd, {piece.name for piece in pieces}, "diffusers transformer")
    return _joined(sd, [Piece(p.name, p.name_rows, p.native, p.rows) for p in pieces])


def flux_to_diffusers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a transformer's tensors from BFL's names to diffusers', undoing flux_from_diffusers.

    Args:
        sd: tensors of any dtype, on any device (meta too), under BFL's names.
    Returns:
        tensors under diffusers' names; all but norm_out.linear are views of their source.
    Raises:
        ValueError: a missing or unexpected name.
    Source: FluxTransformer2DModel of diffusers; Flux of black-forest-labs/flux.
    """
    pieces = flux_pieces(
        count(sd, "double_blocks"),
        count(sd, "single_blocks"),
        any(name.startswith("guidance_in.") for name in sd),
        _hidden(sd, "img_in.weight"),
    )
    check_names(sd, {piece.native for piece in pieces}, "BFL transformer")
    return _joined(sd, pieces)


def _hidden(sd: Mapping[str, Tensor], name: str) -> int:
    if name not in sd or sd[name].ndim != 2:
        raise ValueError(f"the state dict holds no matrix {name}, so it is no FLUX transformer")
    return sd[name].shape[0]


def _joined(sd: Mapping[str, Tensor], pieces: Iterable[Piece]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.name_rows.start):
        parts.setdefault(piece.name, []).append(sd[piece.native][piece.rows])
    return {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in parts.items()}


def autoencoder_from_diffusers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an autoencoder's tensors from AutoencoderKL's names to the native ones, BFL's.

    The decoder's levels are counted from the other end, and the weights of the attention, matrices
    for diffusers, become 1x1 convolutions [C, C, 1, 1].

    Args:
        sd: tensors of any dtype, on any device (meta too), under diffusers' names.
    Returns:
        views of the same tensors under BFL's names.
    Raises:
        ValueError: a name of neither layout, or of the other one.
    Source: AutoencoderKL of diffusers; AutoEncoder of black-forest-labs/flux.
    """
    levels = count(sd, r"decoder\.up_blocks")
    out = {}
    for name, tensor in sd.items():
        native = _autoencoder_name(name, levels)
        _check_undone(name, _their_autoencoder_name(native, levels), "diffusers'")
        out[native] = tensor[..., None, None] if ATTENTION_WEIGHT.search(native) else tensor
    return out


def autoencoder_to_diffusers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an autoencoder's tensors to diffusers', undoing autoencoder_from_diffusers.

    Args:
        sd: tensors of any dtype, on any device (meta too), under BFL's names.
    Returns:
        views of the same tensors under diffusers' names.
    Raises:
        ValueError: a name of neither layout, or of the other one.
    Source: AutoencoderKL of diffusers; AutoEncoder of black-forest-labs/flux.
    """
    levels = count(sd, r"decoder\.up")
    out = {}
    for name, tensor in sd.items():
        theirs = _their_autoencoder_name(name, levels)
        _check_undone(name, _autoencoder_name(theirs, levels), "BFL's")
        out[theirs] = tensor.flatten(1) if ATTENTION_WEIGHT.search(name) else tensor
    return out


def _check_undone(name: str, back: str, layout: str) -> None:
    if back != name:
        raise ValueError(f"{name:.200} is no tensor of {layout} autoencoder")


def _their_autoencoder_name(name: str, levels: int) -> str:
    for ours, theirs in AUTOENCODER:
        name = name.replace(ours, theirs)
    return DECODER_LEVEL.sub(_flip(levels), name)


def _autoencoder_name(name: str, levels: int) -> str:
    for ours, theirs in reversed(AUTOENCODER):
        name = name.replace(theirs, ours)
    return DECODER_LEVEL.sub(_flip(levels), name)


def _flip(levels: int) -> Callable[[re.Match], str]:
    # up.0 is the finest level for BFL, up_blocks.0 the coarsest for diffusers
    def flip(match: re.Match) -> str:
        level = int(match[2])
        if level >= levels:
            raise ValueError(f"{match.string} names a level of the decoder, which has {levels}")
        return f"{match[1]}.{levels - 1 - level}"

    return flip
