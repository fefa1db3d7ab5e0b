"""fluxkern: a custom-kernel performance engine behind a FLUX.1 transformer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops
    from .integrations.diffusers import accelerate, restore
    from .integrations.lora import load_lora, unload_loras
    from .pipeline import FluxPipeline

__version__ = "0.1.0"
__all__ = [
    "FluxPipeline",
    "__version__",
    "accelerate",
    "explain",
    "load_lora",
    "ops",
    "restore",
    "unload_loras",
]
_DIFFUSERS = ".integrations.diffusers"
_LORA = ".integrations.lora"
_HOMES = {
    "FluxPipeline": ".pipeline",
    "accelerate": _DIFFUSERS,
    "load_lora": _LORA,
    "restore": _DIFFUSERS,
    "unload_loras": _LORA,
}


def explain(what: object = None, *args: object) -> list:
    """What runs, and why not something else: for ops, a pipeline or a model.

    Args:
        what: name of an op, or None for all of them (`ops.explain`); a `FluxPipeline` or a model of
            it (`model.layers.explain`); or a diffusers pipeline or model
            (`integrations.diffusers.explain`).
        args: the op's arguments.

    Returns:
        One row an op, or one row for each place of the model; both print as a table.
    """
    if what is None or isinstance(what, str):
        return import_module(".ops", __name__).explain(what, *args)
    own = import_module(".model.layers", __name__).explain(what)
    return own or import_module(_DIFFUSERS, __name__).explain(what)


def __getattr__(name: str) -> object:
    # on first use: the command line's help and its errors need no torch
    if name == "ops":
        return import_module(".ops", __name__)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
