"""Configurations in diffusers' config.json and in the shapes of BFL's files; FLUX.1's variants."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import check_folders, read_json
from ..model.autoencoder import AutoEncoderConfig
from ..model.transformer import CONFIGS, FluxConfig
from .names import count

FLUX_CLASS = "FluxTransformer2DModel"
AUTOENCODER_CLASS = "AutoencoderKL"
MAX_SIZE = 2**17
MAX_DEPTH = 256
MAX_FACTOR = 1e6  # of latents
AXES_BY_HEAD_DIM = {128: (16, 56, 56), 64: (16, 24, 24)}

# what diffusers takes where a field is not in the file
FLUX_DEFAULTS = {
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
AUTOENCODER_DEFAULTS = {
    "act_fn": "silu",
    "block_out_channels": (64,),
    "down_block_types": ["DownEncoderBlock2D"],
    "force_upcast": True,  # neither this nor sample_size changes a weight or a value
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "up_block_types": ["UpDecoderBlock2D"],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
AUTOENCODER_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def _completed(data: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    if data.get("_class_name") != name:
        found = f"{data.get('_class_name')!r:.80}"
        raise ValueError(f"_class_name in the config must be {name!r}, got {found}")
    check_quantization(data)
    own = {*defaults, "quantization_config"}
    unknown = [field for field in data if field not in own and not field.startswith("_")]
    if unknown:
        raise ValueError(f"the config of {name} holds the unknown field {unknown[0]!r:.80}")
    return {**defaults, **data}


def check_quantization(config: Mapping[str, Any]) -> None:
    """Refuses a config of weights that are quantised otherwise than by bitsandbytes in 4 bits.

    Args:
        config: a component's config.json; which layers are quantised is seen in its files.
    Raises:
        ValueError: names what it found.
    """
    about = config.get("quantization_config", {"load_in_4bit": True})
    if type(about) is not dict or about.get("quant_method", "bitsandbytes") != "bitsandbytes":
        found = about.get("quant_method") if type(about) is dict else about
        raise ValueError(
            f"quantization_config: quant_method must be bitsandbytes, got {found!r:.80}"
        )
    if about.get("load_in_4bit") is not True:
        raise ValueError("quantization_config: load_in_4bit must be true, bnb int8 is not read")


def _integer(data: Mapping[str, Any], name: str, high: int, low: int = 1) -> int:
    value = data[name]
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r:.80}")
    return value


def _integers(data: Mapping[str, Any], name: str, high: int) -> tuple[int, ...]:
    value = data[name]
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        raise ValueError(f"{name} must be a list of 1 to 16 integers, got {value!r:.80}")
    return tuple(_integer({name: item}, name, high) for item in value)


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data[name]
    if type(value) not in (int, float) or not abs(value) <= MAX_FACTOR:
        raise ValueError(
            f"{name} must be a finite number of at most {MAX_FACTOR:g}, got {value!r:.80}"
        )
    return float(value)


def _fixed(data: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if data[name] != value:
            raise ValueError(f"{name} must be {value!r}, got {data[name]!r:.80}")


def _dim(shapes: Mapping[str, Sequence[int]], name: str, axis: int, rank: int) -> int:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"there is no {name} among the tensors")
    if len(shape) != rank or not all(1 <= size <= MAX_SIZE for size in shape):
        raise ValueError(f"{name} must have {rank} axes of 1 to {MAX_SIZE}, got {list(shape)}")
    return shape[axis]


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
    data = _completed(data, FLUX_CLASS, FLUX_DEFAULTS)
    _fixed(data, {"patch_size": 1})
    if type(data["guidance_embeds"]) is not bool:
        raise ValueError(f"guidance_embeds must be a bool, got {data['guidance_embeds']!r:.80}")
    if data["out_channels"] is None:
        data["out_channels"] = data["in_channels"]
    heads = _integer(data, "num_attention_heads", 1024)
    return FluxConfig(
        in_channels=_integer(data, "in_channels", MAX_SIZE),
        out_channels=_integer(data, "out_channels", MAX_SIZE),
        vec_in_dim=_integer(data, "pooled_projection_dim", MAX_SIZE),
        context_in_dim=_integer(data, "joint_attention_dim", MAX_SIZE),
        hidden_size=heads * _integer(data, "attention_head_dim", 1024),
        num_heads=heads,
        depth=_integer(data, "num_layers", MAX_DEPTH, low=0),
        depth_single_blocks=_integer(data, "num_single_layers", MAX_DEPTH, low=0),
        axes_dim=_integers(data, "axes_dims_rope", 1024),
        guidance_embed=data["guidance_embeds"],
    )


def flux_config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """Writes a configuration as the fields of diffusers' config.json.

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
        depth=count(shapes, "double_blocks"),
        depth_single_blocks=count(shapes, "single_blocks"),
        axes_dim=AXES_BY_HEAD_DIM[head_dim],
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


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
    data = _completed(data, AUTOENCODER_CLASS, AUTOENCODER_DEFAULTS)
    _fixed(data, AUTOENCODER_FIXED)
    channels = _integers(data, "block_out_channels", MAX_SIZE)
    for name in ("down_block_types", "up_block_types"):
        _fixed(data, {name: AUTOENCODER_DEFAULTS[name] * len(channels)})
    if any(size % channels[0] for size in channels):
        raise ValueError(f"block_out_channels must be multiples of its first, got {channels}")
    if data["shift_factor"] is None:
        data["shift_factor"] = 0.0
    return AutoEncoderConfig(
        in_channels=_integer(data, "in_channels", 1024),
        out_channels=_integer(data, "out_channels", 1024),
        ch=channels[0],
        ch_mult=tuple(size // channels[0] for size in channels),
        num_res_blocks=_integer(data, "layers_per_block", 64),
        z_channels=_integer(data, "latent_channels", 1024),
        norm_num_groups=_integer(data, "norm_num_groups", 1024),
        scale_factor=_number(data, "scaling_factor"),
        shift_factor=_number(data, "shift_factor"),
    )


def autoencoder_config_to_diffusers(config: AutoEncoderConfig) -> dict[str, Any]:
    """Writes a configuration as the fields of an AutoencoderKL's config.json.

    Raises:
        ValueError: ch_mult does not begin with 1, which AutoencoderKL cannot have.
    Source: AutoencoderKL of diffusers.
    """
    _fixed({"ch_mult[0]": config.ch_mult[0]}, {"ch_mult[0]": 1})
    levels = len(config.ch_mult)
    return AUTOENCODER_FIXED | {
        "_class_name": AUTOENCODER_CLASS,
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "down_block_types": AUTOENCODER_DEFAULTS["down_block_types"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "up_block_types": AUTOENCODER_DEFAULTS["up_block_types"] * levels,
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
    levels = range(count(shapes, r"encoder\.down"))
    channels = [_dim(shapes, f"encoder.down.{n}.block.0.conv1.weight", 0, 4) for n in levels]
    if any(size % ch for size in channels):
        raise ValueError(f"channels of the levels must be multiples of {ch}, got {channels}")
    return AutoEncoderConfig(
        in_channels=_dim(shapes, "encoder.conv_in.weight", 1, 4),
        out_channels=_dim(shapes, "decoder.conv_out.weight", 0, 4),
        ch=ch,
        ch_mult=tuple(size // ch for size in channels),
        num_res_blocks=count(shapes, r"encoder\.down\.0\.block"),
        z_channels=_dim(shapes, "decoder.conv_in.weight", 1, 4),
    )


def variant(config: FluxConfig) -> str:
    """Names the FLUX.1 model that a configuration belongs to.

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

    Raises:
        ValueError: no model_index.json, or another class, which is named; a component that is a
            link to another user's folder.
    """
    path = Path(folder) / "model_index.json"
    name = read_json(path).get("_class_name")
    check_folders(path.parent)
    if name != "FluxPipeline":
        raise ValueError(
            f"{name!r:.80} has no pipeline in fluxkern yet: _class_name in {path} must be "
            f"'FluxPipeline'"
        )
