"""fluxkern: a custom-kernel performance engine behind a FLUX.1 transformer."""

from typing import TYPE_CHECKING

from . import ops
from .ops import explain

if TYPE_CHECKING:
    from .pipeline import FluxPipeline

__version__ = "0.1.0"
__all__ = ["FluxPipeline", "__version__", "explain", "ops"]


def __getattr__(name: str) -> object:
    if name == "FluxPipeline":  # on first use: the ops alone need no model
        from .pipeline import FluxPipeline

        return FluxPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
