"""Adapters of a model: merged into its weights from the kept base, or beside an int8 layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .int8 import Int8Linear, Int8Weight, LowRank

Rows = tuple[tuple[slice, slice], ...]  # rows of a parameter, and rows of an update in it
Delta = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter changes of a parameter, or of some rows of it.

    Args:
        part: which of the models.
        parameter: its name there.
        rows: where the rows of the update lie in the parameter, in the order of the update.
        delta: (rows of the base, fp32 in the update's order; strength) -> what is added to them.
        factors: down [r, Cin] and up [N, r], where delta is strength * up down; else None.
    """

    part: str
    parameter: str
    rows: Rows
    delta: Delta
    factors: tuple[Tensor, Tensor] | None = None

    def add_to(self, total: Tensor, base: Tensor, strength: float) -> None:
        """Adds the delta of this base to rows of `total`, both fp32."""
        delta = self.delta(torch.cat([base[rows] for rows, _ in self.rows]), strength)
        for rows, own in self.rows:
            total[rows] += delta[own]


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

    def set(self, updates: Mapping[str, Sequence[Update]], strengths: Mapping[str, float]) -> None:
        """Puts these adapters in the place of those that are there; all of them or nothing.

        Args:
            updates: name -> what it changes.
            strengths: name -> what the update counts; those not named count nothing.

        Raises:
            ValueError: a weight would not be finite, or is not in memory.
        """
        active: Active = {}
        for name, strength in strengths.items():
            for update in updates[name] if strength else ():
                places = active.setdefault((update.part, update.parameter), [])
                places.append((update, strength))
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
        sizes = {}
        for place in dict.fromkeys((*active, *self._active, *self._kept)):
            part, parameter = place
            layer_name, _, kind = parameter.rpartition(".")
            layer, changes = self.parts[part].get_submodule(layer_name), active.get(place, [])
            if isinstance(layer, Int8Linear) and kind == "weight":
                size = _put_beside(layer, changes)
            else:
                size = self._merge(place, _parameter(layer, place), changes)
            if kind == "weight":
                sizes[place] = size
        return sizes

    def _merge(
        self, place: tuple[str, str], weight: Tensor, changes: list[tuple[Update, float]]
    ) -> float:
        if not changes:
            weight.copy_(self._kept.pop(place, weight))
            return 0.0
        if place not in self._kept:
            self._kept[place] = weight.detach().to("cpu", copy=True)
        base = self._kept[place].to(weight.device, torch.float32)
        change = _sum(base, changes)
        size = _relative(change, base)
        merged = change.add_(base).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{'.'.join(place)} must be finite with the LoRA in {weight.dtype}")
        weight.copy_(merged)
        return size


def _parameter(layer: nn.Module, place: tuple[str, str]) -> Tensor:
    found = getattr(layer, place[1].rpartition(".")[2], None)
    if found is None:
        raise ValueError(f"{'.'.join(place)} is not in the model, but the LoRA changes it")
    if found.is_meta:
        raise ValueError(f"{'.'.join(place)} must be in memory for a LoRA, got the meta device")
    return found


def _relative(change: Tensor, base: Tensor) -> float:
    size = base.norm().item()
    return change.norm().item() / size if size else 0.0


def _sum(base: Tensor, changes: Iterable[tuple[Update, float]]) -> Tensor:
    total = torch.zeros_like(base)
    for update, strength in changes:
        update.add_to(total, base, strength)
    return total


def _put_beside(layer: Int8Linear, changes: list[tuple[Update, float]]) -> float:
    low = [change for change in changes if change[0].factors]
    others = [change for change in changes if not change[0].factors]
    layer.put_beside(_stacked(layer, low) if low else None, _own_grid(layer, others))
    own, *beside = layer.weight.sampled(SAMPLED)
    return _relative(sum(beside), own) if beside else 0.0


def _stacked(layer: Int8Linear, changes: list[tuple[Update, float]]) -> LowRank:
    """All low ranks of a layer as one: the downs above each other, the ups side by side."""
    options = {"dtype": torch.float32, "device": layer.values.device}
    downs, ups, blocks = [], [], []
    for update, strength in changes:
        down, up = (factor.to(**options) for factor in update.factors)
        for rows, own in update.rows:
            blocks.append((range(layer.out_features)[rows], sum(map(len, downs)), len(down)))
            ups.append(strength * up[own])
        downs.append(down)
    whole = torch.zeros(layer.out_features, sum(map(len, downs)), **options)
    for (rows, column, rank), up in zip(blocks, ups, strict=True):
        whole[rows.start : rows.stop, column : column + rank] = up
    return LowRank(torch.cat(downs), whole)


def _own_grid(
    layer: Int8Linear, changes: list[tuple[Update, float]]
) -> tuple[Tensor, Tensor] | None:
    if not changes:
        return None
    if layer.rotation:
        raise ValueError(
            "a LoRA on a weight that ConvRot has turned must be of low rank, got another kind"
        )
    base = Int8Weight(layer.values, layer.scale).dequantised(torch.float32)
    return ops.quantize_int8(_sum(base, changes))


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
