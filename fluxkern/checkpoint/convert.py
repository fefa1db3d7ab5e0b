"""A checkpoint written again: in the other layout, or in 8 bits."""

from pathlib import Path

from .._files import read_json
from ..model.int8 import comfy_state
from . import configs
from .encoders import TIED, load_t5
from .files import (
    load_autoencoder,
    load_flux,
    read_header,
    save_autoencoder,
    save_flux,
    write_single,
)


def convert(src: str | Path, dst: str | Path, to: str, dtype: str | None = None) -> None:
    """Writes a transformer's or an autoencoder's checkpoint again in the layout `to`.

    Args:
        src: a single file or a diffusers component folder; which model it is, is read there. With
            "int8" T5's folder too.
        dst: a folder for "diffusers", a .safetensors file for "bfl".
        to: "diffusers" or "bfl".
        dtype: "int8" quantises a transformer's blocks, or T5 but for its layers with outliers, for
            "bfl"; None keeps what is there.
    Raises:
        ValueError, OSError: as load_flux, load_t5 and save_flux.
    """
    if dtype not in (None, "int8"):
        raise ValueError(f"dtype must be 'int8' or None, got {dtype!r:.80}")
    src, dst = Path(src), Path(dst)
    kind = _kind(src)
    if dtype and (kind == "autoencoder" or to != "bfl"):
        raise ValueError(f"dtype int8 is for a transformer or T5 to bfl, got {kind} to {to}")
    if kind == "t5" and dtype:
        state = comfy_state(load_t5(src, src, int8=True))
        write_single(dst, {name: tensor for name, tensor in state.items() if name != TIED})
    elif kind == "autoencoder":
        save_autoencoder(load_autoencoder(src), dst, format=to)
    else:
        save_flux(load_flux(src, int8=dtype == "int8"), dst, format=to)


def _kind(src: Path) -> str:
    if not src.is_dir():
        return "autoencoder" if "encoder.conv_in.weight" in read_header(src) else "transformer"
    config = read_json(src / "config.json")
    if config.get("_class_name") == configs.AUTOENCODER_CLASS:
        return "autoencoder"
    return "t5" if config.get("model_type") == "t5" else "transformer"
