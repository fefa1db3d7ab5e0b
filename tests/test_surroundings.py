"""The pipeline among what a program sets for itself: dtypes, devices, autocast, hooks, threads,
numbers of numpy; and its arguments against those of diffusers."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from test_pipeline import PROMPT, draw, draw_in_both, seeded
from tiny_flux import write_tiny_flux
from torch import Tensor, nn

from fluxkern import FluxPipeline, explain
from fluxkern.compact import distill, text, train
from fluxkern.model.autoencoder import AutoEncoder, blend_weights
from fluxkern.model.sampling import get_img_ids, get_schedule, get_txt_ids


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "no guidance"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    theirs = write_tiny_flux(folder, guidance=request.param)
    return FluxPipeline.from_pretrained(folder / "flux"), theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings")
    write_tiny_flux(folder, guidance=True, seed=2)
    return folder / "flux"


@pytest.fixture
def pipe(folder: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(folder)


# default dtypes and devices


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS = [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]


@pytest.mark.parametrize("dtype, device", DEFAULTS, ids=str)
@pytest.mark.parametrize("loaded", ["before", "within"])
def test_defaults_of_torch_change_no_bit_of_a_picture(
    folder: Path, loaded: str, dtype: torch.dtype, device: str
):
    asked = {"guidance_scale": 3.3, "true_cfg_scale": 2.1, "num_inference_steps": 3}
    expected = draw(FluxPipeline.from_pretrained(folder), PROMPT, generator=seeded(), **asked)
    pipe = FluxPipeline.from_pretrained(folder) if loaded == "before" else None
    with defaults(dtype, device):
        pipe = pipe or FluxPipeline.from_pretrained(folder)
        found = draw(pipe, PROMPT, generator=seeded(), **asked)
    assert pipe.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("dtype, device", DEFAULTS, ids=str)
def test_defaults_of_torch_change_no_bit_of_what_is_made_ahead(dtype: torch.dtype, device: str):
    def made() -> list[Tensor]:
        rng = np.random.default_rng(3)
        return [
            get_img_ids(48, 32),
            get_txt_ids(5),
            get_schedule(4, 16),
            get_schedule(2, 16, sigmas=[1.0, 0.3]),
            blend_weights([(0, 8), (4, 12)], 4, 2),
            torch.rand(3, generator=train.torch_chance(rng), device="cpu", dtype=torch.float32),
            distill.pieces(["a", "b"], torch.arange(24.0, device="cpu").view(2, 3, 4, 1).float(),
                           4, rng)[3],
            *text._batch(rng, 3)[1].values(),
        ]  # fmt: skip

    expected = made()
    with defaults(dtype, device):
        found = made()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.mark.parametrize("dtype, device", DEFAULTS, ids=str)
def test_defaults_of_torch_change_no_bit_of_a_tiled_decode(
    pipe: FluxPipeline, dtype: torch.dtype, device: str
):
    pipe.vae.tile_latent, pipe.vae.tile_overlap = 4, 2
    z = torch.randn(1, 16, 7, 6)
    with torch.no_grad():
        expected = pipe.vae.decode(z)
        with defaults(dtype, device):
            assert torch.equal(pipe.vae.decode(z), expected)


# autocast


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_a_pipeline_under_autocast_is_as_accurate_as_one_in_its_dtype(folder: Path):
    pipe = FluxPipeline.from_pretrained(folder)
    half = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    noise = torch.randn(2, 6, 64, generator=seeded())
    asked = {"latents": noise, "output_type": "latent", "num_inference_steps": 3}
    truth = draw(pipe, [PROMPT] * 2, **asked)
    with torch.autocast("cpu", torch.bfloat16):
        found = draw(pipe, [PROMPT] * 2, **asked)
        assert np.isfinite(draw(pipe, PROMPT, output_type="np")).all()
    other = draw(half, [PROMPT] * 2, **asked)
    assert found.dtype == torch.float32 and not torch.equal(found, truth)
    assert distance(found, truth) <= 1.5 * distance(other, truth)
    assert torch.equal(draw(pipe, [PROMPT] * 2, **asked), truth)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_a_vae_under_autocast_is_as_accurate_as_one_in_its_dtype(
    folder: Path, way: str, gradients: bool
):
    vae = FluxPipeline.from_pretrained(folder).vae
    x = torch.randn(2, 3, 32, 48) if way == "encode" else torch.randn(2, 16, 4, 6)
    with torch.set_grad_enabled(gradients):
        truth = getattr(vae, way)(x).detach()
        with torch.autocast("cpu", torch.bfloat16):
            found = getattr(vae, way)(x)
    if gradients:
        found.float().sum().backward()
        part = vae.encoder if way == "encode" else vae.decoder
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    with torch.no_grad():
        other = getattr(vae.bfloat16(), way)(x.bfloat16())
    assert distance(found.detach(), truth) <= 1.5 * distance(other, truth)


# layers with something on them


@pytest.mark.parametrize("kind", [nn.GroupNorm, nn.Conv2d])
def test_a_hook_of_every_layer_of_the_vae_runs(pipe: FluxPipeline, kind: type):
    layers = [m for m in pipe.vae.modules() if type(m) is kind]
    x, seen = torch.randn(1, 3, 32, 32), []

    def through(vae: AutoEncoder) -> Tensor:
        return vae.decode(vae.encode(x))

    with torch.no_grad():
        expected = through(pipe.vae)
        for layer in layers:
            layer.register_forward_hook(lambda *_: seen.append(1))
        assert distance(through(pipe.vae), expected) <= 1e-5
        assert len(seen) == len(layers)
        layers[-1].register_forward_hook(lambda _m, _x, y: 2 * y)
        assert distance(through(pipe.vae), expected) > 1e-3


@pytest.mark.parametrize("cls", [nn.GroupNorm, nn.Conv2d, nn.Linear, nn.GELU, nn.SiLU])
def test_a_replaced_forward_of_a_class_runs_at_every_layer(
    pipe: FluxPipeline, cls: type, monkeypatch: pytest.MonkeyPatch
):
    forward, seen = cls.forward, set()

    def patched(self: nn.Module, x: Tensor) -> Tensor:
        seen.add(self)
        return forward(self, x)

    models = pipe.transformer, pipe.vae.decoder
    layers = {m for model in models for m in model.modules() if type(m) is cls}
    expected = draw(pipe, PROMPT, generator=seeded())
    monkeypatch.setattr(cls, "forward", patched)
    assert distance(draw(pipe, PROMPT, generator=seeded()), expected) <= 1e-5
    assert layers and layers <= seen
    assert any(f"{cls.__name__}.forward was replaced" == site.reason for site in explain(pipe))


def test_explain_says_how_the_layers_of_a_pipeline_go(pipe: FluxPipeline):
    sites = explain(pipe)
    assert not any(site.reason for site in sites)
    assert {site.runs for site in sites} == {"linear", "modulation", "group_norm_silu"}
    pipe.transformer.single_blocks[0].linear2.register_forward_hook(lambda *_: None)
    pipe.vae.decoder.norm_out.register_forward_hook(lambda *_: None)
    called = {site.name: site.reason for site in explain(pipe) if site.runs == "called"}
    assert called == {
        "transformer.single_blocks.0.linear2": "a Linear has a hook",
        "vae.decoder.norm_out": "a GroupNorm has a hook",
    }
    assert explain(pipe.vae.decoder) and explain(pipe.transformer)


def adapted(pipe: FluxPipeline) -> FluxPipeline:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["qkv", "linear1"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.transformer)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.text_encoder.clip)
    return pipe


def test_a_lora_has_its_scale_for_one_call(folder: Path, pipe: FluxPipeline):
    plain = draw(pipe, PROMPT, generator=seeded())
    pipe = adapted(pipe)

    def scaled(scale: float | None) -> Tensor:
        kwargs = {} if scale is None else {"joint_attention_kwargs": {"scale": scale}}
        return draw(pipe, PROMPT, generator=seeded(), **kwargs)

    whole = scaled(None)
    assert torch.equal(scaled(1.0), whole) and torch.equal(scaled(np.float32(1)), whole)
    assert distance(scaled(0.0), plain) <= 1e-6
    half = scaled(0.5)
    assert distance(half, whole) > 1e-4 < distance(half, plain)
    assert torch.equal(scaled(None), whole)

    def fails(*_: object) -> None:
        raise RuntimeError("the callback failed")

    with pytest.raises(RuntimeError, match="the callback failed"):
        draw(pipe, PROMPT, joint_attention_kwargs={"scale": 0.1}, callback_on_step_end=fails)
    assert torch.equal(scaled(None), whole)


def test_a_pipeline_takes_a_transformer_that_peft_wraps(pipe: FluxPipeline):
    peft = pytest.importorskip("peft")
    plain = draw(pipe, PROMPT, generator=seeded())
    config = peft.LoraConfig(r=4, target_modules=["qkv", "linear2"], init_lora_weights=False)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    styled = draw(pipe, PROMPT, generator=seeded())
    assert distance(styled, plain) > 1e-4
    assert sum(site.runs == "called" for site in explain(pipe)) == 2 + 2
    pipe.transformer = pipe.transformer.merge_and_unload()
    assert distance(draw(pipe, PROMPT, generator=seeded()), styled) <= 1e-5
    assert not any(site.runs == "called" for site in explain(pipe))


def test_a_compiled_transformer_still_has_its_modulations_ahead(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
):
    torch._dynamo.reset()
    expected, flux, calls = draw(pipe, PROMPT, generator=seeded()), pipe.transformer, []
    workspaces = type(flux).workspaces
    monkeypatch.setattr(
        type(flux), "workspaces", lambda *args: calls.append(1) or workspaces(*args)
    )
    pipe.transformer = torch.compile(flux, backend="aot_eager")
    found = draw(pipe, PROMPT, generator=seeded(), num_inference_steps=2)
    assert distance(found, expected) <= 1e-5 and len(calls) == 1
    assert not any(site.reason for site in explain(pipe))
    torch._dynamo.reset()


class Packed(nn.Module):
    """A layer that has no weight to be read."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.held = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


