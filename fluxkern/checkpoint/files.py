"""Files of weights: loaded and saved as safetensors only, in BFL's layout or diffusers'."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import (
    PICKLES,
    check_file,
    new_folder,
    read_json,
    read_tensor_header,
    read_weight_map,
    write_files,
    write_json,
    write_tensors,
)
from ..model.autoencoder import AutoEncoder
from ..model.int8 import block_linears, comfy_state, int8_state, is_int8, to_int8, with_adapters
from ..model.transformer import Flux, FluxConfig
from . import configs, names
from .gguf import MAGIC, read_gguf
from .names import ALL_ROWS, Piece
from .quantised import grouped
from .stored import FLOATS, Maps, Quantised, Stored

WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
OWN_FILE = re.compile(rf"config\.json|{WEIGHTS}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
# the parts of a file that holds a whole pipeline
FLUX_PREFIXES = ("model.diffusion_model.",)
AUTOENCODER_PREFIXES = ("vae.", "first_stage_model.")
OTHER_PARTS = (*FLUX_PREFIXES, *AUTOENCODER_PREFIXES, "text_encoders.")
Renames = Sequence[tuple[str, str]]
NORM_WEIGHT = ((r"(\.norm\.(?:query|key)_norm)\.weight$", r"\1.scale"),)
FETCHED = (".json", ".safetensors", ".txt", ".model")
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")  # those with weights
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}
LORA = re.compile(r"(^|[._])(lora|lora_[A-Za-z]+|lokr_w\d\w*|hada_w\d\w*|dora_scale)([._]|$)")


@dataclass(frozen=True)
class _Kind:
    """What loading and saving need to know of a model."""

    module: Callable[[Any], nn.Module]
    config_from_diffusers: Callable[[dict[str, Any]], Any]
    config_to_diffusers: Callable[[Any], dict[str, Any]]
    config_from_state: Callable[[dict[str, tuple[int, ...]]], Any]
    prefixes: tuple[str, ...]
    renames: Renames
    to_diffusers: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    pieces: Callable[[nn.Module], list[Piece]]


def _flux_pieces(model: Flux) -> list[Piece]:
    config = model.config
    return names.flux_pieces(
        config.depth, config.depth_single_blocks, config.guidance_embed, config.hidden_size
    )


def _autoencoder_pieces(model: AutoEncoder) -> list[Piece]:
    return names.autoencoder_pieces(model.state_dict(), len(model.config.ch_mult))


FLUX = _Kind(
    Flux,
    configs.flux_config_from_diffusers,
    configs.flux_config_to_diffusers,
    configs.flux_config_from_state,
    FLUX_PREFIXES,
    NORM_WEIGHT,
    names.flux_to_diffusers,
    _flux_pieces,
)
AUTOENCODER = _Kind(
    AutoEncoder,
    configs.autoencoder_config_from_diffusers,
    configs.autoencoder_config_to_diffusers,
    configs.autoencoder_config_from_state,
    AUTOENCODER_PREFIXES,
    (),
    names.autoencoder_to_diffusers,
    _autoencoder_pieces,
)


# what files hold


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def stored_in(
    path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file as they are stored, and the texts in its header."""
    header, texts, first = read_tensor_header(path)
    entries = {}
    for key, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if about["dtype"] not in dtypes:
            raise ValueError(
                f"{path}: {key:.200} must be one of {list(dtypes)}, got {about['dtype']}"
            )
        dtype, begin = dtypes[about["dtype"]], first + about["data_offsets"][0]
        entries[key] = Stored(path, key, tuple(about["shape"]), dtype, begin)
    return entries, texts


