"""Patched classes of diffusers and torch, constructors that accelerate, and bad moments."""

import functools
import threading
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import activations, normalization
from diffusers.models.transformers import transformer_flux as flux
from diffusers_models import distance, inputs, run, tiny_transformer
from torch import nn

import fluxkern
from fluxkern.integrations import _fused
from fluxkern.integrations import diffusers as drop_in

PATCHES = {  # a function of a class or module -> the kinds of sites that then run it
    (flux.FluxTransformerBlock, "forward"): {"gate", "norm"},
    (flux.FluxSingleTransformerBlock, "forward"): {"gate"},
    (flux.FluxAttention, "forward"): {"attention"},
    (flux.FluxAttnProcessor, "__call__"): {"attention"},
    (flux, "apply_rotary_emb"): {"attention"},
    (flux, "dispatch_attention_fn"): {"attention"},
    (normalization.AdaLayerNormZero, "forward"): {"norm"},
    (normalization.AdaLayerNormZeroSingle, "forward"): {"norm"},
    (normalization.AdaLayerNormContinuous, "forward"): {"norm"},
    (activations.GELU, "forward"): {"gelu"},
    (activations.GELU, "gelu"): {"gelu"},
    (nn.GELU, "forward"): {"gelu"},
    (nn.LayerNorm, "forward"): {"gate", "norm"},
    (nn.RMSNorm, "forward"): {"attention"},
}
IDS = [f"{owner.__name__.rpartition('.')[-1]}.{name}" for owner, name in PATCHES]


@pytest.fixture(autouse=True)
def _warn_anew() -> None:
    _fused.warn_once.cache_clear()


class Patch:
    """Counts the calls and, when told to, scales what a function gives: an editing method."""

    def __init__(self, function: Callable, wraps: bool):
        self.calls, self.strength = 0, 1.0

        def patched(*args: object, **kwargs: object) -> object:
            self.calls += 1
            out = function(*args, **kwargs)
            if isinstance(out, tuple):
                return tuple(self.strength * t for t in out)
            return self.strength * out

        self.function = functools.wraps(function)(patched) if wraps else patched


def reasons(model: nn.Module) -> dict[str, set[str]]:
    """By kind, the reasons why sites run the original."""
    found = {}
    for site in fluxkern.explain(model):
        if site.reason:
            found.setdefault(site.kind, set()).add(site.reason)
    return found


