"""Which tensors of safetensors files are together one quantised weight, and in which format.

Sources: QUANTIZATION.md of Comfy-Org/ComfyUI; the BFL quantizer of diffusers; `Params4bit` and
`QuantState` of bitsandbytes.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .stored import CODES, Nested, Quantised, Stored

NOTE_LIMIT = 2**16  # bytes of a tensor that holds JSON
COMFY = {  # formats of Comfy that are read, and the dtype of their weights
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
}
GROUP = 256  # inputs that ConvRot turns together where the file does not say it
METADATA = "_quantization_metadata"
NF4 = ".quant_state.bitsandbytes__"
OTHERS = {  # tensors that only formats have which are not read
    "qweight": "nunchaku SVDQuant, GPTQ or AWQ",
    "SCB": "bitsandbytes int8",
    "weight_scale_2": "nvfp4",
    "pre_quant_scale": "AWQ of modelopt",
}
INPUT_SCALES = ("input_scale", "scale_input")  # of the activations: ours are measured as they come
IGNORED = ("comfy_attention.config",)  # the name of an attention backend


def grouped(
    entries: Mapping[str, Stored], metadata: Mapping[Path, Mapping[str, str]]
) -> dict[str, Stored | Quantised]:
    """Finds the quantised weights among the tensors of safetensors files.

    Args:
        entries: name -> tensor, of one file or of all shards.
        metadata: file -> the texts in its header.
    Returns:
        name -> tensor, without the parts that belong to a quantised weight; in the same order.
    Raises:
        ValueError: a format that is not read, or parts that do not fit together.
    """
    left = dict(entries)
    for name in entries:
        if name.rpartition(".")[2] in OTHERS:
            raise ValueError(_not_read(left[name], OTHERS[name.rpartition(".")[2]]))
    formats = _comfy_formats(left, metadata)
    states = {name.partition(NF4)[0]: name for name in entries if NF4 in name}
    out: dict[str, Stored | Quantised] = {}
    for name in entries:
        layer = name.removesuffix("weight")
        if name in states:
            out[name] = _nf4(left, name, states.pop(name))
        elif name.endswith(".weight") and (layer in formats or left[name].dtype in CODES):
            out[name] = _of_codes(left, name, formats.pop(layer, {}))
    if without := [*formats, *states]:
        raise ValueError(f"{next(iter(metadata))}: {without[0]:.200} has a format but no weight")
    out |= {name: _plain(entry) for name, entry in left.items() if name not in out}
    return {name: out[name] for name in entries if name in out}


def _not_read(entry: Stored, found: object) -> str:
    return (
        f"{entry.file}: {entry.key:.200} is of the format {found!s:.80}, which is not read; those "
        f"read are GGUF, fp8 with and without scales, {', '.join(COMFY)} and bitsandbytes nf4"
    )


def _plain(entry: Stored) -> Stored | Quantised:
    """A tensor by itself: numbers, or fp8 without a scale."""
    if entry.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return Quantised(entry, entry.shape, "fp8", "codes8")
    if not entry.dtype.is_floating_point:
        raise ValueError(
            f"{entry.file}: {entry.key:.200} is {entry.dtype} and no part of a quantised weight "
            f"in a format that is read"
        )
    return entry


# Comfy's and BFL's


def _comfy_formats(
    left: dict[str, Stored], metadata: Mapping[Path, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Layer, with the dot at its end -> what its format is; takes the notes out of `left`."""
    formats: dict[str, dict[str, Any]] = {}
    for file, texts in metadata.items():
        if METADATA in texts:
            layers = _json(texts[METADATA].encode(), file, METADATA).get("layers")
            if not isinstance(layers, dict):
                raise ValueError(f"{file}: {METADATA} has no layers")
            formats |= {f"{layer}.": about for layer, about in layers.items()}
    for name in list(left):
        layer, _, part = name.rpartition(".")
        if part == "comfy_quant":
            formats[f"{layer}."] = _note(left.pop(name))
        elif part == "scaled_fp8" or name.endswith(IGNORED):
            del left[name]
    for layer, about in formats.items():
        if not isinstance(about, dict) or not isinstance(about.get("format"), str):
            raise ValueError(
                f"{next(iter(metadata))}: the format of {layer:.200} is not said: {about!r:.80}"
            )
    return formats


def _of_codes(left: dict[str, Stored], name: str, about: dict[str, Any]) -> Quantised:
    """fp8 or int8 with a scale for all, or one a row."""
    codes, layer = left.pop(name), name.removesuffix("weight")
    expected = COMFY.get(about.get("format", "int8_tensorwise"))
    if expected is None:
        raise ValueError(_not_read(codes, about["format"]))
    if about and codes.dtype != expected:
        raise ValueError(
            f"{codes.file}: {codes.key:.200} must be {expected} as its format "
            f"{about['format']} says, got {codes.dtype}"
        )
    scales = [left.pop(layer + part, None) for part in ("weight_scale", "scale_weight")]
    for part in INPUT_SCALES:
        left.pop(layer + part, None)
    scale = _scale(codes, [scale for scale in scales if scale is not None])
    kind = "int8" if codes.dtype == torch.int8 else "fp8"
    return Quantised(codes, codes.shape, kind, "codes8", scale, rotation=_rotation(codes, about))


