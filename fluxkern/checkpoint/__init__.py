"""Checkpoints: names and configurations in BFL's and diffusers' layouts; safetensors files only."""

from .._files import read_json
from .configs import (
    autoencoder_config_from_diffusers,
    autoencoder_config_from_state,
    autoencoder_config_to_diffusers,
    check_model_index,
    flux_config_from_diffusers,
    flux_config_from_state,
    flux_config_to_diffusers,
    require_text_to_image,
    variant,
)
from .convert import convert
from .encoders import load_clip, load_t5, parts_in
from .files import (
    INDEX,
    component_files,
    flux_config,
    load_autoencoder,
    load_flux,
    read_header,
    resolve,
    save_autoencoder,
    save_flux,
    weights_hash,
)
from .lora import Lora, lora_file, read_lora
from .names import (
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    flux_from_diffusers,
    flux_to_diffusers,
)

__all__ = [
    "INDEX",
    "Lora",
    "autoencoder_config_from_diffusers",
    "autoencoder_config_from_state",
    "autoencoder_config_to_diffusers",
    "autoencoder_from_diffusers",
    "autoencoder_to_diffusers",
    "check_model_index",
    "component_files",
    "convert",
    "flux_config",
    "flux_config_from_diffusers",
    "flux_config_from_state",
    "flux_config_to_diffusers",
    "flux_from_diffusers",
    "flux_to_diffusers",
    "load_autoencoder",
    "load_clip",
    "load_flux",
    "load_t5",
    "lora_file",
    "parts_in",
    "read_header",
    "read_json",
    "read_lora",
    "require_text_to_image",
    "resolve",
    "save_autoencoder",
    "save_flux",
    "variant",
    "weights_hash",
]
