"""FLOPs of our ops for torch.utils.flop_counter, without importing it: it imports Triton."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


class _AfterImport(MetaPathFinder):
    """Registers the formulas when the counter is first imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), _add(module, _formulas))
        return spec


def _add(counter: Any, formulas: dict[Any, Callable[..., int]]) -> None:
    for op, formula in formulas.items():
        counter.register_flop_formula(op, get_raw=True)(formula)


def register(op: Any, formula: Callable[..., int]) -> None:
    """`formula` gets the arguments of a call of the op packet, as they are."""
    if COUNTER in sys.modules:
        _add(sys.modules[COUNTER], {op: formula})
    elif not _formulas:
        sys.meta_path.insert(0, _AfterImport())
    _formulas[op] = formula
