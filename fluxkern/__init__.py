"""fluxkern: a custom-kernel performance engine behind a FLUX.1 transformer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops
    from .ops import explain
    from .pipeline import FluxPipeline

__version__ = "0.1.0"
__all__ = ["FluxPipeline", "__version__", "explain", "ops"]
_HOMES = {"FluxPipeline": ".pipeline", "explain": ".ops"}


def __getattr__(name: str) -> object:
    # on first use: the command line's help and its errors need no torch
    if name == "ops":
        return import_module(".ops", __name__)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
