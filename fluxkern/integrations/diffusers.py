"""diffusers' FLUX.1 pipelines and models on `fluxkern.ops`: in place, reversible, same weights."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from threading import RLock
from types import MethodType
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, ModularPipeline
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers import transformer_flux
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .. import ops
from .._modules import Site, Sites
from ._flux_modules import FUSED, FluxAttention
from ._fused import Fused, Settings, warn_once

Accelerated = nn.Module | DiffusionPipeline | ModularPipeline
T = TypeVar("T", bound=Accelerated)
TOKENS = 4608  # of a picture of 1024 x 1024 with 512 of text, until a call shows how many there are
_ADD_NORM = "gated_residual_norm_modulate"
PARTS = {  # class of a block -> path of a part ("" the block itself) -> its sites: name, kind, ops
    transformer_flux.FluxTransformerBlock: {
        "norm1": [("norm1", "norm", "norm_modulate")],
        "norm1_context": [("norm1_context", "norm", "norm_modulate")],
        "attn": [("attn", "attention", "joint_qk_norm_rope, attention")],
        "": [
            ("gate_msa", "gate", _ADD_NORM),
            ("norm2", "norm", _ADD_NORM),
            ("gate_mlp", "gate", "gated_residual"),
            ("c_gate_msa", "gate", _ADD_NORM),
            ("norm2_context", "norm", _ADD_NORM),
            ("c_gate_mlp", "gate", "gated_residual"),
        ],
        "ff.net.0": [("ff.net.0", "gelu", "gelu_tanh")],
        "ff_context.net.0": [("ff_context.net.0", "gelu", "gelu_tanh")],
    },
    transformer_flux.FluxSingleTransformerBlock: {
        "norm": [("norm", "norm", "norm_modulate")],
        "attn": [("attn", "attention", "qk_norm_rope, attention")],
        "act_mlp": [("act_mlp", "gelu", "gelu_tanh")],
        "": [("gate", "gate", "gated_residual")],
    },
    FluxTransformer2DModel: {"norm_out": [("norm_out", "norm", "norm_modulate")]},
}


def accelerate(obj: T, *, strict: bool = False, backend: str | None = None) -> T:
    """Runs the FLUX.1 blocks of a diffusers pipeline or model on fluxkern's ops, in place.

    Every LayerNorm with its scale and shift, gate with its residual, QK norm with its rotation,
    attention and GELU becomes an op; all Linears stay and are called as before. What an op cannot
    take runs diffusers' code, with one warning a reason; `explain` lists it. A second call changes
    the settings.

    Args:
        obj: a pipeline, whose models are all looked at, or a model, wrapped or not.
        strict: raise where diffusers' own code would run, now and in every later call.
        backend: one of `fluxkern.ops.BACKENDS`, for every op; None lets each choose.

    Returns:
        obj.

    Raises:
        ValueError: obj holds no FLUX.1 block of diffusers; backend is not the name of one.
        NotImplementedError: strict, and a site cannot run on ops; obj is left as it was.

    Gradients: as the original's, to every parameter.
    """
    if _trying.get():  # a constructor that accelerates, while this diffusers is tried
        return obj
    if backend is not None and backend not in ops.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(ops.BACKENDS)}, got {backend!r}")
    changed = [part.module for part in _parts(obj) if part.swap(Settings(backend, strict))]
    sites = explain(obj)
    left = {site.reason: site.name for site in sites if site.reason}
    if all(site.runs == "original" for site in sites):
        _restore(changed)
        why = "; ".join(left) or "no block of a FLUX.1 transformer in it"
        raise ValueError(f"nothing to accelerate in {type(obj).__name__}: {why}")
    if strict and left:
        _restore(changed)
        rows = "; ".join(f"{name}: {reason}" for reason, name in left.items())
        raise NotImplementedError(f"strict: diffusers' own code would run ({rows})")
    for reason in left:
        warn_once(reason)
    return obj


def restore(obj: T) -> T:
    """Takes `accelerate` back: classes, forwards and attributes are what they were.

    Args:
        obj: what was given to `accelerate`, or anything that holds its modules.

    Returns:
        obj; unchanged where nothing was accelerated.

    Raises:
        ValueError: another package changed the class of a module since, as fully_shard does.
    """
    _restore([m for _, root in _roots(obj) for m in root.modules() if isinstance(m, Fused)])
    return obj


def explain(obj: Accelerated) -> Sites:
    """What runs at every norm, gate, attention and GELU of a model's FLUX.1 blocks, and why.

    Backends are those for as many tokens as the last call had.

    Args:
        obj: a diffusers pipeline or model, accelerated or not.

    Returns:
        One `Site` each; printed, a table with a line for the blocks that are alike.
    """
    device = getattr(obj, "_execution_device", None)  # a pipeline's, through its offload hooks
    choose = cache(partial(_chosen, device, _tokens(obj)))
    return Sites(site for part in _parts(obj) for site in part.sites_now(choose))


# what accelerate changes


@dataclass
class _Part:
    """A module that can get another forward, and the sites that then run on ops."""

    block: nn.Module
    block_name: str
    path: str
    sites: list[tuple[str, str, str]]
    check: Callable[[type[nn.Module]], str | None]

    @property
    def module(self) -> nn.Module | None:
        try:
            return self.block.get_submodule(self.path)
        except AttributeError:
            return None

    def why_not_swapped(self) -> str | None:
        module = self.module
        if module is None:
            return f"a {type(self.block).__name__} has no {self.path}"
        cls = module.original if isinstance(module, Fused) else type(module)
        if cls not in FUSED:
            return f"a module is a {cls.__module__}.{cls.__qualname__}, which is not known"
        if "forward" in module.__dict__ and not _held(module):
            return f"the forward of a {cls.__name__} was replaced on the instance"
        if not isinstance(module, Fused):
            return self.check(cls)
        return None

    def swap(self, settings: Settings) -> bool:
        """True if it now first runs on ops."""
        new = not isinstance(self.module, Fused)
        if new and self.why_not_swapped() is not None:
            return False
        if new:
            _change_class(self.module, FUSED[type(self.module)])
        self.module._fluxkern = settings
        return new

    def sites_now(self, choose: Callable) -> Iterator[Site]:
        module = self.module
        reason, partly = self.why_not_swapped(), None
        if reason is None and not isinstance(module, Fused):
            reason = "not accelerated"
        if reason is None:
            reason = module.why_not() or _last(module._fluxkern.reason)
        if reason is None and isinstance(module, FluxAttention):
            partly = module.why_not_attention() or _last(module._fluxkern.attention_reason)
        for name, kind, runs in self.sites:
            full = ".".join(filter(None, (self.block_name, name)))
            if reason is not None:
                yield Site(full, kind, "original", None, reason)
                continue
            runs = runs.removesuffix(", attention") if partly else runs
            yield Site(full, kind, runs, choose(module.backend, runs, *_like(self.block)), partly)


def _last(reason: str | None) -> str | None:
    return reason and f"in the last call {reason}"


def _roots(obj: Accelerated) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(obj, nn.Module):
        yield "", obj
    elif isinstance(obj, DiffusionPipeline | ModularPipeline):
        modules = {n: c for n, c in obj.components.items() if isinstance(c, nn.Module)}
        yield from modules.items()
    else:
        raise ValueError(
            f"obj must be a diffusers pipeline or a torch module, got {type(obj).__name__}"
        )


def _parts(obj: Accelerated) -> Iterator[_Part]:
    check = cache(_why_not_this_diffusers)  # a failure is not kept longer
    for root_name, root in _roots(obj):
        for name, module in root.named_modules(prefix=root_name):
            known = next((cls for cls in type(module).__mro__ if cls in PARTS), None)
            for path, sites in PARTS.get(known, {}).items():
                yield _Part(module, name, path, sites, check)


# changing a class, and the bound forwards that hooks hold


def _held(module: nn.Module) -> list[tuple[object, str]]:
    """Where the bound forward of the module's class is held: by hooks of diffusers and of
    accelerate, or by the module itself after they went."""
    registry = getattr(module, "_diffusers_hook", None)
    references = getattr(registry, "_fn_refs", ())
    places = [(r, name) for r in references for name in ("forward", "original_forward")]
    places += [(module, name) for name in ("_old_forward", "forward") if name in module.__dict__]
    bound = MethodType(type(module).forward, module)
    return [(holder, name) for holder, name in places if getattr(holder, name) == bound]


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    places, forward = _held(module), MethodType(new.forward, module)
    module.__class__ = new
    for holder, name in places:
        setattr(holder, name, forward)


def _restore(modules: list[nn.Module]) -> None:
    for cls in map(type, modules):
        if cls is not FUSED.get(cls.original):
            raise ValueError(f"a module became a {cls.__qualname__}: that has to be undone first")
    for module in modules:
        _change_class(module, type(module).original)
        del module._fluxkern


# does the installed diffusers compute what the ops compute?


_verdicts: dict[tuple[Callable, ...], str | None] = {}  # by the functions that ours stand for
_lock = RLock()
_trying = ContextVar("trying", default=False)


def _why_not_this_diffusers(original: type[nn.Module]) -> str | None:
    """The reason why ours cannot stand in for a class of diffusers; found once, where it can be."""
    if reason := FUSED[original].replaced():
        return reason
    with _lock:
        if FUSED[original].functions() not in _verdicts:
            try:
                with _nothing_else():
                    _try_each()
            except Exception as error:  # of this moment, or of a diffusers that is not known
                return f"this diffusers could not be tried: {error}"
        return _verdicts[FUSED[original].functions()]


def _try_each() -> None:
    model = _small_model()
    expected = _run(model)
    for original, fused in FUSED.items():
        if not fused.replaced() and fused.functions() not in _verdicts:
            _verdicts[fused.functions()] = _difference(model, original, expected)


@contextmanager
def _nothing_else() -> Iterator[None]:
    """On a CPU and without what a program may have set for its own calls."""
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
    token = _trying.set(True)
    try:
        with (
            _disable_current_modes(),  # of dispatch: fake tensors
            torch._C.DisableTorchFunction(),  # modes: default devices, packages that intercept
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            attention_backend("native"),
        ):
            yield
    finally:
        _trying.reset(token)
        F.scaled_dot_product_attention = attention


def _small_model() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,  # the norm behind the last block hides its scale
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    model = model.to_empty(device="cpu").float()  # also where a program makes no memory for weights
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.normal_(std=0.3, generator=generator)
    return model.eval()


def _run(model: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    img, txt, pooled = (
        torch.randn(size, generator=generator, dtype=torch.float32)
        for size in ((2, 4, 4), (2, 3, 8), (2, 8))
    )
    ids = torch.arange(21, dtype=torch.float32).view(7, 3)
    timestep = torch.tensor([0.3, 0.7], dtype=torch.float32)
    return model(img, txt, pooled, timestep, ids[:4], ids[4:]).sample


def _difference(
    model: FluxTransformer2DModel, original: type[nn.Module], expected: torch.Tensor
) -> str | None:
    model = copy.deepcopy(model)
    modules = [module for module in model.modules() if type(module) is original]
    for module in modules:
        _change_class(module, FUSED[original])
        module._fluxkern = Settings(None, True)
    error = (_run(model) - expected).abs().max() / expected.abs().max()
    if not modules or not error < 1e-4:
        return f"{original.__name__} of this diffusers computes something else"
    return None


# which backend an op would choose


def _tokens(obj: Accelerated) -> int:
    modules = (module for _, root in _roots(obj) for module in root.modules())
    attentions = (module for module in modules if isinstance(module, FluxAttention))
    return max((module._fluxkern.tokens for module in attentions), default=0) or TOKENS


def _like(block: nn.Module) -> tuple[int, int, torch.dtype, torch.device]:
    """Width, head dim, dtype and device of what runs through a block, or through all of a model."""
    named = dict(block.named_parameters())
    weight = next((p for name, p in named.items() if "norm_q" in name), next(iter(named.values())))
    head_dim = weight.shape[-1]
    width = getattr(block._modules.get("attn", block), "inner_dim", head_dim)
    return width, head_dim, weight.dtype, weight.device


def _chosen(
    execution: torch.device | None,
    tokens: int,
    named: str | None,
    ops_of_site: str,
    width: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    device = execution or device
    args = {}
    if device.type != "meta":
        args = _arguments(tokens, width, head_dim, dtype, device)
    given = {op: args.get(op, ()) for op in ops_of_site.split(", ")}
    if named is None:
        chosen = [ops.explain(op, *args)[0].chosen or "none" for op, args in given.items()]
        return ", ".join(dict.fromkeys(chosen))
    reasons = [ops.why_not(op, named, *args) for op, args in given.items() if args]
    why_not = next(filter(None, reasons), None)
    return f"{named}, which cannot run: {why_not}" if why_not else named


def _arguments(
    tokens: int, width: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple]:
    def empty(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    x, vec, w = empty(1, tokens, width), empty(1, width), empty(head_dim)
    q = empty(1, tokens, max(1, width // head_dim), head_dim)
    cos = empty(tokens, head_dim // 2, dtype=torch.float32)
    txt, img = q.split([tokens // 9, tokens - tokens // 9], dim=1)  # 512 of 4608
    return {
        "norm_modulate": (x, vec, vec, 1e-6),
        "gated_residual": (x, x, vec),
        _ADD_NORM: (x, x, vec, vec, vec, 1e-6),
        "gelu_tanh": (x,),
        "qk_norm_rope": (q, q, w, w, cos, cos, 1e-6),
        "joint_qk_norm_rope": (txt, txt, txt, img, img, img, w, w, w, w, cos, cos, 1e-6),
        "attention": (q, q, q),
    }
