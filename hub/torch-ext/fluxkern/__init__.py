"""The ops of FLUX.1 behind one call each, and the layers of diffusers and transformers on them."""

from . import layers, ops
from .ops import *  # noqa: F403

__all__ = [*ops.__all__, "layers", "ops"]
