"""The numbers of a training run of the compact FLUX, read from TOML files, one for each command."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

FOLDER = Path(__file__).parent
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class VaeStage:
    pictures: int
    steps: int
    batch_size: int
    learning_rate: float
    decay: float
    kl_weight: float


@dataclass(frozen=True)
class DecoderStage:
    steps: int
    batch_size: int
    learning_rate: float
    decay: float


@dataclass(frozen=True)
class TextStage:
    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class FlowStage:
    pictures: int
    fine: float  # how many times as often as others a small star, ring or cross is seen
    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float
    decay: float
    dropped_captions: float
    noise_mean: float
    noise_std: float
    evaluate_every: int
    dtype: str


@dataclass(frozen=True)
class GuidanceStage:
    pictures: int
    fine: float  # how many times as often as others a small star, ring or cross is seen
    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float
    decay: float
    least: float
    most: float
    noise_mean: float
    noise_std: float
    evaluate_every: int
    dtype: str

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"least must be at most {self.most}, got {self.least}")


@dataclass(frozen=True)
class FewStepsStage:
    paths: int
    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float
    decay: float
    guidance: float
    teacher_steps: int
    student_steps: int
    evaluate_every: int
    dtype: str

    def __post_init__(self) -> None:
        if self.teacher_steps % self.student_steps:
            raise ValueError(
                f"student_steps must divide teacher_steps {self.teacher_steps}, "
                f"got {self.student_steps}"
            )


@dataclass(frozen=True)
class VaeRecipe:
    """Of `fluxkern train vae`: encoder and decoder, then the decoder alone.

    `start` names the folder of weights, in diffusers' layout, that training begins from; "" is from
    nothing. The same in the recipes below.
    """

    seed: int
    start: str
    vae: VaeStage
    decoder: DecoderStage


@dataclass(frozen=True)
class FlowRecipe:
    """Of `fluxkern train flow`: the text encoders, then the transformer."""

    seed: int
    start: str
    text: TextStage
    flow: FlowStage


@dataclass(frozen=True)
class DistillRecipe:
    """Of `fluxkern train distill`: guidance as an input, then few steps; `start` is the teacher."""

    seed: int
    start: str
    guidance: GuidanceStage
    few_steps: FewStepsStage


RECIPES = {"vae": VaeRecipe, "flow": FlowRecipe, "distill": DistillRecipe}
R = TypeVar("R", VaeRecipe, FlowRecipe, DistillRecipe)


def read_recipe(kind: type[R], path: str | Path) -> R:
    """Reads a recipe.

    Raises:
        ValueError: not TOML, or a field that is missing, unknown, of the wrong type or size.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    return _table(str(path), data, kind)


def _table(where: str, data: object, kind: type) -> object:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{where} must hold {sorted(names)}, got {found}")
    types = get_type_hints(kind)
    values = {f.name: _value(where, f.name, data[f.name], types[f.name]) for f in fields(kind)}
    return kind(**values)


def _value(where: str, name: str, value: object, kind: type) -> object:
    if is_dataclass(kind):
        return _table(f"{where}, [{name}]", value, kind)
    if name == "dtype" and value not in DTYPES:
        raise ValueError(f"{where}: {name} must be one of {sorted(DTYPES)}, got {value!r}")
    if kind is str:
        good = isinstance(value, str)
    else:
        numbers, low = (int, float) if kind is float else int, int(kind is int and name != "seed")
        good = isinstance(value, numbers) and not isinstance(value, bool)
        good = good and low <= value < math.inf
    if not good:
        wanted = "a string" if kind is str else f"{kind.__name__} >= {low}"
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")
    return kind(value)
