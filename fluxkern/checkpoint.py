"""Checkpoints: names and configurations in BFL's and diffusers' layouts; safetensors files only."""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig
from fluxkern.model.transformer import CONFIGS, Flux, FluxConfig

WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
OWN_FILE = re.compile(rf"{WEIGHTS}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
FLUX_CLASS = "FluxTransformer2DModel"
AUTOENCODER_CLASS = "AutoencoderKL"
JSON_LIMIT = 16 * 2**20  # bytes
MAX_SIZE = 2**17
MAX_DEPTH = 256
NAMES_SHOWN = 8
PREFIX = "model.diffusion_model."
PICKLES = {".bin", ".pt", ".ckpt", ".pth", ".pkl", ".pickle"}
FETCHED = (".json", ".safetensors", ".txt", ".model")
COMPONENT_FILES = ("model_index.json", *(f"*/*{suffix}" for suffix in FETCHED))
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LORA = re.compile(r"(^|[._])(lora|lora_[A-Za-z]+|lokr_w\d\w*|hada_w\d\w*|dora_scale)([._]|$)")

# A native tensor is its parts joined along axis 0: each part has hidden_size rows and the last has
# the rest. "name:k" is the k-th stretch of hidden_size rows of a tensor that is itself in stretches.
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
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

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


@dataclass(frozen=True)
class Piece:
    """Some rows of a native tensor, and the tensor and rows that hold them in another layout."""

    native: str
    rows: slice
    name: str
    name_rows: slice


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, described by the header alone."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# names


def _flux_names(depth: int, singles: int, guidance: bool) -> dict[str, tuple[str, ...]]:
    linears = dict(TOP) | (GUIDANCE if guidance else {})
    norms = {}
    blocks = (
        ("double_blocks", "transformer_blocks", depth, DOUBLE, DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", singles, SINGLE, SINGLE_NORMS),
    )
    for ours, theirs, count, block_linears, block_norms in blocks:
        for n in range(count):
            for stem, parts in block_linears.items():
                linears[f"{ours}.{n}.{stem}"] = tuple(f"{theirs}.{n}.{part}" for part in parts)
            for stem, part in block_norms.items():
                norms[f"{ours}.{n}.{stem}.scale"] = (f"{theirs}.{n}.{part}.weight",)
    for stem, parts in linears.items():
        for kind in ("weight", "bias"):
            norms[f"{stem}.{kind}"] = tuple(_with_suffix(part, kind) for part in parts)
    return norms


def _with_suffix(part: str, kind: str) -> str:
    stem, colon, chunk = part.partition(":")
    return f"{stem}.{kind}{colon}{chunk}"


def _flux_pieces(depth: int, singles: int, guidance: bool, hidden: int) -> list[Piece]:
    pieces = []
    for native, parts in _flux_names(depth, singles, guidance).items():
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            rows = slice(i * hidden, None if last else (i + 1) * hidden)
            name, _, chunk = part.partition(":")
            start = int(chunk) * hidden if chunk else 0
            stop = start + hidden if chunk else None
            pieces.append(Piece(native, rows, name, slice(start, stop)))
    return pieces


def _count(names: Iterable[str], prefix: str) -> int:
    found = (re.match(rf"{prefix}\.(\d{{1,4}})\.", name) for name in names)
    return len({match[1] for match in found if match})


def _check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    found, expected = set(found), set(expected)
    if found != expected:
        problems = _listed("missing", sorted(expected - found))
        problems += _listed("unexpected", sorted(found - expected))
        raise ValueError(f"{what}: {'; '.join(problems)}")


def _listed(what: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    shown = ", ".join(f"{item:.200}" for item in items[:NAMES_SHOWN])
    more = ", ..." if len(items) > NAMES_SHOWN else ""
    return [f"{len(items)} {what} ({shown}{more})"]


def _hidden(sd: Mapping[str, Tensor], name: str) -> int:
    if name not in sd or sd[name].ndim != 2:
        raise ValueError(f"the state dict holds no matrix {name}, so it is no FLUX transformer")
    return sd[name].shape[0]


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
    pieces = _flux_pieces(
        _count(sd, "transformer_blocks"),
        _count(sd, "single_transformer_blocks"),
        any(".guidance_embedder." in name for name in sd),
        _hidden(sd, "x_embedder.weight"),
    )
    _check_names(sd, {piece.name for piece in pieces}, "diffusers transformer")
    parts: dict[str, list] = {}
    for piece in sorted(pieces, key=lambda piece: piece.rows.start):
        parts.setdefault(piece.native, []).append(sd[piece.name][piece.name_rows])
    return {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in parts.items()}


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
    pieces = _flux_pieces(
        _count(sd, "double_blocks"),
        _count(sd, "single_blocks"),
        any(name.startswith("guidance_in.") for name in sd),
        _hidden(sd, "img_in.weight"),
    )
    _check_names(sd, {piece.native for piece in pieces}, "BFL transformer")
    parts: dict[str, list] = {}
    for piece in sorted(pieces, key=lambda piece: piece.name_rows.start):
        parts.setdefault(piece.name, []).append(sd[piece.native][piece.rows])
    return {name: t[0] if len(t) == 1 else torch.cat(t) for name, t in parts.items()}


def _flip_level(name: str, levels: int) -> str:
    # up.0 is the finest level for BFL, up_blocks.0 the coarsest for diffusers
    def flip(match: re.Match) -> str:
        if int(match[2]) >= levels:
            raise ValueError(f"{name} names a level of the decoder, which has {levels}")
        return f"{match[1]}.{levels - 1 - int(match[2])}"

    return DECODER_LEVEL.sub(flip, name)


def _autoencoder_name_to_diffusers(name: str, levels: int) -> str:
    for ours, theirs in AUTOENCODER:
        name = name.replace(ours, theirs)
    return _flip_level(name, levels)


def _autoencoder_name_from_diffusers(name: str, levels: int) -> str:
    for ours, theirs in reversed(AUTOENCODER):
        name = name.replace(theirs, ours)
    return _flip_level(name, levels)


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
    levels = _count(sd, r"decoder\.up_blocks")
    out = {}
    for name, tensor in sd.items():
        native = _autoencoder_name_from_diffusers(name, levels)
        if _autoencoder_name_to_diffusers(native, levels) != name:
            raise ValueError(f"{name:.200} is no tensor of diffusers' {AUTOENCODER_CLASS}")
        if ATTENTION_WEIGHT.search(native):
            tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
        out[native] = tensor
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
    levels = _count(sd, r"decoder\.up")
    out = {}
    for name, tensor in sd.items():
        theirs = _autoencoder_name_to_diffusers(name, levels)
        if _autoencoder_name_from_diffusers(theirs, levels) != name:
            raise ValueError(f"{name:.200} is no tensor of BFL's autoencoder")
        out[theirs] = tensor.flatten(1) if ATTENTION_WEIGHT.search(name) else tensor
    return out


# configurations


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file of at most 16 MiB.

    Args:
        path: the file.
    Returns:
        the object, unchecked.
    Raises:
        ValueError: not readable, too large, no JSON, or no object.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(JSON_LIMIT + 1)
        if len(text) > JSON_LIMIT:
            raise ValueError(f"{path} must have at most {JSON_LIMIT} bytes, got more")
        data = json.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if type(data) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _check_fields(data: Mapping[str, Any], class_name: str, fields: Iterable[str]) -> None:
    if data.get("_class_name") != class_name:
        found = f"{data.get('_class_name')!r:.80}"
        raise ValueError(f"_class_name in the config must be {class_name!r}, got {found}")
    if "quantization_config" in data:
        raise ValueError("quantization_config in the config: quantised weights are not supported")
    unknown = [name for name in data if name not in fields and not name.startswith("_")]
    if unknown:
        raise ValueError(f"the config of {class_name} holds the unknown field {unknown[0]!r:.80}")


def _integer(data: Mapping[str, Any], name: str, default: Any, high: int, low: int = 1) -> int:
    value = data.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r:.80}")
    return value


def _integers(data: Mapping[str, Any], name: str, default: Any, high: int) -> tuple[int, ...]:
    value = data.get(name, default)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        raise ValueError(f"{name} must be a list of 1 to 16 integers, got {value!r:.80}")
    return tuple(_integer({name: item}, name, None, high) for item in value)


def _number(data: Mapping[str, Any], name: str, default: Any) -> float:
    value = data.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    return float(value)


def _fixed(data: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if data.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {data[name]!r:.80}")


FLUX_DEFAULTS = {  # FluxTransformer2DModel's own
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


def flux_config_from_diffusers(data: Mapping[str, Any]) -> FluxConfig:
    """Reads the fields of a transformer's config.json; a field that is not there has its default.

    Args:
        data: the JSON object; names that begin with "_" are not read, but for _class_name.
    Returns:
        the configuration, with hidden_size = num_attention_heads * attention_head_dim.
    Raises:
        ValueError: another class, an unknown field, or a value of a wrong type or size.
    Source: FluxTransformer2DModel of diffusers.
    """
    _check_fields(data, FLUX_CLASS, FLUX_DEFAULTS)
    _fixed(data, {"patch_size": 1})
    data = {**FLUX_DEFAULTS, **data}
    guidance = data["guidance_embeds"]
    if type(guidance) is not bool:
        raise ValueError(f"guidance_embeds must be true or false, got {guidance!r:.80}")
    if data["out_channels"] is None:
        data["out_channels"] = data["in_channels"]
    heads = _integer(data, "num_attention_heads", None, 1024)
    head_dim = _integer(data, "attention_head_dim", None, 1024)
    return FluxConfig(
        in_channels=_integer(data, "in_channels", None, MAX_SIZE),
        out_channels=_integer(data, "out_channels", None, MAX_SIZE),
        vec_in_dim=_integer(data, "pooled_projection_dim", None, MAX_SIZE),
        context_in_dim=_integer(data, "joint_attention_dim", None, MAX_SIZE),
        hidden_size=heads * head_dim,
        num_heads=heads,
        depth=_integer(data, "num_layers", None, MAX_DEPTH, low=0),
        depth_single_blocks=_integer(data, "num_single_layers", None, MAX_DEPTH, low=0),
        axes_dim=_integers(data, "axes_dims_rope", None, 1024),
        guidance_embed=guidance,
    )


def flux_config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """Writes a configuration as the fields of diffusers' config.json.

    Args:
        config: the configuration.
    Returns:
        the JSON object.
    Raises:
        ValueError: a value that diffusers' class cannot have (mlp_ratio, theta, qkv_bias).
    Source: FluxTransformer2DModel of diffusers.
    """
    _fixed(vars(config), {"mlp_ratio": 4.0, "theta": 10_000, "qkv_bias": True})
    return {
        "_class_name": FLUX_CLASS,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "axes_dims_rope": list(config.axes_dim),
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "out_channels": config.out_channels,
        "patch_size": 1,
        "pooled_projection_dim": config.vec_in_dim,
    }


def _dim(shapes: Mapping[str, Sequence[int]], name: str, axis: int, rank: int) -> int:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"there is no {name} among the tensors")
    if len(shape) != rank or not all(1 <= size <= MAX_SIZE for size in shape):
        raise ValueError(f"{name} must have {rank} axes of 1 to {MAX_SIZE}, got {list(shape)}")
    return shape[axis]


AXES_BY_HEAD_DIM = {128: (16, 56, 56), 64: (16, 24, 24)}


def flux_config_from_state(shapes: Mapping[str, Sequence[int]]) -> FluxConfig:
    """Infers a transformer's configuration from the shapes of its tensors under BFL's names.

    Args:
        shapes: name -> shape, without the prefix that some single files have.
    Returns:
        the configuration; axes_dim follows from the head dim and theta is 10000.
    Raises:
        ValueError: a tensor that is missing, or shapes that no FLUX transformer has.
    Source: Flux of black-forest-labs/flux.
    """
    hidden = _dim(shapes, "img_in.weight", 0, 2)
    head_dim = _dim(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 0, 1)
    if head_dim not in AXES_BY_HEAD_DIM or hidden % head_dim:
        raise ValueError(
            f"head dim must be one of {list(AXES_BY_HEAD_DIM)} and divide hidden_size {hidden}, "
            f"got {head_dim}"
        )
    return FluxConfig(
        in_channels=_dim(shapes, "img_in.weight", 1, 2),
        out_channels=_dim(shapes, "final_layer.linear.weight", 0, 2),
        vec_in_dim=_dim(shapes, "vector_in.in_layer.weight", 1, 2),
        context_in_dim=_dim(shapes, "txt_in.weight", 1, 2),
        hidden_size=hidden,
        mlp_ratio=_dim(shapes, "double_blocks.0.img_mlp.0.weight", 0, 2) / hidden,
        num_heads=hidden // head_dim,
        depth=_count(shapes, "double_blocks"),
        depth_single_blocks=_count(shapes, "single_blocks"),
        axes_dim=AXES_BY_HEAD_DIM[head_dim],
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


AUTOENCODER_IGNORED = ("sample_size", "force_upcast")  # no weight and no value depends on them


def autoencoder_config_from_diffusers(data: Mapping[str, Any]) -> AutoEncoderConfig:
    """Reads the fields of an AutoencoderKL's config.json; a field not there has its default.

    Args:
        data: the JSON object; names that begin with "_" are not read, but for _class_name.
    Returns:
        the configuration, with ch * ch_mult = block_out_channels.
    Raises:
        ValueError: another class, an unknown field, a value of a wrong type or size, or one that
            FLUX.1's autoencoder does not have (quantisation convolutions, no attention).
    Source: AutoencoderKL of diffusers.
    """
    fields = autoencoder_config_to_diffusers(AutoEncoderConfig())
    _check_fields(data, AUTOENCODER_CLASS, {*fields, *AUTOENCODER_IGNORED})
    for name in ("use_quant_conv", "use_post_quant_conv"):
        _fixed({name: data.get(name, True)}, {name: False})
    _fixed(data, {name: fields[name] for name in ("act_fn", "mid_block_add_attention")})
    _fixed(data, {"latents_mean": None, "latents_std": None})
    channels = _integers(data, "block_out_channels", (64,), MAX_SIZE)
    for name in ("down_block_types", "up_block_types"):
        kind = fields[name][0]
        _fixed({name: data.get(name, [kind])}, {name: [kind] * len(channels)})
    if any(size % channels[0] for size in channels):
        raise ValueError(f"block_out_channels must be multiples of its first, got {channels}")
    shift = data.get("shift_factor")
    return AutoEncoderConfig(
        in_channels=_integer(data, "in_channels", 3, 1024),
        out_channels=_integer(data, "out_channels", 3, 1024),
        ch=channels[0],
        ch_mult=tuple(size // channels[0] for size in channels),
        num_res_blocks=_integer(data, "layers_per_block", 1, 64),
        z_channels=_integer(data, "latent_channels", 4, 1024),
        norm_num_groups=_integer(data, "norm_num_groups", 32, 1024),
        scale_factor=_number(data, "scaling_factor", 0.18215),
        shift_factor=0.0 if shift is None else _number(data, "shift_factor", None),
    )


def autoencoder_config_to_diffusers(config: AutoEncoderConfig) -> dict[str, Any]:
    """Writes a configuration as the fields of an AutoencoderKL's config.json.

    Args:
        config: the configuration.
    Returns:
        the JSON object.
    Raises:
        ValueError: ch_mult does not begin with 1, which AutoencoderKL cannot have.
    Source: AutoencoderKL of diffusers.
    """
    _fixed({"ch_mult[0]": config.ch_mult[0]}, {"ch_mult[0]": 1})
    levels = len(config.ch_mult)
    return {
        "_class_name": AUTOENCODER_CLASS,
        "act_fn": "silu",
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def autoencoder_config_from_state(shapes: Mapping[str, Sequence[int]]) -> AutoEncoderConfig:
    """Infers an autoencoder's configuration from the shapes of its tensors under BFL's names.

    Args:
        shapes: name -> shape.
    Returns:
        the configuration; the groups and the latents' scale and shift are FLUX.1's.
    Raises:
        ValueError: a tensor that is missing, or shapes that no such autoencoder has.
    Source: AutoEncoder of black-forest-labs/flux.
    """
    ch = _dim(shapes, "encoder.conv_in.weight", 0, 4)
    levels = _count(shapes, r"encoder\.down")
    names = [f"encoder.down.{n}.block.0.conv1.weight" for n in range(levels)]
    channels = [_dim(shapes, name, 0, 4) for name in names]
    if any(size % ch for size in channels):
        raise ValueError(f"channels of the levels must be multiples of {ch}, got {channels}")
    return AutoEncoderConfig(
        in_channels=_dim(shapes, "encoder.conv_in.weight", 1, 4),
        out_channels=_dim(shapes, "decoder.conv_out.weight", 0, 4),
        ch=ch,
        ch_mult=tuple(size // ch for size in channels),
        num_res_blocks=_count(shapes, r"encoder\.down\.0\.block"),
        z_channels=_dim(shapes, "decoder.conv_in.weight", 1, 4),
    )


def variant(config: FluxConfig) -> str:
    """Names the FLUX.1 model that a configuration belongs to.

    Args:
        config: the configuration.
    Returns:
        a name of CONFIGS (Krea and Kontext have dev's configuration), else "fill" where the input
        has 384 channels, "control" where it has twice the output's, else "custom".
    """
    for name, known in CONFIGS.items():
        if config == known:
            return name
    if config.in_channels == 384:
        return "fill"
    return "control" if config.in_channels == 2 * config.out_channels else "custom"


def require_text_to_image(config: FluxConfig) -> None:
    """Refuses a transformer whose input is more than the noise: it needs another pipeline.

    Args:
        config: the configuration.
    Raises:
        ValueError: in_channels is not out_channels; the variant is named.
    """
    if config.in_channels != config.out_channels:
        name = {"fill": "FLUX.1 Fill", "control": "FLUX.1 Canny / Depth (control)"}
        raise ValueError(
            f"{name.get(variant(config), 'this FLUX.1 variant')} has no pipeline in fluxkern yet: "
            f"in_channels must be out_channels {config.out_channels}, got {config.in_channels}"
        )


def check_model_index(folder: str | Path) -> None:
    """Refuses a diffusers folder whose model_index.json names another pipeline than FluxPipeline.

    Args:
        folder: the pipeline's folder.
    Raises:
        ValueError: no model_index.json, or another class, which is named.
    """
    name = read_json(_member(Path(folder), "model_index.json")).get("_class_name")
    if name != "FluxPipeline":
        raise ValueError(
            f"{name!r:.80} has no pipeline in fluxkern yet: _class_name in "
            f"{folder}/model_index.json must be 'FluxPipeline'"
        )


# files


def _member(folder: Path, name: str) -> Path:
    # links may not lead out of the folder, but for a hub cache's, which lead to its own blobs
    path, home = folder / name, Path(os.path.realpath(folder))
    roots = [home]
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots.append(parent.parent / "blobs")
    real = Path(os.path.realpath(path))
    if os.path.basename(name) != name or not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{name!r:.200} leads out of the folder {folder}")
    if not real.is_file():
        raise ValueError(f"{folder} holds no file {name}")
    return path


def _check_is_safetensors(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code; only .safetensors is loaded")
    if suffix != ".safetensors":
        raise ValueError(f"{path} must be a .safetensors file, got {suffix or 'no suffix'}")
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # after the header's length
        return
    if head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is a pickle under another name; only .safetensors is loaded")
    what = {b"GGUF": "a GGUF file", b"vers": "a git-lfs pointer"}.get(head[:4], "something else")
    raise ValueError(f"{path} is not a safetensors file but {what} ({len(head)} bytes read)")


def _stored_in(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        _check_is_safetensors(path)
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error!s:.200}") from None
    for key, (_, kind) in kinds.items():
        if LORA.search(key):
            raise ValueError(f"{path} is a LoRA, not a model: it holds {key!r:.200}")
        if kind not in DTYPES:
            raise ValueError(
                f"{path}: {key:.200} must be one of {list(DTYPES)}, got {kind}; "
                f"quantised weights are not supported"
            )
    return {key: Stored(path, key, shape, DTYPES[kind]) for key, (shape, kind) in kinds.items()}


def _stored_in_folder(folder: Path) -> dict[str, Stored]:
    single = (folder / f"{WEIGHTS}.safetensors").exists()
    sharded = (folder / INDEX).exists()
    if single and sharded:
        raise ValueError(f"{folder} holds both {WEIGHTS}.safetensors and {INDEX}; remove one")
    if sharded:
        return _stored_in_shards(folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    if not single and pickles:
        raise ValueError(f"{folder} holds only the pickle {pickles[0]}; .safetensors is needed")
    return _stored_in(_member(folder, f"{WEIGHTS}.safetensors"))


def _stored_in_shards(folder: Path) -> dict[str, Stored]:
    index = read_json(_member(folder, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"weight_map in {folder / INDEX} must map names to file names")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(index.values())):
        if not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", shard):
            raise ValueError(f"{folder / INDEX} must name .safetensors files, got {shard!r:.200}")
        found = _stored_in(_member(folder, shard))
        expected = {name for name, file in index.items() if file == shard}
        _check_names(found, expected, f"{folder / shard} against the index")
        stored |= found
    return stored


def _compare(where: Path, stored: Mapping[str, Stored], shapes: Mapping[str, list[int]]) -> None:
    missing = [f"{name} {shape}" for name, shape in shapes.items() if name not in stored]
    unexpected = [f"{n} {list(s.shape)}" for n, s in stored.items() if n not in shapes]
    shaped = [
        f"{name} found {list(stored[name].shape)} expected {shape}"
        for name, shape in shapes.items()
        if name in stored and list(stored[name].shape) != shape
    ]
    problems = _listed("missing", missing) + _listed("unexpected", unexpected)
    problems += _listed("mis-shaped", shaped)
    if problems:
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems)}")


def _shapes_in_file(model: nn.Module, pieces: list[Piece], diffusers: bool) -> dict[str, list[int]]:
    native = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes: dict[str, list[int]] = {}
    for piece in pieces:
        rows, *rest = native[piece.native]
        if diffusers and ATTENTION_WEIGHT.search(piece.native):
            rest = rest[:1]
        before = shapes.get(piece.name, [0])[0]
        shapes[piece.name] = [before + len(range(rows)[piece.rows]), *rest]
    return shapes


class _Reader:
    """Reads stored tensors, with at most the bytes of the largest of them mapped at a time."""

    def __init__(self, stored: Iterable[Stored]) -> None:
        self.limit = max((entry.nbytes for entry in stored), default=0)
        self.path: Path | None = None
        self.mapped = 0

    def read(self, stored: Stored, rows: slice) -> Tensor:
        # pages once read count as memory until the file is closed
        self.mapped += stored.nbytes
        if stored.file != self.path or self.mapped > self.limit:
            self.file = None
            self.file = safe_open(stored.file, framework="pt")
            self.path, self.mapped = stored.file, stored.nbytes
        if rows == slice(0, None):
            return self.file.get_tensor(stored.key)
        return self.file.get_slice(stored.key)[rows]


def _fill(
    model: nn.Module,
    pieces: list[Piece],
    stored: Mapping[str, Stored],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.native, []).append(piece)
    reader, state, spoilt = _Reader(stored.values()), {}, []
    for name, meta in model.state_dict().items():
        kinds = (stored[piece.name].dtype for piece in parts[name])
        kind = dtype or reduce(torch.promote_types, kinds)
        state[name] = torch.empty(meta.shape, dtype=kind, device=device)
        for piece in parts[name]:
            target = state[name][piece.rows]
            source = stored[piece.name]
            target.copy_(reader.read(source, piece.name_rows).view(target.shape))
        low, high = torch.aminmax(state[name])
        if not (torch.isfinite(low) and torch.isfinite(high)):
            spoilt.append(name)
    if spoilt:
        problem = _listed("tensors with a NaN or an infinity", spoilt)[0]
        where = next(iter(stored.values())).file
        warnings.warn(f"{where}: {problem}", stacklevel=4)
    model.load_state_dict(state, assign=True)


def _load(
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    from_folder: Callable[[Path], tuple[nn.Module, list[Piece]]],
    from_shapes: Callable[[dict[str, tuple[int, ...]]], nn.Module],
) -> nn.Module:
    path = Path(path)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    if path.is_dir():
        model, pieces = from_folder(path)
        stored = _stored_in_folder(path)
    else:
        stored = _without_prefix(_stored_in(path))
        try:
            model = from_shapes({name: entry.shape for name, entry in stored.items()})
        except ValueError as error:
            raise ValueError(f"{path} is not a BFL checkpoint of this model: {error}") from None
        pieces = [Piece(n, slice(0, None), n, slice(0, None)) for n in model.state_dict()]
    _compare(path, stored, _shapes_in_file(model, pieces, path.is_dir()))
    _fill(model, pieces, stored, dtype, device)
    return model.eval()


def _without_prefix(stored: dict[str, Stored]) -> dict[str, Stored]:
    out = {name.removeprefix(PREFIX): entry for name, entry in stored.items()}
    if len(out) != len(stored):
        file = next(iter(stored.values())).file
        raise ValueError(f"{file} holds a tensor both with and without the prefix {PREFIX}")
    return out


def _meta(module: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return module(config)


def _flux_of_folder(folder: Path) -> tuple[Flux, list[Piece]]:
    try:
        config = flux_config_from_diffusers(read_json(_member(folder, "config.json")))
    except ValueError as error:
        raise ValueError(f"{folder} is not a transformer's folder: {error}") from None
    sizes = (config.depth, config.depth_single_blocks, config.guidance_embed, config.hidden_size)
    return _meta(Flux, config), _flux_pieces(*sizes)


def _autoencoder_of_folder(folder: Path) -> tuple[AutoEncoder, list[Piece]]:
    try:
        config = autoencoder_config_from_diffusers(read_json(_member(folder, "config.json")))
    except ValueError as error:
        raise ValueError(f"{folder} is not an autoencoder's folder: {error}") from None
    model, levels = _meta(AutoEncoder, config), len(config.ch_mult)
    every = slice(0, None)
    names = {name: _autoencoder_name_to_diffusers(name, levels) for name in model.state_dict()}
    return model, [Piece(native, every, name, every) for native, name in names.items()]


def load_flux(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Flux:
    """Loads a transformer, tensor by tensor, after all its names and shapes have been compared.

    Memory at its peak: the weights and the largest tensor of the file.

    Args:
        path: BFL's single .safetensors file, or a diffusers folder with config.json and one or
            more .safetensors files.
        dtype: of every parameter; None keeps what each tensor is stored in.
        device: where the parameters are made.
    Returns:
        the transformer, in evaluation mode. A NaN or an infinity in it is warned of by name.
    Raises:
        ValueError: a file that is not safetensors, is damaged, quantised or a LoRA; a missing,
            unexpected or mis-shaped tensor; a config that no FLUX transformer has.
    """
    return _load(
        path,
        dtype,
        device,
        _flux_of_folder,
        lambda shapes: _meta(Flux, flux_config_from_state(shapes)),
    )


def load_autoencoder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoEncoder:
    """Loads an autoencoder, tensor by tensor, after all its names and shapes have been compared.

    Args:
        path: BFL's ae.safetensors, or the folder of a diffusers AutoencoderKL.
        dtype: of every parameter; None keeps what each tensor is stored in.
        device: where the parameters are made.
    Returns:
        the autoencoder, in evaluation mode. A NaN or an infinity in it is warned of by name.
    Raises:
        ValueError: as load_flux.
    """
    return _load(
        path,
        dtype,
        device,
        _autoencoder_of_folder,
        lambda shapes: _meta(AutoEncoder, autoencoder_config_from_state(shapes)),
    )


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d{1,15})(|KB|MB|GB)", str(size))
    if not match or not int(match[1]):
        raise ValueError(f'max_shard_size must be bytes or like "10GB", got {size!r:.80}')
    return int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def _write_all(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    # all under temporary names first: a full disk leaves the folder as it was
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _tensor_writer(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Callable:
    def write(path: Path) -> None:
        ready = {
            name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
            for name, tensor in tensors.items()
        }
        try:
            save_file(ready, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path.parent} cannot be written: {error}") from None

    return write


def _json_writer(data: Mapping[str, Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    return write


def _shards(tensors: Mapping[str, Tensor], limit: int, itemsize: int | None) -> list[dict]:
    shards: list[dict[str, Tensor]] = []
    room = -1
    for name, tensor in tensors.items():
        size = tensor.numel() * (itemsize or tensor.element_size())
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size
    return shards


def _save_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str,
    dtype: torch.dtype | None,
) -> None:
    shards = _shards(tensors, _bytes(max_shard_size), dtype.itemsize if dtype else None)
    writers: dict[str, Callable[[Path], None]] = {}
    if len(shards) == 1:
        writers[f"{WEIGHTS}.safetensors"] = _tensor_writer(tensors, dtype)
    else:
        names = [f"{WEIGHTS}-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            writers[f"{name}.safetensors"] = _tensor_writer(shard, dtype)
        sizes = (t.numel() * (dtype or t.dtype).itemsize for t in tensors.values())
        pairs = zip(names, shards, strict=True)
        places = {key: f"{name}.safetensors" for name, shard in pairs for key in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        writers[INDEX] = _json_writer(index)
    writers["config.json"] = _json_writer(config)
    _write_all(folder, writers)
    for old in list(folder.iterdir()):  # of an earlier save in other pieces
        if OWN_FILE.fullmatch(old.name) and old.name not in writers:
            old.unlink()


def _save(
    path: str | Path,
    format: str,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    folder: Callable[[], tuple[dict[str, Any], dict[str, Tensor]]],
    file: Callable[[], dict[str, Tensor]],
) -> None:
    path = Path(path)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    if format == "diffusers":
        _save_folder(path, *folder(), max_shard_size, dtype)
    elif format == "bfl":
        if path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors for the format 'bfl', got {path}")
        _write_all(path.parent, {path.name: _tensor_writer(file(), dtype)})
    else:
        raise ValueError(f"format must be 'diffusers' or 'bfl', got {format!r:.80}")


def _single_file(model: nn.Module, infer: Callable[[dict], Any]) -> dict[str, Tensor]:
    # a single file has no config: what cannot be seen in the shapes would be lost
    state = model.state_dict()
    seen = vars(infer({name: tuple(tensor.shape) for name, tensor in state.items()}))
    for name, value in vars(model.config).items():
        if seen[name] != value:
            raise ValueError(f"{name} in a single BFL file is {seen[name]}, got {value}")
    return state


def save_flux(
    model: Flux,
    path: str | Path,
    *,
    format: str = "diffusers",
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Saves a transformer; the files appear whole or not at all.

    Args:
        model: the transformer.
        path: a folder for the format "diffusers", a .safetensors file for "bfl".
        format: "diffusers" or "bfl".
        max_shard_size: bytes, or such as "10GB"; only of a folder.
        dtype: of the tensors in the file; None keeps the model's.
    Raises:
        ValueError: an unknown format, or a configuration that the format cannot hold.
        OSError: the files could not be written; nothing of them is left.
    """
    _save(
        path,
        format,
        dtype,
        max_shard_size,
        lambda: (flux_config_to_diffusers(model.config), flux_to_diffusers(model.state_dict())),
        lambda: _single_file(model, flux_config_from_state),
    )


def save_autoencoder(
    model: AutoEncoder,
    path: str | Path,
    *,
    format: str = "diffusers",
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Saves an autoencoder; the files appear whole or not at all.

    Args:
        model: the autoencoder.
        path, format, max_shard_size, dtype: as save_flux.
    Raises:
        ValueError, OSError: as save_flux.
    """

    def folder() -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = autoencoder_config_to_diffusers(model.config)
        return config, autoencoder_to_diffusers(model.state_dict())

    def file() -> dict[str, Tensor]:
        return _single_file(model, autoencoder_config_from_state)

    _save(path, format, dtype, max_shard_size, folder, file)


def convert(src: str | Path, dst: str | Path, to: str) -> None:
    """Writes a transformer's or an autoencoder's checkpoint again in the layout `to`.

    Args:
        src: a single BFL file or a diffusers component folder; which model it is, is read there.
        dst: a folder for "diffusers", a .safetensors file for "bfl".
        to: "diffusers" or "bfl".
    Raises:
        ValueError, OSError: as load_flux and save_flux.
    """
    src = Path(src)
    if src.is_dir():
        autoencoder = read_json(_member(src, "config.json")).get("_class_name") == AUTOENCODER_CLASS
    else:
        autoencoder = "encoder.conv_in.weight" in _stored_in(src)
    if autoencoder:
        save_autoencoder(load_autoencoder(src), dst, format=to)
    else:
        save_flux(load_flux(src), dst, format=to)


def weights_hash(path: str | Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a checkpoint's weights.

    Args:
        path: a .safetensors file, a component's folder, or a pipeline's folder.
    Returns:
        the digits; for a folder, over the names and the bytes of its files in order.
    Raises:
        ValueError: no .safetensors file there.
    """
    path = Path(path)
    pattern = "*/*.safetensors" if (path / "model_index.json").is_file() else "*.safetensors"
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if not files:
        raise ValueError(f"{path} holds no .safetensors file")
    total = hashlib.sha256()
    for file in files:
        if path.is_dir():
            total.update(file.relative_to(path).as_posix().encode())
        with open(file, "rb") as data:
            total.update(hashlib.file_digest(data, "sha256").digest())
    return total.hexdigest()[:16]


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    allow_patterns: Sequence[str] = COMPONENT_FILES,
) -> Path:
    """The local folder or file that a path or an id on the Hugging Face hub stands for.

    Args:
        path_or_id: what exists on this machine; else "org/name", or "org/name/file.safetensors".
        revision: a branch, tag or commit of the hub's repository.
        allow_patterns: which of its files are fetched; each ends in .json, .safetensors, .txt or
            .model.
    Returns:
        the path given, or that of the copy in the hub's cache. HF_HUB_OFFLINE is obeyed.
    Raises:
        ValueError: neither a path nor an id, a pattern for other files, or nothing to be had.
    """
    if Path(path_or_id).exists():
        return Path(path_or_id)
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w./-]+))?", str(path_or_id))
    if not match or ".." in str(path_or_id):
        raise ValueError(f"{path_or_id} is neither a file or folder here nor an id like org/name")
    for pattern in (match[2],) if match[2] else allow_patterns:
        if not pattern.endswith(FETCHED):
            raise ValueError(f"only {', '.join(FETCHED)} files are fetched, got {pattern!r:.200}")
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        if match[2]:
            return Path(hf_hub_download(match[1], match[2], revision=revision))
        patterns = list(allow_patterns)
        return Path(snapshot_download(match[1], revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path_or_id} is not here and the hub does not give it: {reason[0]:.300}"
        ) from None
