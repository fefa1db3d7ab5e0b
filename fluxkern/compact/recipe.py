"""The numbers of a training run of the compact FLUX, read from a TOML file."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

RECIPE = Path(__file__).parent / "recipe.toml"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class VaeRecipe:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float
    kl_weight: float


@dataclass(frozen=True)
class TextRecipe:
    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class FlowRecipe:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float
    dropped_captions: float
    noise_mean: float
    muon_learning_rate: float
    evaluate_every: int
    dtype: str


@dataclass(frozen=True)
class DecoderRecipe:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run, as read from a TOML file of the same layout."""

    seed: int
    vae: VaeRecipe
    text: TextRecipe
    flow: FlowRecipe
    decoder: DecoderRecipe

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Reads a recipe.

        Raises:
            ValueError: not TOML, or a field that is missing, unknown or of the wrong type.
        """
        try:
            data = tomllib.loads(Path(path).read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a TOML file: {error}") from None
        stages = {
            "vae": VaeRecipe,
            "text": TextRecipe,
            "flow": FlowRecipe,
            "decoder": DecoderRecipe,
        }
        _check_names(path, data, {"seed", *stages})
        parts = {name: _stage(path, name, data[name], kind) for name, kind in stages.items()}
        return cls(seed=_value(path, "seed", data["seed"], int), **parts)


def _check_names(where: object, data: object, names: set[str]) -> None:
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{where} must hold {sorted(names)}, got {found}")


def _value(where: object, name: str, value: object, kind: type) -> int | float | str:
    if kind is str:
        if value not in DTYPES:
            raise ValueError(f"{where}: {name} must be one of {sorted(DTYPES)}, got {value!r}")
        return value
    good = isinstance(value, int | float) if kind is float else isinstance(value, int)
    if not good or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{where}: {name} must be {kind.__name__} >= 0, got {value!r}")
    return kind(value)


def _stage(path: object, stage: str, data: dict, kind: type) -> object:
    where = f"{path}, [{stage}]"
    _check_names(where, data, {field.name for field in fields(kind)})
    types = {"int": int, "float": float, "str": str}
    return kind(
        **{f.name: _value(where, f.name, data[f.name], types[f.type]) for f in fields(kind)}
    )
