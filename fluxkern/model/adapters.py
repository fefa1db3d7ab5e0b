"""Adapters of a model: merged into its weights from the kept base, or beside an int8 layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .int8 import Int8Linear, Int8Weight, LowRank

Delta = Callable[[Tensor, float], Tensor]


class Place(NamedTuple):
    """Some rows of a parameter, and the rows of an update that lie there."""

    parameter: str
    rows: slice
    own: slice


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter changes of a parameter, of some rows of it, or of several.

    Args:
        part: which of the models.
        places: where the rows of the update lie in the model, in the order of the update.
        delta: (rows of the base, fp32 in the update's order; strength) -> what is added to them.
        factors: down [r, Cin] and up [N, r], where delta is strength * up down; else None.
    """

    part: str
    places: tuple[Place, ...]
    delta: Delta
    factors: tuple[Tensor, Tensor] | None = None

    def add_to(
        self, total: Tensor, parameter: str, base: Callable[[str], Tensor], strength: float
    ) -> None:
        """Adds to the fp32 change of a parameter what this one makes of the bases."""
        if self.factors:
            down, up = (factor.to(total) for factor in self.factors)
        else:
            rows = torch.cat([base(place.parameter)[place.rows] for place in self.places])
            delta = self.delta(rows, strength)
        for _, rows, own in (place for place in self.places if place.parameter == parameter):
            total[rows] += strength * (up[own] @ down) if self.factors else delta[own]


LARGE = 1.0  # the norm of a change over that of the weight, above which none is known to work
SAMPLED = 16  # every so manieth row of an int8 weight is looked at for it
Active = dict[tuple[str, str], list[tuple[Update, float]]]