@pytest.mark.parametrize("release", [False, True])
def test_a_pipeline_of_replaced_layers_draws_the_same(pipe: FluxPipeline, release: bool):
    expected = draw(pipe, PROMPT, generator=seeded())
    linears = [n for n, m in pipe.transformer.named_modules() if type(m) is nn.Linear]
    for name in linears:
        layer = Packed(pipe.transformer.get_submodule(name))
        pipe.transformer.set_submodule(name, layer)
    found = draw(pipe, PROMPT, generator=seeded(), release_modulation=release)
    assert distance(found, expected) <= 1e-5
    called = {site.name for site in explain(pipe) if site.runs == "called"}
    assert called == {f"transformer.{name}" for name in linears}


def test_a_dynamically_quantised_pipeline_draws_nearly_the_same(pipe: FluxPipeline):
    expected = draw(pipe, PROMPT, generator=seeded())
    torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, inplace=True)
    assert 1e-5 < distance(draw(pipe, PROMPT, generator=seeded()), expected) < 0.05


def sequential_offload(pipe: FluxPipeline) -> None:
    accelerate = pytest.importorskip("accelerate")
    for model in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(model, "cpu", offload_buffers=True)


def model_offload(pipe: FluxPipeline) -> None:
    accelerate = pytest.importorskip("accelerate")
    for model in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload_with_hook(model, "cpu")