def _entries(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """As `stored_in`, of a model."""
    entries, texts = stored_in(path)
    if lora := next(filter(LORA.search, entries), None):
        raise ValueError(f"{path} is a LoRA, not a model: it holds {lora!r:.200}")
    return entries, texts


def read_header(path: str | Path) -> dict[str, Stored | Quantised]:
    """Reads which tensors a safetensors or a GGUF file holds, without their values.

    Args:
        path: the file.
    Returns:
        name -> what is known of the tensor; a quantised weight and its scales are one.
    Raises:
        ValueError: a pickle or another kind of file, damaged, a LoRA, or quantised in a way that is
            not read.
    """
    path = Path(path)
    if _is_gguf(path):
        return read_gguf(path)
    entries, texts = _entries(path)
    return grouped(entries, {path: texts})


def stored_in_single(
    path: Path, prefixes: tuple[str, ...], renames: Renames = ()
) -> dict[str, Stored | Quantised]:
    """The part of a file that lies under one of the prefixes, or under none, by its own names.

    Args:
        renames: patterns in its names and what takes their place.
    """
    out: dict[str, Stored | Quantised] = {}
    for name, entry in read_header(path).items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        if not prefix and name.startswith(OTHER_PARTS):
            continue
        own = name.removeprefix(prefix)
        for pattern, replacement in renames:
            own = re.sub(pattern, replacement, own)
        if own in out:
            raise ValueError(
                f"{path} holds {own:.200} twice, as {name:.200} and as {out[own].key:.200}"
            )
        out[own] = entry
    return out


def stored_in_folder(folder: Path, stem: str = WEIGHTS) -> dict[str, Stored | Quantised]:
    """What the one .safetensors file of a folder holds, or all the shards of its index."""
    single, index = (folder / f"{stem}.safetensors{kind}" for kind in ("", ".index.json"))
    if single.exists() and index.exists():
        raise ValueError(f"{folder} holds both {single.name} and {index.name}; remove one")
    if index.exists():
        return _stored_in_shards(index)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    if not single.exists() and pickles:
        raise ValueError(f"{folder} holds only the pickle {pickles[0]}; .safetensors is needed")
    check_file(single)
    return read_header(single)


def _stored_in_shards(index: Path) -> dict[str, Stored | Quantised]:
    places = read_weight_map(index)
    stored: dict[str, Stored] = {}
    metadata = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        check_file(path)
        if _is_gguf(path):
            raise ValueError(f"{path} must be a safetensors file, got GGUF")
        found, metadata[path] = _entries(path)
        expected = {name for name, file in places.items() if file == shard}
        names.check_names(found, expected, f"{path} against the index")
        stored |= found
    return grouped(stored, metadata)


# loading


def compare(
    where: Path, stored: Mapping[str, Stored | Quantised], shapes: Mapping[str, list[int]]
) -> None:
    """Refuses tensors that are missing, unexpected or mis-shaped, all in one error."""
    missing = [f"{name} {shape}" for name, shape in shapes.items() if name not in stored]
    unexpected = [f"{n} {list(s.shape)}" for n, s in stored.items() if n not in shapes]
    shaped = [
        f"{name} found {list(stored[name].shape)} expected {shape}"
        for name, shape in shapes.items()
        if name in stored and list(stored[name].shape) != shape
    ]
    problems = names.listed("missing", missing) + names.listed("unexpected", unexpected)
    problems += names.listed("mis-shaped", shaped)
    if problems:
        raise ValueError(f"{where} does not fit the model: {'; '.join(problems)}")


def _shapes_in_file(model: nn.Module, pieces: list[Piece], diffusers: bool) -> dict[str, list[int]]:
    native = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes: dict[str, list[int]] = {}
    for piece in pieces:
        rows, *rest = native[piece.native]
        if diffusers and names.ATTENTION_WEIGHT.search(piece.native):
            rest = rest[:1]
        before = shapes.get(piece.name, [0])[0]
        shapes[piece.name] = [before + len(range(rows)[piece.rows]), *rest]
    return shapes


def fill(
    model: nn.Module,
    pieces: list[Piece],
    stored: Mapping[str, Stored | Quantised],
    dtype: torch.dtype | None,
    device: torch.device | str,
    int8: list[str],
) -> None:
    """Gives a model on the meta device its weights, tensor by tensor.

    On a terminal a bar shows how far it is, where it takes longer than two seconds.

    Args:
        pieces: where the parts of each tensor are; tensors that they do not name stay as they are.
        stored: name in the file -> tensor, compared with the model before.
        dtype: of every parameter; None keeps what each tensor is stored in.
        device: where the parameters are made.
        int8: names of linear layers that are made 8 bits wide.
    """
    parts: dict[str, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.native, []).append(piece)
    state: dict[str, Tensor] = {}
    spoilt, maps = [], Maps()
    quantised = {f"{layer}.weight" for layer in int8}
    rotations: dict[str, int] = {}
    wanted = {name: meta for name, meta in model.state_dict().items() if name in parts}
    for name, meta in _with_progress(wanted, f"loading {type(model).__name__}"):
        if name in quantised:
            entry = _kept(name, meta.shape, parts[name], stored)
            if entry is not None:
                weight, finite = entry.mapped_int8(maps), True
                rotations[name.removesuffix(".weight")] = entry.rotation
            else:
                weight, finite = _int8(meta.shape, parts[name], stored)
            state |= int8_state(name, *(tensor.to(device) for tensor in weight))
        else:
            state[name], finite = _numbers(meta.shape, parts[name], stored, dtype, device)
        if not finite:
            spoilt.append(name)
    if spoilt:
        problem = names.listed("tensors with a NaN or an infinity", spoilt)[0]
        warnings.warn(f"{next(iter(stored.values())).file}: {problem}", stacklevel=4)
    to_int8(model, int8).load_state_dict(state, assign=True, strict=False)
    for layer, rotation in rotations.items():
        model.get_submodule(layer).rotation = rotation


def _with_progress(tensors: Mapping[str, Tensor], title: str) -> Iterator[tuple[str, Tensor]]:
    from tqdm import tqdm

    total = sum(t.numel() for t in tensors.values())
    options = {"unit": "weights", "unit_scale": True, "delay": 2, "leave": False}
    with tqdm(total=total, desc=title, disable=None, **options) as bar:
        for name, tensor in tensors.items():
            yield name, tensor
            bar.update(tensor.numel())


def _numbers(
    shape: torch.Size,
    pieces: list[Piece],
    stored: Mapping[str, Stored | Quantised],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> tuple[Tensor, bool]:
    """A tensor, and whether it is finite."""
    kinds = (stored[piece.name].dtype for piece in pieces)
    out = torch.empty(shape, dtype=dtype or reduce(torch.promote_types, kinds), device=device)
    finite = [stored[p.name].numbers(out[p.rows], p.name_rows) for p in pieces]
    return out, all(finite)


def _kept(
    name: str, shape: torch.Size, pieces: list[Piece], stored: Mapping[str, Stored | Quantised]
) -> Quantised | None:
    """What holds a weight in int8 that is used as it lies in the file, if anything does.

    The columns of linear2 are used in two parts, the first as wide as its output: a group of
    ConvRot may not lie in both.
    """
    entry = stored[pieces[0].name]
    if len(pieces) > 1 or not isinstance(entry, Quantised) or not entry.is_int8:
        return None
    split = name.endswith(".linear2.weight") and entry.rotation and shape[0] % entry.rotation
    return None if split else entry


def _int8(
    shape: torch.Size, pieces: list[Piece], stored: Mapping[str, Stored | Quantised]
) -> tuple[tuple[Tensor, Tensor], bool]:
    """The weight and the scales of `ops.linear_int8`, and whether they are finite."""
    values = torch.empty(shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(shape[0], **FLOATS)
    finite = [stored[p.name].int8(values[p.rows], scale[p.rows], p.name_rows) for p in pieces]
    return (values, scale), all(finite)


def _on_meta(kind: _Kind, path: Path, config_from: Callable[[Any], Any], data: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return kind.module(config_from(data))
    except ValueError as error:
        raise ValueError(f"{path} holds no {kind.module.__name__}: {error}") from None


def _load(
    kind: _Kind,
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    int8: bool = False,
) -> nn.Module:
    path = Path(path)
    _check_dtype(dtype)
    if path.is_dir():
        config = read_json(path / "config.json")
        model = _on_meta(kind, path, kind.config_from_diffusers, config)
        stored, pieces = stored_in_folder(path), kind.pieces(model)
    else:
        stored = stored_in_single(path, kind.prefixes, kind.renames)
        shapes = {name: entry.shape for name, entry in stored.items()}
        model = _on_meta(kind, path, kind.config_from_state, shapes)
        pieces = [Piece(name, ALL_ROWS, name, ALL_ROWS) for name in model.state_dict()]
    compare(path, stored, _shapes_in_file(model, pieces, path.is_dir()))
    fill(model, pieces, stored, dtype, device, block_linears(model) if int8 else [])
    return model.eval()


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")


def flux_config(path: str | Path) -> FluxConfig:
    """The configuration of a transformer's file or folder, from its header or config.json.

    Raises:
        ValueError: as load_flux.
    """
    path = Path(path)
    if path.is_dir():
        return configs.flux_config_from_diffusers(read_json(path / "config.json"))
    stored = stored_in_single(path, FLUX_PREFIXES, NORM_WEIGHT)
    return configs.flux_config_from_state({name: entry.shape for name, entry in stored.items()})


def load_flux(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    int8: bool = False,
) -> Flux:
    """Loads a transformer, tensor by tensor, after all its names and shapes have been compared.

    Memory at its peak: the weights and the largest tensor of the file.

    Args:
        path: BFL's single .safetensors file, or a diffusers folder with config.json and one or
            more .safetensors files.
        dtype: of every parameter; None keeps what each tensor is stored in.
        device: where the parameters are made.
        int8: the blocks' linear layers but modulation are made 8 bits wide, each as it is read.
    Returns:
        the transformer, in evaluation mode. A NaN or an infinity in it is warned of by name.
    Raises:
        ValueError: a file that is not safetensors, is damaged, quantised or a LoRA; a missing,
            unexpected or mis-shaped tensor; a config that no FLUX transformer has.
    """
    return _load(FLUX, path, dtype, device, int8)


def load_autoencoder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> AutoEncoder:
    """Loads BFL's ae.safetensors or the folder of a diffusers AutoencoderKL as load_flux does.

    Convolutions lie channels-last: decoding took 0.82 to 0.93 of the time on a CPU.
    """
    autoencoder = _load(AUTOENCODER, path, dtype, device)
    return autoencoder.to(memory_format=torch.channels_last)


# saving


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d{1,15})(|KB|MB|GB)", str(size))
    if not match or not int(match[1]):
        raise ValueError(f'max_shard_size must be bytes or like "10GB", got {size!r:.80}')
    return int(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def _write_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, path: Path) -> None:
    ready = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    write_tensors(path, ready, {"format": "pt"})


def _save_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str,
    dtype: torch.dtype | None,
) -> None:
    limit = _bytes(max_shard_size)
    sizes = {name: t.numel() * (dtype or t.dtype).itemsize for name, t in tensors.items()}
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or sizes[name] > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= sizes[name]
    stems = [WEIGHTS]
    if len(shards) > 1:
        stems = [f"{WEIGHTS}-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    files = {f"{stem}.safetensors": shard for stem, shard in zip(stems, shards, strict=True)}
    with new_folder(folder, OWN_FILE) as unfinished:
        for file, shard in files.items():
            _write_tensors(shard, dtype, unfinished / file)
        if len(shards) > 1:
            places = {name: file for file, shard in files.items() for name in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            write_json(unfinished / INDEX, index)
        write_json(unfinished / "config.json", config)


def _save_single(kind: _Kind, model: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    # a single file has no config: what cannot be seen in the shapes would be lost
    state = comfy_state(model)
    seen = vars(kind.config_from_state({name: tuple(t.shape) for name, t in state.items()}))
    for name, value in vars(model.config).items():
        if seen[name] != value:
            raise ValueError(f"{name} in a single BFL file is {seen[name]}, got {value}")
    write_single(path, state, dtype)


def write_single(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes tensors as one .safetensors file; whole or not at all."""
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors for the format 'bfl', got {path}")
    write_files(path.parent, {path.name: partial(_write_tensors, state, dtype)})


def _save(
    kind: _Kind,
    model: nn.Module,
    path: str | Path,
    format: str,
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
) -> None:
    _check_dtype(dtype)
    if format == "diffusers":
        config = kind.config_to_diffusers(model.config)
        tensors = kind.to_diffusers(model.state_dict())
        _save_folder(Path(path), config, tensors, max_shard_size, dtype)
    elif format == "bfl":
        _save_single(kind, model, Path(path), dtype)
    else:
        raise ValueError(f"format must be 'diffusers' or 'bfl', got {format!r:.80}")


def save_flux(
    model: Flux,
    path: str | Path,
    *,
    format: str = "diffusers",
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Saves a transformer, whole or not at all; what else a folder holds stays as it is.

    Args:
        model: the transformer.
        path: a folder for the format "diffusers", a .safetensors file for "bfl".
        format: "diffusers" or "bfl".
        max_shard_size: bytes, or such as "10GB"; only of a folder.
        dtype: of the tensors in the file; None keeps the model's, as a model in int8 must: its
            file is Comfy's `int8_tensorwise`, in the format "bfl" alone.
    Raises:
        ValueError: an unknown format, or a configuration, an int8 model, a LoRA beside one, or a
            dtype that it cannot hold.
        OSError: the files could not be written; nothing of them is left.
    """
    if is_int8(model) and (format != "bfl" or dtype is not None):
        raise ValueError(
            f"format must be 'bfl' and dtype None for a model in int8 to be saved, "
            f"got {format!r:.80} and {dtype}"
        )
    if beside := with_adapters(model):
        raise ValueError(f"model must have no LoRA in int8 to be saved, got one on {beside[0]}")
    _save(FLUX, model, path, format, max_shard_size, dtype)


def save_autoencoder(
    model: AutoEncoder,
    path: str | Path,
    *,
    format: str = "diffusers",
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
) -> None:
    """Saves an autoencoder; arguments and errors are those of save_flux."""
    _save(AUTOENCODER, model, path, format, max_shard_size, dtype)


# where a checkpoint is


def component_files(replaced: Sequence[str] = ()) -> list[str]:
    """Patterns of the files of a pipeline's folder, without the weights of some components."""
    weights = [f"{name}/*.safetensors" for name in COMPONENTS if name not in replaced]
    others = [f"*/*{suffix}" for suffix in FETCHED if suffix != ".safetensors"]
    return ["model_index.json", *others, *weights]


def weights_hash(path: str | Path, replaced: Mapping[str, Path] | None = None) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a checkpoint's weights.

    Args:
        path: a .safetensors file, a component's folder, or a pipeline's folder.
        replaced: component of a pipeline's folder -> the file in the place of its weights.
    Returns:
        the digits; for a folder, over the names and the bytes of its files in order.
    Raises:
        ValueError: no .safetensors file there.
    """
    path, replaced = Path(path), replaced or {}
    pattern = "*/*.safetensors" if (path / "model_index.json").is_file() else "*.safetensors"
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    labels = {file.relative_to(path).as_posix(): file for file in files}  # "." of a file alone
    labels = {n: f for n, f in labels.items() if n.partition("/")[0] not in replaced}
    labels |= dict(sorted(replaced.items()))
    if not labels:
        raise ValueError(f"{path} holds no .safetensors file")
    total = hashlib.sha256()
    for label, file in labels.items():
        check_file(file)
        if label != ".":
            total.update(label.encode())
        with open(file, "rb") as data:
            total.update(hashlib.file_digest(data, "sha256").digest())
    return total.hexdigest()[:16]


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """The local folder or file that a path or an id on the Hugging Face hub stands for.

    Args:
        path_or_id: what exists on this machine; else "org/name", or "org/name/file.safetensors".
        revision: a branch, tag or commit of the hub's repository.
        allow_patterns: which of its files are fetched, each .json, .safetensors, .txt or .model;
            None: those of all components.
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
    name, file = match.groups()
    patterns = component_files() if allow_patterns is None else list(allow_patterns)
    for pattern in (file,) if file else patterns:
        if not pattern.endswith(FETCHED):
            raise ValueError(f"only {', '.join(FETCHED)} files are fetched, got {pattern!r:.200}")
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        if file:
            return Path(hf_hub_download(name, file, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path_or_id} is not here and the hub does not give it: {reason[0]:.300}"
        ) from None
