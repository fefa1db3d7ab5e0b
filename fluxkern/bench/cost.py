"""What a program costs however fast it runs: its operators, their FLOPs, the bytes that they move.

An operator reads its inputs and writes its outputs once. Of ours the Case counts the FLOPs, of
torch's own torch's formulas do; nothing needs to be computed, so a model may lie on `meta`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..cases import CASES

WRITTEN_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_")  # their first argument
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # of it torch has no formula
NOTHING_MOVES = ("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh")


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    op: str
    flops: int
    bytes: int


class Counted(TorchDispatchMode):
    """Notes the cost of each operator that is called inside and moves anything."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    @property
    def bytes(self) -> int:
        return sum(cost.bytes for cost in self.costs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if moves(func):
            named = by_name(func, args, kwargs or {})
            cost = Cost(func._schema.name, flops(func, args, named, out), moved(func, named, out))
            self.costs.append(cost)
        return out


def by_name(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = (a.name for a in func._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs


def moves(func: Any) -> bool:
    """Whether it is neither a view nor memory without values."""
    schema = func._schema
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not (aliases or "empty" in schema.name or schema.name in NOTHING_MOVES)


def flops(func: Any, args: tuple, named: dict[str, Any], out: Any) -> int:
    space, _, op = func._schema.name.partition("::")
    case = CASES.get(op) or CASES.get(op.removesuffix("_"))
    if space == "fluxkern" and case is not None:
        return case.flops(named)
    packet = func._overloadpacket
    if packet == ON_CPU:
        packet = torch.ops.aten._scaled_dot_product_flash_attention
    formula = flop_registry.get(packet)
    return formula(*args, out_val=out) if formula else 0


def moved(func: Any, named: dict[str, Any], out: Any) -> int:
    """Bytes; an argument that is written over is read and written."""
    schema = func._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    taken = {n: v for n, v in named.items() if n not in written or not only_written(schema, named)}
    results = [named.get(n) for n in written] if written else out
    return size_of(tensors(taken.values())) + size_of(tensors([results]))


def only_written(schema: Any, named: dict[str, Any]) -> bool:
    return schema.name in WRITTEN_ONLY or named.get("add") is False


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor))


def size_of(found: Iterable[Tensor]) -> int:
    """Bytes of the elements that lie in memory: what is expanded is there once."""
    return sum(
        t.itemsize * math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s or n == 0)
        for t in found
    )


@torch.no_grad()
def counted(call: Any) -> Counted:
    """The costs of one call without arguments."""
    with Counted() as found:
        call()
    return found