def group_offload(kind: str) -> Callable:
    def offload(pipe: FluxPipeline) -> None:
        from diffusers.hooks import apply_group_offloading

        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        for model in (pipe.transformer, pipe.vae):
            apply_group_offloading(model, cpu, cpu, kind, **blocks)

    offload.__name__ = kind
    return offload


@pytest.mark.parametrize(
    "offload",
    [sequential_offload, model_offload, group_offload("block_level"), group_offload("leaf_level")],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("release", [False, True])
def test_an_offloaded_pipeline_draws_the_same(pipe: FluxPipeline, offload: Callable, release: bool):
    expected = draw(pipe, PROMPT, generator=seeded())
    offload(pipe)
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    for _ in range(2):
        found = draw(pipe, PROMPT, generator=seeded(), release_modulation=release)
        assert distance(found, expected) <= 1e-5


def test_a_pipeline_with_weights_stored_in_8_bits_draws_nearly_the_same(pipe: FluxPipeline):
    from diffusers.hooks import apply_layerwise_casting

    expected = draw(pipe, PROMPT, generator=seeded())
    for model in (pipe.transformer, pipe.vae):
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    assert pipe.dtype == torch.float32 and pipe.vae.dtype == torch.float32
    found = draw(pipe, PROMPT, generator=seeded())
    assert 1e-4 < distance(found, expected) < 0.2


# numbers


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint16, np.array, torch.tensor])
def test_whole_numbers_of_others_are_taken(pipe: FluxPipeline, number: Callable):
    asked = {"height": 32, "width": 48, "num_inference_steps": 2, "num_images_per_prompt": 2}
    expected = draw(pipe, PROMPT, generator=seeded(), max_sequence_length=16, **asked)
    asked = {name: number(value) for name, value in asked.items()}
    found = draw(pipe, PROMPT, generator=seeded(), max_sequence_length=number(16), **asked)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, Decimal, Fraction, int])
