"""LoRA files of every layout that is in use for FLUX.1: which keys say what of which weight.

Sources: `lora_conversion_utils` and `FluxLoraLoaderMixin` of diffusers; `networks/lora_flux` of
kohya-ss/sd-scripts; `weight_adapter` of ComfyUI; LyCORIS; peft; XLabs-AI/x-flux.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import read_json
from ..model import adapters
from ..model.adapters import Delta, Place, Update
from ..model.int8 import Int8Linear
from ..model.transformer import Flux, RMSScale
from . import names
from .files import DTYPES, resolve, stored_in
from .stored import Stored

HUB_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of diffusers: peft's configuration as JSON
ALL_DTYPES = DTYPES | {"I16": torch.int16, "I32": torch.int32, "I64": torch.int64}  # of alphas
PREFIXES = {  # of a module's name -> the part of the pipeline; the longest that fits counts
    "": "transformer",
    "transformer.": "transformer",
    "diffusion_model.": "transformer",
    "model.diffusion_model.": "transformer",
    "lora_unet_": "transformer",
    "lora_transformer_": "transformer",
    "lycoris_": "transformer",
    "text_encoder.": "text_encoder",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_2",
}
WRAPPER = "base_model.model."
CUT_SHORT = "sformer_blocks."  # a writer took too much off "transformer_blocks."
NOTHING = re.compile(r"bundle_emb\.")  # keys that say nothing of the picture
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}
# diffusers' projections when they are fused
FUSED = {"img_attn.qkv": "attn.to_qkv", "txt_attn.qkv": "attn.to_added_qkv"}
_ONE = r"(?:\.[^.]+)?"  # an adapter's name, which peft writes
SUFFIX = re.compile(
    rf"""\.(?:(?P<down>(?:lora_A{_ONE}|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight)
    |(?P<up>(?:lora_B{_ONE}|lora_up|lora\.up|lora_linear_layer\.up|up)\.weight)
    |(?P<bias>lora_B{_ONE}\.bias)
    |(?P<magnitude>lora_magnitude_vector{_ONE}(?:\.weight)?)
    |(?P<glora>[ab][12])\.weight
    |(?P<other>dora_scale|alpha|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|diff|diff_b|scale)
    |(?P<refused>lora_mid\.weight|hada_t[12]|lokr_t2|set_weight|reshape_weight
      |oft_\w+.*|boft_\w+.*|vera_\w+.*))$""",
    re.VERBOSE,
)


@dataclass(frozen=True, eq=False)
class Target:
    """A layer, some of its rows or several layers, which have a name of their own in some layout.

    Args:
        part: of the pipeline.
        places: layer, its rows and the rows of this target that lie there, in order.
        shape: [N, Cin] of a linear layer, [D] of a norm.
        norm: the name of a norm's parameter.
    """

    part: str
    places: tuple[Place, ...]
    shape: tuple[int, ...]
    norm: str

    def first(self, rows: int) -> "Target":
        """The part of it that is its first rows."""
        places = []
        for layer, of, own in self.places:
            stop = min(own.stop, rows)
            if own.start < stop:
                cut = slice(of.start, of.start + stop - own.start)
                places.append(Place(layer, cut, slice(own.start, stop)))
        return Target(self.part, tuple(places), (rows, *self.shape[1:]), self.norm)


@dataclass(frozen=True)
class Lora:
    """What a file changes of a pipeline.

    Args:
        updates: one for each parameter and file's module.
        kinds: "part.layer" -> what changes it: "LoRA", "DoRA", "LoHa" and so on.
        keys: of the file that were read.
        unused: those that were not; names of nothing in the model, or of a kind that is not known.
        ignored: those known to say nothing of the picture.
    """

    updates: tuple[Update, ...]
    kinds: dict[str, str]
    keys: tuple[str, ...]
    unused: tuple[str, ...]
    ignored: tuple[str, ...]


# names


def targets(part: str, model: nn.Module) -> dict[str, Target]:
    """Every name by which files call a layer of a model, dotted and with underscores.

    Args:
        part: the name that its targets say.
        model: a `Flux`, diffusers' of it, or a text encoder.
    """
    norm = "scale" if isinstance(model, Flux) else "weight"
    shapes = {name: shape for name, m in model.named_modules() if (shape := _shape(m))}
    found = {
        name: Target(part, (Place(name, slice(0, shape[0]), slice(0, shape[0])),), shape, norm)
        for name, shape in shapes.items()
    }
    if sizes := _flux_sizes(model):
        found |= _other_layout(part, norm, shapes, _weights(sizes, isinstance(model, Flux)))
        found |= _fused(found, sizes[-1])
        found |= {f"{name}.scale": t for name, t in found.items() if len(t.shape) == 1}
    else:
        found |= {f"text_model.{name}": target for name, target in found.items()}
        found |= {name.removeprefix("text_model."): target for name, target in found.items()}
    return {name.replace(".", "_"): target for name, target in found.items()} | found


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear | Int8Linear):
        return module.out_features, module.in_features
    norm = module.weight if isinstance(module, nn.RMSNorm) else getattr(module, "scale", None)
    return tuple(norm.shape) if isinstance(module, nn.RMSNorm | RMSScale) else ()


def _flux_sizes(model: nn.Module) -> tuple[int, int, bool, int] | None:
    """Blocks of both kinds, guidance and width of a FLUX.1 of ours or of diffusers."""
    config = model.config
    if isinstance(model, Flux):
        sizes = config.depth, config.depth_single_blocks, config.guidance_embed, config.hidden_size
        return sizes
    if all(cls.__name__ != "FluxTransformer2DModel" for cls in type(model).__mro__):
        return None
    hidden = config.num_attention_heads * config.attention_head_dim
    return config.num_layers, config.num_single_layers, config.guidance_embeds, hidden


def _weights(sizes: tuple[int, int, bool, int], native: bool) -> dict[str, list[Place]]:
    """Name in the other layout -> layers of the model, their rows and those of the name."""
    found: dict[str, list[Place]] = {}
    for ours, rows, theirs, their_rows in names.flux_pieces(*sizes):
        if not ours.endswith(".bias"):
            sides = (ours.rpartition(".")[0], rows), (theirs.rpartition(".")[0], their_rows)
            (layer, of), (name, own) = sides if native else sides[::-1]
            found.setdefault(name, []).append(Place(layer, of, own))
    return found


def _other_layout(
    part: str,
    norm: str,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, Sequence[Place]],
) -> dict[str, Target]:
    found = {}
    for name, pieces in layers.items():
        if any(layer not in shapes for layer, _, _ in pieces):
            continue  # something stands in its place
        places = []
        for layer, of, own in pieces:
            rows = range(shapes[layer][0])[of]
            start = own.start or 0
            own_rows = slice(start, start + len(rows))
            places.append(Place(layer, slice(rows.start, rows.stop), own_rows))
        places.sort(key=lambda place: place.own.start)
        shape = (places[-1].own.stop, *shapes[places[0].parameter][1:])
        found[name] = Target(part, tuple(places), shape, norm)
    return found


def _fused(found: Mapping[str, Target], hidden: int) -> dict[str, Target]:
    """XLabs' names, and diffusers' of fused projections."""
    extra = {}
    for name, target in found.items():
        blocks, _, layer = name.partition("_blocks.")
        number, _, layer = layer.partition(".")
        if blocks == "double" and layer in FUSED:
            extra[f"transformer_blocks.{number}.{FUSED[layer]}"] = target
        if blocks == "single" and layer == "linear1":
            qkv = target.first(3 * hidden)
            extra[f"single_transformer_blocks.{number}.attn.to_qkv"] = qkv
            extra[f"{name.removesuffix(layer)}processor.qkv_lora"] = qkv
        if layer in XLABS:
            extra[f"{name.removesuffix(layer)}{XLABS[layer]}"] = target
    return extra


def _stem_of(stem: str, tables: Mapping[str, Mapping[str, Target]]) -> Target | None:
    stem = stem.removeprefix(WRAPPER)
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        table = tables.get(PREFIXES[prefix], {})
        name = stem.removeprefix(prefix).removeprefix(WRAPPER)
        if name.startswith(CUT_SHORT):
            name = f"tran{name}"
        if stem.startswith(prefix) and name in table:
            return table[name]
    return None


# files


@dataclass(eq=False)
class _Group:
    """What a file holds of one target: parameter -> tensor."""

    stem: str
    target: Target
    stored: dict[str, Stored]

    def __str__(self) -> str:
        return f"{next(iter(self.stored.values())).file}: {self.stem:.200}"

    def read(self, name: str, *shape: int | None) -> Tensor:
        """A tensor of this shape, None for any; axes of 1 behind it, a convolution's, are cut."""
        if name not in self.stored:
            raise ValueError(f"{self} has {', '.join(sorted(self.stored))}, but no {name}")
        entry = self.stored[name]
        found = entry.shape
        while len(found) > len(shape) and found[-1] == 1:
            found = found[:-1]
        fits = len(found) == len(shape) and all(
            size in (None, own) for own, size in zip(found, shape, strict=True)
        )
        if not fits or 0 in found:
            wanted = [size or "any" for size in shape]
            raise ValueError(f"{entry.file}: {entry.key:.200} must be {wanted}, got {list(found)}")
        if not entry.dtype.is_floating_point and name != "alpha":
            raise ValueError(
                f"{entry.file}: {entry.key:.200} must be floating point, got {entry.dtype}"
            )
        tensor = entry.map().view(found).clone()
        if not tensor.float().isfinite().all():
            raise ValueError(f"{entry.file}: {entry.key:.200} must be finite, got NaN or infinity")
        return tensor.float() if tensor.dtype.itemsize == 1 else tensor

    def has(self, *parameters: str) -> bool:
        return any(name in self.stored for name in parameters)


def lora_file(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The .safetensors file of a LoRA that a file, a folder or an id on the hub stands for.

    Raises:
        ValueError: nothing there, or more than one.
    """
    path = resolve(path_or_id, revision, HUB_FILES)
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[: names.NAMES_SHOWN]) or "none"
        raise ValueError(f"{path} must hold one .safetensors file of a LoRA, got {found}")
    return files[0]


def read_lora(
    path: str | Path, models: Mapping[str, nn.Module], *, allow_unused: bool = False
) -> Lora:
    """Reads what a LoRA file changes of the models of a pipeline, and changes nothing.

    A file does not say whether a kohya LoRA with `split_qkv` was stacked; as for all its readers
    the scale is alpha over the rank that the file has.

    Args:
        path: a .safetensors file.
        models: "transformer", "text_encoder" and "text_encoder_2", some or all; a meta device will
            do for names and shapes.
        allow_unused: a key that nothing is known to do with is listed and no error.

    Returns:
        The changes, and what became of every key.

    Raises:
        ValueError: a pickle or another kind of file, or damaged; a key that is not used; a shape
            that does not fit the model; a NaN; a kind that is not read. Names the key. Or a model
            that has adapters of peft.
    """
    path = Path(path)
    for part, model in models.items():
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError(f"{part} must have no adapters of peft, which it has: unload them")
    stored, texts = stored_in(path, ALL_DTYPES)
    groups, unused, ignored = _grouped(path, stored, models)
    if unused and not allow_unused:
        problem = names.listed("keys fit nothing in the model", unused)[0]
        raise ValueError(f"{path}: {problem}; allow_unused=True leaves them out")
    if not groups:
        raise ValueError(f"{path} holds no LoRA for this model, got {len(stored)} tensors")
    configs = _Configs(path, texts)
    updates, kinds = [], {}
    for group in groups:
        found, kind = _updates(group, configs)
        updates.extend(found)
        part = group.target.part
        kinds |= {f"{part}.{place.parameter}": kind for place in group.target.places}
    configs.check_all_met()
    keys = tuple(entry.key for group in groups for entry in group.stored.values())
    return Lora(tuple(updates), kinds, keys, tuple(unused), tuple(ignored))


def _grouped(
    path: Path, stored: Mapping[str, Stored], models: Mapping[str, nn.Module]
) -> tuple[list[_Group], list[str], list[str]]:
    tables = {part: targets(part, model) for part, model in models.items()}
    groups: dict[Target, _Group] = {}
    unused, ignored = [], []
    for key, entry in stored.items():
        match = SUFFIX.search(key)
        if match and match["refused"]:
            raise ValueError(f"{path}: {key:.200} is of a kind that is not read")
        stem = key[: match.start()] if match else key
        target = _stem_of(stem, tables)
        if match and target:
            _put(groups.setdefault(target, _Group(stem, target, {})), match, entry)
        else:
            (ignored if NOTHING.match(key) else unused).append(key)
    return list(groups.values()), unused, ignored


def _put(group: _Group, match: re.Match, entry: Stored) -> None:
    own_name = match.lastgroup in ("glora", "other")
    name = match[match.lastgroup] if own_name else match.lastgroup
    if name in group.stored:
        both = f"{group.stored[name].key:.200} and {entry.key:.200}"
        raise ValueError(f"{entry.file}: {both} are the same")
    group.stored[name] = entry


class _Configs:
    """What peft's configuration says of scales: in the file's header, or in a file beside it."""

    def __init__(self, path: Path, texts: Mapping[str, str]):
        self.path = path
        whole: dict[str, Any] = {}
        if METADATA in texts:
            try:
                whole = json.loads(texts[METADATA])
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: {METADATA} is not JSON") from None
        elif path.name == "adapter_model.safetensors" and (path.parent / CONFIG).exists():
            whole = read_json(path.parent / CONFIG)
        if not isinstance(whole, dict):
            raise ValueError(f"{path}: {METADATA} is not a JSON object")
        for key, of in whole.items():
            if key.endswith(("alpha_pattern", "rank_pattern")) and not isinstance(of or {}, dict):
                raise ValueError(f"{path}: {key:.80} must be an object, got {of!r:.80}")
        self.whole = whole
        self.unmet = {
            name for key, of in whole.items() if key.endswith("alpha_pattern") for name in of or ()
        }

    def of(self, group: _Group) -> dict[str, Any]:
        """The configuration of the part that a group belongs to."""
        prefix = f"{group.target.part}."
        own = {
            key.removeprefix(prefix): value
            for key, value in self.whole.items()
            if key.startswith(prefix)
        }
        return own or {key: value for key, value in self.whole.items() if "." not in key}

    def scale(self, group: _Group, rank: int) -> float:
        """alpha / rank, from the key, or from the configuration, else 1."""
        if group.has("alpha"):
            alpha = float(group.read("alpha"))
            return alpha / rank if alpha else 1.0
        config = self.of(group)
        alpha = config.get("lora_alpha", config.get("alpha"))
        alpha = self._by_module(group, "alpha_pattern", alpha)
        if alpha is None:
            return 1.0
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            raise ValueError(f"{self.path}: lora_alpha must be a number, got {alpha!r:.80}")
        return alpha / math.sqrt(rank) if config.get("use_rslora") is True else alpha / rank

    def lokr_rank(self, group: _Group) -> int | None:
        """Of peft's LoKr, which it divides alpha by also where no factor is a product."""
        config = self.of(group)
        if config.get("peft_type") != "LOKR" or group.has("alpha"):
            return None
        rank = self._by_module(group, "rank_pattern", config.get("r"))
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{self.path}: r must be a whole number above 0, got {rank!r:.80}")
        return rank

    def _by_module(self, group: _Group, pattern: str, value: Any) -> Any:
        for name, own in (self.of(group).get(pattern) or {}).items():
            if group.stem == name or group.stem.endswith(f".{name}"):
                value = own
                self.unmet.discard(name)
        return value

    def check_all_met(self) -> None:
        if self.unmet:
            problem = names.listed("names of alpha_pattern fit no module", sorted(self.unmet))[0]
            raise ValueError(f"{self.path}: {problem}")


# kinds


def _updates(group: _Group, configs: _Configs) -> tuple[list[Update], str]:
    """What a group changes, and its kind; every tensor of it is used."""
    read: dict[str, Any] = {
        "LoRA": (("down", "up"), _low_rank),
        "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
        "LoKr": (("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), _lokr),
        "GLoRA": (("a1", "a2", "b1", "b2"), _glora),
        "full": (("diff",), _full),
        "norm": (("scale",), _norm),
    }
    kinds = {kind: of for kind, of in read.items() if group.has(*of[0])}
    if len(kinds) > 1:
        raise ValueError(f"{group} is of two kinds at once, {' and '.join(kinds)}")
    used, found = {"alpha", "bias", "diff_b"}, []
    kind = next(iter(kinds), "bias")
    if kinds:
        parameters, make = kinds[kind]
        delta, factors = make(group, configs)
        delta, factors, kind = _with_magnitude(group, delta, factors, kind)
        name = group.target.norm if len(group.target.shape) == 1 else "weight"
        found.append(_update(group, name, delta, factors))
        used |= {*parameters, "magnitude", "dora_scale"}
    if left := sorted(set(group.stored) - used):
        raise ValueError(f"{group} has {', '.join(left)}, which {kind} does not take")
    found.extend(_biases(group, configs))
    if not found:
        raise ValueError(f"{group} has {', '.join(sorted(group.stored))} alone")
    return found, kind


def _update(
    group: _Group, parameter: str, delta: Delta, factors: tuple[Tensor, Tensor] | None = None
) -> Update:
    places = (
        place._replace(parameter=f"{place.parameter}.{parameter}") for place in group.target.places
    )
    return Update(group.target.part, tuple(places), delta, factors)


def _biases(group: _Group, configs: _Configs) -> Iterator[Update]:
    rows = group.target.shape[0]
    if group.has("bias"):  # the up-projection's own, which the scale counts for too
        rank = group.read("down", None, None).shape[0]
        change = adapters.scaled(group.read("bias", rows), configs.scale(group, rank))
        yield _update(group, "bias", change)
    if group.has("diff_b"):
        yield _update(group, "bias", adapters.scaled(group.read("diff_b", rows)))


def _matrix(group: _Group) -> tuple[int, int]:
    if len(group.target.shape) != 2:
        raise ValueError(f"{group} is a norm and takes no LoRA, got {', '.join(group.stored)}")
    return group.target.shape


def _low_rank(group: _Group, configs: _Configs) -> tuple[Delta, tuple[Tensor, Tensor]]:
    rows, columns = _matrix(group)
    wide = group.stored["down"].shape if group.has("down") else ()
    if (
        group.target.places[0].parameter in ("img_in", "x_embedder")
        and len(wide) == 2
        and wide[1] == 2 * columns
    ):
        raise ValueError(
            f"{group} is of a control LoRA: img_in takes {columns} channels, it changes {wide[1]}"
        )
    down = group.read("down", None, columns)
    up = group.read("up", rows, len(down))
    return adapters.low_rank(down, up, configs.scale(group, len(down)))


def _loha(group: _Group, configs: _Configs) -> tuple[Delta, None]:
    rows, columns = _matrix(group)
    factors = []
    for n in (1, 2):
        a = group.read(f"hada_w{n}_a", rows, None)
        factors += [a, group.read(f"hada_w{n}_b", a.shape[1], columns)]
    return adapters.hadamard(factors, configs.scale(group, factors[1].shape[0])), None


def _lokr(group: _Group, configs: _Configs) -> tuple[Delta, None]:
    rows, columns = _matrix(group)
    factors, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        whole = group.has(name)
        if whole and group.has(f"{name}_a", f"{name}_b"):
            raise ValueError(f"{group} has {name} and its factors, {name}_a or {name}_b, too")
        if whole:
            factors.append((group.read(name, None, None),))
        else:
            a = group.read(f"{name}_a", None, None)
            factors.append((a, group.read(f"{name}_b", a.shape[1], None)))
            rank = a.shape[1]
    shape = [math.prod(sizes) for sizes in zip(*map(_product_shape, factors), strict=True)]
    if shape != [rows, columns]:
        raise ValueError(f"{group}: the product must be {[rows, columns]}, got {shape}")
    # with both factors whole alpha counts for peft alone, whatever it says
    rank = rank or configs.lokr_rank(group)
    return adapters.kronecker(*factors, configs.scale(group, rank) if rank else 1.0), None


def _product_shape(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]


def _glora(group: _Group, configs: _Configs) -> tuple[Delta, None]:
    rows, columns = _matrix(group)
    b1 = group.read("b1", None, None)
    first, last = ("1", "2") if len(b1) == rows else ("2", "1")  # LyCORIS calls them so
    b = group.read(f"b{first}", rows, None)
    rank = b.shape[1]
    c = group.read(f"b{last}", rank, columns)
    a = group.read(f"a{first}", columns, None), group.read(f"a{last}", None, columns)
    if a[0].shape[1] != len(a[1]):
        raise ValueError(f"{group}: a1 and a2 do not fit, {list(a[0].shape)}, {list(a[1].shape)}")
    return adapters.generalised(*a, b, c, configs.scale(group, rank)), None


def _full(group: _Group, _: _Configs) -> tuple[Delta, None]:
    return adapters.scaled(group.read("diff", *group.target.shape)), None


def _norm(group: _Group, _: _Configs) -> tuple[Delta, None]:
    if len(group.target.shape) != 1:
        raise ValueError(f"{group} has a scale but is no norm")
    return adapters.replaced(group.read("scale", *group.target.shape)), None


def _with_magnitude(group: _Group, delta: Delta, factors: Any, kind: str) -> tuple[Delta, Any, str]:
    if not group.has("magnitude", "dora_scale"):
        return delta, factors, kind
    if group.has("magnitude") and group.has("dora_scale"):
        raise ValueError(f"{group} has two magnitudes, of peft and of LyCORIS")
    rows, columns = _matrix(group)
    if group.has("magnitude"):
        magnitude, by_row = group.read("magnitude", rows), True
    else:
        by_row = group.stored["dora_scale"].shape[0] == rows
        shape = (rows,) if by_row else (1, columns)
        magnitude = group.read("dora_scale", *shape)
    return adapters.decomposed(delta, magnitude, by_row), None, "DoRA" if kind == "LoRA" else kind
