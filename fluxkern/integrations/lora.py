"""LoRA files on a diffusers FLUX.1 pipeline, also of kinds that diffusers does not read."""

from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from .. import checkpoint
from ..model.adapters import Adapters

PARTS = ("transformer", "text_encoder", "text_encoder_2")
STATE = "_fluxkern_loras"  # of a transformer, which several pipelines may share


def load_lora(
    pipe: DiffusionPipeline,
    path_or_id: str | Path,
    scale: float = 1.0,
    name: str | None = None,
    *,
    allow_unused: bool = False,
) -> checkpoint.Lora:
    """Merge a LoRA into a diffusers FLUX.1 pipeline, whole or not at all.

    Layouts and kinds are those of `FluxPipeline.load_lora`. Weights are changed in place and their
    bases wait on the CPU until `unload_loras`, so the pipeline may be accelerated before or after.

    Args:
        pipe: a diffusers pipeline with a FluxTransformer2DModel.
        path_or_id: a .safetensors file, a folder that holds one, "org/name" or
            "org/name/file.safetensors" on the Hugging Face hub.
        scale: how much it counts; 0 leaves the bits of the base.
        name: None is the name of the file without its ending; each is loaded once.
        allow_unused: a key that fits nothing in the model is listed and no error.

    Returns:
        What it changes, and what became of each of its keys.

    Raises:
        ValueError: as `FluxPipeline.load_lora`; diffusers has adapters of its own loaded or has
            fused the projections; weights that are quantised or not in memory.
    """
    parts = {part: m for part in PARTS if (m := getattr(pipe, part, None)) is not None}
    _check(pipe, parts.get("transformer"))
    path = checkpoint.lora_file(path_or_id)
    lora = checkpoint.read_lora(path, parts, allow_unused=allow_unused)
    adapters = getattr(pipe.transformer, STATE, None) or Adapters({})
    adapters.parts |= parts
    adapters.add(path.stem if name is None else name, lora.updates, scale)
    setattr(pipe.transformer, STATE, adapters)
    return lora


def unload_loras(pipe: DiffusionPipeline) -> None:
    """Take away all that `load_lora` merged; the weights have the bits that they had before.

    Args:
        pipe: what was given to `load_lora`.
    """
    transformer = getattr(pipe, "transformer", None)
    if adapters := getattr(transformer, STATE, None):
        adapters.set({}, {})
        delattr(transformer, STATE)


def _check(pipe: DiffusionPipeline, transformer: nn.Module | None) -> None:
    kinds = [cls.__name__ for cls in type(transformer).__mro__]
    if "FluxTransformer2DModel" not in kinds:
        raise ValueError(
            f"pipe must have a FluxTransformer2DModel, got a {type(pipe).__name__} with {kinds[0]}"
        )
    if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
        raise ValueError("pipe must not have fused projections: call unfuse_qkv_projections first")