class Adapters:
    """The adapters of some models by name, each with a strength.

    A floating-point weight is made of its kept base at every change, in fp32 with one rounding, so
    that a step with adapters costs what it does without, and nothing drifts. The bases of changed
    weights wait in the memory of the CPU. An int8 weight stays as it is and the adapters lie beside
    it, as its grid is coarser than they are: low ranks as two small products, others as a second
    int8 weight with scales of its own.

    Args:
        parts: name -> model.
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        self.parts = dict(parts)
        self.updates: dict[str, Sequence[Update]] = {}
        self.strengths: dict[str, float] = {}
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._active: Active = {}

    def add(self, name: str, updates: Sequence[Update], strength: float) -> None:
        """One more, beside those that are there; whole or not at all.

        Raises:
            ValueError: as `set`; a name that is taken, or a strength that is not finite.
        """
        if name in self.updates:
            raise ValueError(f"name must be new, got {name!r:.80}, which is loaded")
        if not math.isfinite(strength):
            raise ValueError(f"scale must be a finite number, got {strength}")
        self.set(self.updates | {name: updates}, self.strengths | {name: strength})

    def set(self, updates: Mapping[str, Sequence[Update]], strengths: Mapping[str, float]) -> None:
        """Puts these adapters in the place of those that are there; all of them or nothing.

        Args:
            updates: name -> what it changes.
            strengths: name -> what the update counts; those not named count nothing.

        Raises:
            ValueError: a weight would not be finite, is not in memory or is quantised.
        """
        active: Active = {}
        for name, strength in strengths.items():
            for update in updates[name] if strength else ():
                for parameter in dict.fromkeys(place.parameter for place in update.places):
                    active.setdefault((update.part, parameter), []).append((update, strength))
        try:
            sizes = self._apply(active)
        except BaseException:
            self._apply(self._active)
            raise
        self._active = active
        self.updates, self.strengths = dict(updates), dict(strengths)
        if sizes and (worst := max(sizes.items(), key=lambda item: item[1]))[1] > LARGE:
            warnings.warn(
                f"a LoRA changes {'.'.join(worst[0])} by {worst[1]:.1f} times its norm: is it for "
                f"another model?",
                stacklevel=3,
            )

    @torch.no_grad()
    def _apply(self, active: Active) -> dict[tuple[str, str], float]:
        """Place -> how large its change is beside the base, for weights."""
        for place in active:
            self._keep(place)  # before any is written: an update may need the bases of others
        sizes = {}
        for place in dict.fromkeys((*active, *self._active, *self._kept)):
            layer, changes = self._layer(place), active.get(place, [])
            if isinstance(layer, Int8Linear) and place[1].endswith(".weight"):
                size = self._put_beside(place, layer, changes)
            else:
                size = self._merge(place, changes)
            if place[1].endswith(".weight"):
                sizes[place] = size
        return sizes

    def _layer(self, place: tuple[str, str]) -> nn.Module:
        return self.parts[place[0]].get_submodule(place[1].rpartition(".")[0])

    def _keep(self, place: tuple[str, str]) -> None:
        weight = _parameter(self._layer(place), place)
        if isinstance(weight, Tensor) and place not in self._kept:
            self._kept[place] = weight.detach().to("cpu", copy=True)

    def _base(self, place: tuple[str, str]) -> Tensor:
        """In fp32, where the parameter is."""
        weight = _parameter(self._layer(place), place)
        if isinstance(weight, Int8Weight):
            return Int8Weight(weight.values, weight.scale).dequantised(torch.float32)
        return self._kept[place].to(weight.device, torch.float32)

    def _sum(self, place: tuple[str, str], changes: list[tuple[Update, float]]) -> Tensor:
        part, parameter = place
        total = torch.zeros_like(self._base(place))
        for update, strength in changes:
            update.add_to(total, parameter, lambda name: self._base((part, name)), strength)
        return total

    def _merge(self, place: tuple[str, str], changes: list[tuple[Update, float]]) -> float:
        weight = _parameter(self._layer(place), place)
        if not changes:
            weight.copy_(self._kept.pop(place, weight))
            return 0.0
        change, base = self._sum(place, changes), self._base(place)
        size = _relative(change, base)
        merged = change.add_(base).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{'.'.join(place)} must be finite with the LoRA in {weight.dtype}")
        weight.copy_(merged)
        return size

    def _put_beside(
        self, place: tuple[str, str], layer: Int8Linear, changes: list[tuple[Update, float]]
    ) -> float:
        low = [change for change in changes if change[0].factors]
        others, delta = [change for change in changes if not change[0].factors], None
        if others and layer.rotation:
            raise ValueError(
                f"a LoRA on {'.'.join(place)}, which ConvRot has turned, must be of low rank"
            )
        if others:
            delta = ops.quantize_int8(self._sum(place, others))
        layer.put_beside(_stacked(layer, low) if low else None, delta)
        own, *beside = layer.weight.sampled(SAMPLED)
        return _relative(sum(beside), own) if beside else 0.0


def _parameter(layer: nn.Module, place: tuple[str, str]) -> Tensor | Int8Weight:
    found = getattr(layer, place[1].rpartition(".")[2], None)
    if found is None:
        raise ValueError(f"{'.'.join(place)} is not in the model, but the LoRA changes it")
    kinds = (Tensor, nn.Parameter, Int8Weight)
    if type(found) not in kinds or (isinstance(found, Tensor) and not found.is_floating_point()):
        raise ValueError(f"{'.'.join(place)} is quantised, as {type(found).__name__}")
    if isinstance(found, Tensor) and found.is_meta:
        raise ValueError(f"{'.'.join(place)} must be in memory for a LoRA, got the meta device")
    return found


def _relative(change: Tensor, base: Tensor) -> float:
    size = base.norm().item()
    return change.norm().item() / size if size else 0.0


def _stacked(layer: Int8Linear, changes: list[tuple[Update, float]]) -> LowRank:
    """All low ranks of a layer as one: the downs above each other, the ups side by side."""
    options = {"dtype": torch.float32, "device": layer.values.device}
    downs, ups, blocks = [], [], []
    for update, strength in changes:
        down, up = (factor.to(**options) for factor in update.factors)
        for _, rows, own in update.places:
            blocks.append((range(layer.out_features)[rows], sum(map(len, downs)), len(down)))
            ups.append(strength * up[own])
        downs.append(down)
    whole = torch.zeros(layer.out_features, sum(map(len, downs)), **options)
    for (rows, column, rank), up in zip(blocks, ups, strict=True):
        whole[rows.start : rows.stop, column : column + rank] = up
    return LowRank(torch.cat(downs), whole)


# kinds


def low_rank(down: Tensor, up: Tensor, scale: float) -> tuple[Delta, tuple[Tensor, Tensor]]:
    """scale * up down: the delta, and its factors, of which `up` takes the scale."""

    def delta(base: Tensor, strength: float) -> Tensor:
        return strength * scale * (up.to(base) @ down.to(base))

    return delta, (down.float(), scale * up.float())


def scaled(change: Tensor, scale: float = 1.0) -> Delta:
    """scale * change, [N, K] or [N]."""
    return lambda base, strength: strength * scale * change.to(base)


def replaced(value: Tensor) -> Delta:
    """What leads from the base to the value."""
    return lambda base, strength: strength * (value.to(base) - base)


def hadamard(factors: Sequence[Tensor], scale: float) -> Delta:
    """scale * (w1_a w1_b) * (w2_a w2_b), elementwise; LoHa."""

    def delta(base: Tensor, strength: float) -> Tensor:
        a, b, c, d = (factor.to(base) for factor in factors)
        return strength * scale * (a @ b).mul_(c @ d)

    return delta


def kronecker(first: Sequence[Tensor], second: Sequence[Tensor], scale: float) -> Delta:
    """scale * kron(w1, w2), each whole or a product of two; LoKr."""

    def delta(base: Tensor, strength: float) -> Tensor:
        w1, w2 = (
            w[0].to(base) @ w[1].to(base) if len(w) == 2 else w[0].to(base) for w in (first, second)
        )
        return torch.kron(strength * scale * w1, w2)

    return delta


def generalised(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, scale: float) -> Delta:
    """scale * (b1 b2 + W a1 a2); GLoRA."""

    def delta(base: Tensor, strength: float) -> Tensor:
        change = b1.to(base) @ b2.to(base) + base @ a1.to(base) @ a2.to(base)
        return strength * scale * change

    return delta


def decomposed(inner: Delta, magnitude: Tensor, by_row: bool) -> Delta:
    """DoRA: V = W + delta has its norms, of rows or columns, led to the magnitude.

    The strength counts for the delta and for the way of the norms, as in LyCORIS.
    """

    def delta(base: Tensor, strength: float) -> Tensor:
        v = inner(base, strength).add_(base)
        norm = v.norm(dim=1 if by_row else 0, keepdim=True)
        goal = magnitude.to(base).view_as(norm)
        factor = goal / norm.clamp_min(torch.finfo(norm.dtype).tiny) - 1
        return v.mul_(strength * factor + 1).sub_(base)

    return delta