@pytest.mark.parametrize("wraps", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("owner, name", PATCHES, ids=IDS)
def test_a_patched_function_runs(
    owner: type, name: str, when: str, wraps: bool, monkeypatch: pytest.MonkeyPatch
):
    model, original = tiny_transformer(), tiny_transformer()
    original.load_state_dict(model.state_dict())
    given, patch = inputs(model), Patch(getattr(owner, name), wraps)
    if when == "after":
        fluxkern.accelerate(model)
    monkeypatch.setattr(owner, name, patch.function)
    if when == "before":
        fluxkern.accelerate(model)
    for patch.strength in (1.0, 0.9):
        expected = run(original, given)
        calls, patch.calls = patch.calls, 0
        assert distance(run(model, given), expected) < 1e-5
        found, patch.calls = patch.calls, 0
        assert found == calls or patch.strength == 1.0
        assert found > 0
    short = owner.__qualname__ if isinstance(owner, type) else owner.__name__
    said = reasons(model)
    assert said.keys() == PATCHES[owner, name]
    assert all(f"{short}.{name} was replaced" in reason for kind in said for reason in said[kind])
    with pytest.raises(NotImplementedError, match=f"{name} was replaced"):
        fluxkern.accelerate(tiny_transformer(), strict=True)
    monkeypatch.undo()
    fluxkern.accelerate(model, strict=True)
    assert distance(run(model, given), run(original, given)) < 1e-5
    assert not reasons(model)


@pytest.mark.parametrize("owner, name", PATCHES, ids=IDS)
def test_strict_refuses_a_call_after_a_patch(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
):
    model = fluxkern.accelerate(tiny_transformer(), strict=True)
    monkeypatch.setattr(owner, name, Patch(getattr(owner, name), True).function)
    with pytest.raises(NotImplementedError, match=f"{name} was replaced"):
        run(model, inputs(model))
    monkeypatch.undo()
    run(model, inputs(model))


@pytest.mark.parametrize("owner, name", list(PATCHES)[:4], ids=IDS[:4])
def test_a_model_that_is_compiled_after_a_patch_runs_it(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
):
    torch._dynamo.reset()
    model, function = fluxkern.accelerate(tiny_transformer()), getattr(owner, name)

    def patched(self: object, *args: object, **kwargs: object) -> object:
        out = function(self, *args, **kwargs)
        return tuple(0.9 * t for t in out) if isinstance(out, tuple) else 0.9 * out

    monkeypatch.setattr(owner, name, patched)
    given = inputs(model)
    expected = run(model, given)
    found = run(torch.compile(model, backend="aot_eager"), given)
    assert distance(found, expected) < 1e-5
    monkeypatch.undo()
    torch._dynamo.reset()
    assert distance(run(model, given), expected) > 1e-3


@pytest.mark.parametrize(
    "path", ["transformer_blocks.0", "single_transformer_blocks.1", "transformer_blocks.1.attn",
             "transformer_blocks.0.norm1", "transformer_blocks.0.ff.net.0", "norm_out"],
)  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_replaced_on_an_instance_runs(path: str, when: str):
    model, original = tiny_transformer(), tiny_transformer()
    original.load_state_dict(model.state_dict())
    seen = []

    def replace(model: FluxTransformer2DModel) -> None:
        module = model.get_submodule(path)
        forward = module.forward

        def patched(*args: object, **kwargs: object) -> object:
            seen.append(1)
            out = forward(*args, **kwargs)
            return tuple(0.9 * t for t in out) if isinstance(out, tuple) else 0.9 * out

        module.forward = patched

    if when == "after":
        fluxkern.accelerate(model)
    replace(model)
    replace(original)
    if when == "before":
        fluxkern.accelerate(model)
    given = inputs(model)
    assert distance(run(model, given), run(original, given)) < 1e-5
    assert len(seen) == 2
    said = {reason for kind in reasons(model).values() for reason in kind}
    assert said == {
        f"the forward of a {type(original.get_submodule(path)).__name__} "
        "was replaced on the instance"
    }
    with pytest.raises(NotImplementedError, match="was replaced on the instance"):
        fluxkern.accelerate(model, strict=True)


def test_a_gelu_replaced_on_an_instance_runs():
    model = fluxkern.accelerate(tiny_transformer())
    act = model.transformer_blocks[0].ff.net[0]
    act.gelu = lambda x: torch.relu(x)
    given = inputs(model)
    found = run(model, given)
    assert distance(found, run(fluxkern.restore(model), given)) < 1e-5
    del act.gelu
    assert distance(found, run(model, given)) > 1e-4


def test_a_norm_with_a_hook_of_all_modules_is_called():
    model, seen = fluxkern.accelerate(tiny_transformer()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        given = inputs(model)
        found = run(model, given)
    finally:
        handle.remove()
    assert seen.count(nn.LayerNorm) == 2 * 4 + 2 + 1 and seen.count(nn.RMSNorm) == 2 * 4 + 2 * 2
    assert distance(run(model, given), found) < 1e-5


# constructors that accelerate


@pytest.mark.parametrize(
    "cls", [FluxTransformer2DModel, flux.FluxTransformerBlock, flux.FluxSingleTransformerBlock]
)
def test_a_constructor_may_accelerate(cls: type, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drop_in, "_verdicts", {})
    init = cls.__init__

    @functools.wraps(init)
    def accelerating(self: nn.Module, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        fluxkern.accelerate(self, strict=True)

    original = tiny_transformer()
    monkeypatch.setattr(cls, "__init__", accelerating)
    model = tiny_transformer()
    model.load_state_dict(original.state_dict())
    assert any(site.runs != "original" for site in fluxkern.explain(model))
    given = inputs(model)
    assert distance(run(model, given), run(original, given)) < 1e-5


def test_threads_may_accelerate_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drop_in, "_verdicts", {})
    attention = torch.nn.functional.scaled_dot_product_attention
    models = [tiny_transformer() for _ in range(4)]
    threads = [
        threading.Thread(target=fluxkern.accelerate, args=(m,), kwargs={"strict": True})
        for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(not reasons(model) for model in models)
    assert torch.nn.functional.scaled_dot_product_attention is attention


# bad moments


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError("no memory")])
def test_a_failure_of_one_moment_is_not_kept(error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drop_in, "_verdicts", {})

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(drop_in, "_run", fail)
        with pytest.raises(ValueError, match=f"could not be tried: {error}"):
            fluxkern.accelerate(tiny_transformer())
    assert not reasons(fluxkern.accelerate(tiny_transformer(), strict=True))


# empty sequences


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("side, txt_len", [(4, 0), (0, 5)])
def test_a_sequence_without_text_or_without_a_picture(
    side: int, txt_len: int, gradients: bool, batch: int
):
    model, original = tiny_transformer(), tiny_transformer()
    original.load_state_dict(model.state_dict())
    given = inputs(model, batch, side, txt_len)
    fluxkern.accelerate(model, strict=True)
    outs = []
    for net in (model, original):
        with torch.set_grad_enabled(gradients):
            outs.append(net(**given, return_dict=False)[0])
        if gradients:
            outs[-1].sum().backward()
    assert outs[0].shape == outs[1].shape == (batch, side * side, 16)
    assert torch.allclose(*outs, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(model.named_parameters(), original.parameters(), strict=True):
        if gradients and b.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4), name
