"""fluxkern: a custom-kernel performance engine behind a FLUX.1 transformer."""

from . import ops
from .ops import explain

__version__ = "0.1.0"
__all__ = ["__version__", "explain", "ops"]