def _scale(codes: Stored, scales: list[Stored]) -> Stored | None:
    if not scales and codes.dtype != torch.int8:
        return None
    if len(scales) != 1:
        raise ValueError(f"{codes.file}: {codes.key:.200} must have 1 scale, got {len(scales)}")
    (scale,) = scales
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = "nvfp4" if scale.dtype == torch.float8_e4m3fn else f"mxfp8 ({scale.dtype})"
        raise ValueError(_not_read(codes, found))
    count, rows = math.prod(scale.shape), codes.shape[0]
    if count not in (1, rows) or (count > 1 and scale.shape not in ((rows,), (rows, 1))):
        raise ValueError(
            f"{codes.file}: {scale.key:.200} must be one number or one a row, {[rows, 1]}, "
            f"got {list(scale.shape)}"
        )
    return scale


def _rotation(codes: Stored, about: dict[str, Any]) -> int:
    if not about.get("convrot", False):
        return 0
    group = about.get("convrot_groupsize", GROUP)
    columns = math.prod(codes.shape[1:])
    if type(group) is not int or group not in [4**n for n in range(9)] or columns % group:
        raise ValueError(
            f"{codes.file}: {codes.key:.200}: convrot_groupsize must be a power of 4 that divides "
            f"{columns}, got {group!r:.80}"
        )
    return group


# bitsandbytes'


def _nf4(left: dict[str, Stored], name: str, state: str) -> Quantised:
    codes, about = left.pop(name), _note(left.pop(state))
    kind = state.removeprefix(name + NF4)
    if kind != "nf4" or about.get("quant_type") != "nf4":
        raise ValueError(_not_read(codes, f"bitsandbytes {kind}"))
    shape, size = about.get("shape"), about.get("blocksize")
    if not _are_sizes(shape) or len(shape) != 2 or math.prod(shape) != 2 * codes.nbytes:
        raise ValueError(
            f"{codes.file}: {codes.key:.200} of {codes.nbytes} bytes must hold [N, K] of twice as "
            f"many numbers, got {shape!r:.80}"
        )
    if not _are_sizes([size]) or shape[1] % size:
        raise ValueError(
            f"{codes.file}: {codes.key:.200}: blocksize must divide its {shape[1]} columns, "
            f"got {size!r:.80}"
        )
    blocks = math.prod(shape) // size
    scale = _part(left, codes, f"{name}.absmax", blocks)
    table = _part(left, codes, f"{name}.quant_map", 16)
    nested = None
    if scale.dtype == torch.uint8:
        nested = _nested(left, codes, name, about, blocks)
    rows = Stored(codes.file, codes.key, (shape[0], shape[1] // 2), torch.uint8, codes.offset)
    return Quantised(rows, tuple(shape), "nf4", "codes4", scale, table, nested)


def _nested(
    left: dict[str, Stored], codes: Stored, name: str, about: dict[str, Any], blocks: int
) -> Nested:
    size, offset = about.get("nested_blocksize"), about.get("nested_offset")
    if not _are_sizes([size]) or type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError(
            f"{codes.file}: {codes.key:.200}: nested_blocksize and nested_offset must be numbers, "
            f"got {size!r:.80} and {offset!r:.80}"
        )
    scale = _part(left, codes, f"{name}.nested_absmax", -(-blocks // size))
    table = _part(left, codes, f"{name}.nested_quant_map", 256)
    return Nested(table, scale, size, float(offset))


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 < v < 2**31 for v in values)


def _part(left: dict[str, Stored], codes: Stored, name: str, count: int) -> Stored:
    part = left.pop(name, None)
    if part is None or math.prod(part.shape) != count:
        found = "none" if part is None else list(part.shape)
        raise ValueError(f"{codes.file}: {name:.200} must hold {count} numbers, got {found}")
    return part


# notes in JSON


def _note(entry: Stored) -> dict[str, Any]:
    if entry.dtype != torch.uint8 or entry.nbytes > NOTE_LIMIT:
        raise ValueError(
            f"{entry.file}: {entry.key:.200} must be uint8 of at most {NOTE_LIMIT} bytes, "
            f"got {entry.dtype} of {entry.nbytes}"
        )
    return _json(bytes(entry.map().flatten().tolist()), entry.file, entry.key)


def _json(text: bytes, file: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if type(data) is not dict:
        raise ValueError(f"{file}: {name:.200} is not a JSON object")
    return data
