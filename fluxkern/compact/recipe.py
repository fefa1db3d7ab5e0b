"""The numbers of a training run of the compact FLUX, read from TOML files, one for each command."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_type_hints

FOLDER = Path(__file__).parent
DTYPES = ("float32", "bfloat16")
LIMIT = 2**20  # bytes of a recipe
BOUNDS = {  # least and most of each number
    "batch_size": (1, 4096),
    "decay": (0, 1),
    "dropped_captions": (0, 1),
    "evaluate_every": (1, 10**7),
    "fine": (0, 1e6),
    "guidance": (0, 100),
    "kl_weight": (0, 1e6),
    "learning_rate": (0, 1e15),
    "least": (1e-3, 100),  # the loss divides by it
    "most": (1e-3, 100),
    "muon_learning_rate": (0, 1e15),
    "noise_mean": (-100, 100),
    "noise_std": (0, 100),
    "paths": (1, 10**5),
    "pictures": (1, 2 * 10**5),
    "seed": (0, 2**62 - 1),
    "steps": (1, 10**7),
    "student_steps": (1, 1000),
    "teacher_steps": (1, 1000),
}
PLACES = 10**6  # of paths, 16 KiB each


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
        if self.paths * (self.student_steps + 1) > PLACES:
            raise ValueError(
                f"paths times student_steps + 1 must be at most {PLACES}, "
                f"got {self.paths} times {self.student_steps + 1}"
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
        ValueError: not TOML, or a field that is missing, unknown or out of bounds.
    """
    with open(path, "rb") as file:
        text = file.read(LIMIT + 1)
    if len(text) > LIMIT:
        raise ValueError(f"{path}: larger than {LIMIT} bytes")
    try:
        data = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a TOML file: {error!s:.200}") from None
    return _table(str(path), data, kind)


def _table(where: str, data: object, kind: type) -> object:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{where} must hold {sorted(names)}, got {found!s:.400}")
    types = get_type_hints(kind)
    values = {f.name: _value(where, f.name, data[f.name], types[f.name]) for f in fields(kind)}
    return kind(**values)


def _value(where: str, name: str, value: object, kind: type) -> object:
    if is_dataclass(kind):
        return _table(f"{where}, [{name}]", value, kind)
    if name == "dtype" and value not in DTYPES:
        raise ValueError(f"{where}: {name} must be one of {sorted(DTYPES)}, got {value!r:.80}")
    if kind is str:
        good, wanted = isinstance(value, str), "a string"
    else:
        least, most = BOUNDS[name]
        good = type(value) is int or (kind is float and type(value) is float)
        good, wanted = good and least <= value <= most, f"{kind.__name__} from {least} to {most}"
    if not good:
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r:.80}")
    return kind(value)