def test_numbers_of_others_are_taken(pipe: FluxPipeline, number: Callable):
    asked = {"guidance_scale": 3.0, "true_cfg_scale": 2.0}
    expected = draw(pipe, PROMPT, generator=seeded(), **asked)
    asked = {name: number(value) for name, value in asked.items()}
    assert torch.equal(draw(pipe, PROMPT, generator=seeded(), **asked), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"height": np.float64(32)}, "height must be a multiple of 16 from 16 to 8192"),
        ({"height": True}, "height must be a multiple of 16"),
        ({"width": np.int64(40)}, "width must be a multiple of 16"),
        ({"num_inference_steps": np.float32(2)}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": np.int64(-1)}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": "3.5"}, "guidance_scale must be a finite number, got '3.5'"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number, got 1000"),
        ({"guidance_scale": np.float32("nan")}, "guidance_scale must be a finite number"),
        ({"true_cfg_scale": [2.0]}, r"true_cfg_scale must be a finite number, got \[2.0\]"),
        ({"sigmas": []}, "the number of sigmas must be a whole number from 1 to 1000, got 0"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must be above 0 and up to 1, got 0.0"),
        ({"sigmas": [1.5]}, "sigmas must be above 0 and up to 1, got 1.5"),
        ({"sigmas": ["1"]}, "sigmas must be a finite number, got '1'"),
        ({"joint_attention_kwargs": {"colour": 1}}, "joint_attention_kwargs must be of scale, got"),
        ({"joint_attention_kwargs": {"scale": None}}, "scale must be a finite number, got None"),
    ],
)
def test_other_values_are_refused_by_name(pipe: FluxPipeline, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        draw(pipe, PROMPT, **options)


# interrupts


def test_an_interrupt_ends_its_own_call_alone(pipe: FluxPipeline):
    """Two requests to one pipeline: the first stops while the second is in its first step."""
    second_is_on, first_is_done = threading.Event(), threading.Event()
    steps = {"first": [], "second": []}

    def first(pipe: FluxPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        steps["first"].append(step)
        assert second_is_on.wait(60)
        pipe.interrupt = True
        assert pipe.interrupt and pipe._interrupt
        return tensors

    def second(pipe: FluxPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        steps["second"].append(step)
        second_is_on.set()
        assert first_is_done.wait(60)
        assert not pipe.interrupt
        return tensors

    def request(callback: Callable) -> None:
        draw(pipe, PROMPT, num_inference_steps=4, callback_on_step_end=callback)

    threads = [threading.Thread(target=request, args=(f,)) for f in (first, second)]
    for thread in threads:
        thread.start()
    threads[0].join()
    first_is_done.set()
    threads[1].join()
    assert steps == {"first": [0], "second": [0, 1, 2, 3]}


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_an_interrupt_from_outside_ends_what_runs_and_nothing_later(pipe: FluxPipeline, name: str):
    steps = []

    def stopped_by_another_thread(pipe, step, timestep, tensors):
        steps.append(step)
        thread = threading.Thread(target=setattr, args=(pipe, name, True))
        thread.start()
        thread.join()

    asked = {"num_inference_steps": 3}
    draw(pipe, PROMPT, callback_on_step_end=stopped_by_another_thread, **asked)
    assert steps == [0] and not pipe.interrupt
    setattr(pipe, name, True)  # nothing runs
    draw(pipe, PROMPT, callback_on_step_end=lambda *_: steps.append(1), **asked)
    assert steps == [0, 1, 1, 1]


def test_an_interrupt_while_the_prompt_is_read_ends_the_call_before_its_first_step(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
):
    encode, steps = pipe.text_encoder.encode, []

    def stopped(*args: object) -> tuple[Tensor, Tensor]:
        thread = threading.Thread(target=setattr, args=(pipe, "interrupt", True))
        thread.start()
        thread.join()
        return encode(*args)

    monkeypatch.setattr(pipe.text_encoder, "encode", stopped)
    draw(pipe, PROMPT, callback_on_step_end=lambda *_: steps.append(1))
    assert not steps


@pytest.mark.parametrize("options", [{"negative_prompt": "blue"}, {"latents": torch.nan}])
def test_a_warning_names_the_line_that_called(pipe: FluxPipeline, options: dict):
    if "latents" in options:
        options = {"latents": torch.full((1, 6, 64), torch.nan)}
    with pytest.warns(UserWarning) as said:
        pipe(PROMPT, height=32, width=48, num_inference_steps=1, progress=False, **options)
    assert {warning.filename for warning in said} == {__file__}


def test_a_pipeline_of_numpys_sizes_is_saved(pipe: FluxPipeline, tmp_path: Path):
    parts = pipe.transformer, pipe.vae, pipe.text_encoder, pipe.schedule
    FluxPipeline(*parts, default_size=np.int64(32)).save_pretrained(tmp_path / "flux")
    assert FluxPipeline.from_pretrained(tmp_path / "flux").default_size == 32


def test_a_call_within_a_callback_is_a_call_of_its_own(pipe: FluxPipeline):
    steps = []

    def inner(pipe, step, timestep, tensors):
        steps.append("inner")
        pipe.interrupt = True

    def outer(pipe, step, timestep, tensors):
        steps.append("outer")
        draw(pipe, "another", num_inference_steps=3, callback_on_step_end=inner)

    draw(pipe, PROMPT, num_inference_steps=2, callback_on_step_end=outer)
    assert steps == ["outer", "inner", "outer", "inner"]


# the arguments of diffusers

NOT_TAKEN = {  # argument -> why
    "ip_adapter_image": "there is no IP-Adapter",
    "ip_adapter_image_embeds": "there is no IP-Adapter",
    "negative_ip_adapter_image": "there is no IP-Adapter",
    "negative_ip_adapter_image_embeds": "there is no IP-Adapter",
}
OWN = {"release_modulation", "progress"}
OTHER_DEFAULTS = {  # argument -> why
    "max_sequence_length": "None is the checkpoint's own, 512 of FLUX.1",
    "callback_on_step_end_tensor_inputs": "a tuple, which nobody can change",
}


def test_the_arguments_are_those_of_diffusers():
    theirs = inspect.signature(diffusers.FluxPipeline.__call__).parameters
    ours = inspect.signature(FluxPipeline.__call__).parameters
    assert theirs.keys() - ours.keys() == NOT_TAKEN.keys()
    assert ours.keys() - theirs.keys() == OWN
    taken = [name for name in theirs if name in ours]
    assert taken == [name for name in ours if name in theirs]  # the same order
    other = {name for name in taken if ours[name].default != theirs[name].default}
    assert other == OTHER_DEFAULTS.keys()
    documented = inspect.getdoc(FluxPipeline.__call__)
    assert all(f"\n    {name}: " in documented for name in ours if name != "self")
    assert "IP-Adapter" in documented


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_an_argument_that_is_not_taken_is_refused(pipe: FluxPipeline, name: str):
    with pytest.raises(TypeError, match=name):
        draw(pipe, PROMPT, **{name: None})


@pytest.mark.parametrize(
    "sigmas", [[1.0, 0.75, 0.5, 0.25], [0.9, 0.3], np.linspace(1, 0.2, 3), (1,)], ids=str
)
def test_sigmas_are_those_of_diffusers(both, sigmas):
    steps = []

    def count(pipe, step, timestep, tensors):
        steps.append(float(timestep))
        return tensors

    found, expected = draw_in_both(
        both,
        prompt=PROMPT,
        sigmas=sigmas,
        num_inference_steps=9,
        callback_on_step_end=count,
        output_type="latent",
        height=64,
    )
    assert steps[: len(sigmas)] == pytest.approx(steps[len(sigmas) :], rel=1e-6)
    assert len(steps) == 2 * len(sigmas)
    assert distance(found, expected) <= 1e-4


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_return_dict_false_gives_a_tuple_of_one(pipe: FluxPipeline, output_type: str):
    options = {"output_type": output_type, "num_inference_steps": 1, "progress": False}
    options |= {"height": 32, "width": 32}
    (found,) = pipe(PROMPT, generator=seeded(), return_dict=False, **options)
    expected = pipe(PROMPT, generator=seeded(), **options).images
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
