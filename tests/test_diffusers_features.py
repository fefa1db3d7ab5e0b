"""What a diffusers user does with a FLUX transformer, before and after fluxkern.accelerate."""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import diffusers_parallel
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from diffusers_models import distance, fused, inputs, run, tiny_transformer
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fluxkern
from fluxkern.integrations import _fused

ATTENTION = {f"{kind}transformer_blocks.{n}.attn" for kind in ("", "single_") for n in (0, 1)}
DOUBLE_ATTENTION = {name for name in ATTENTION if not name.startswith("single")}


@pytest.fixture(autouse=True)
def _clean():
    _fused.warn_once.cache_clear()
    yield
    _AttentionBackendRegistry.set_active_backend("native")
    torch._dynamo.reset()


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_transformer()


# every feature before and after


def lora(model: FluxTransformer2DModel, folder: Path, **changes: object) -> None:
    peft = pytest.importorskip("peft")
    names = ["to_q", "to_out.0", "add_k_proj", "linear", "net.0.proj", "net.2", "proj_out"]
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": names, "init_lora_weights": False}
    model.add_adapter(peft.LoraConfig(**{**settings, **changes}), "style")


def lora_fused(model: FluxTransformer2DModel, folder: Path) -> None:
    lora(model, folder)
    model.fuse_lora(0.5)


def sequential_offload(model: FluxTransformer2DModel, folder: Path) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, "cpu", offload_buffers=True)


def model_offload(model: FluxTransformer2DModel, folder: Path) -> None:
    pytest.importorskip("accelerate").cpu_offload_with_hook(model, "cpu")


def block_offload(model: FluxTransformer2DModel, folder: Path) -> None:
    pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, "block_level", 1, offload_to_disk_path=str(folder))


def leaf_offload(model: FluxTransformer2DModel, folder: Path) -> None:
    pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, "leaf_level", offload_to_disk_path=str(folder))


def layerwise_casting(model: FluxTransformer2DModel, folder: Path) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def fused_projections(model: FluxTransformer2DModel, folder: Path) -> None:
    model.fuse_qkv_projections()


def other_attention_backend(model: FluxTransformer2DModel, folder: Path) -> None:
    model.set_attention_backend("_native_math")


def native_attention_backend(model: FluxTransformer2DModel, folder: Path) -> None:
    model.set_attention_backend("native")


class OtherProcessor(FluxAttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def other_processor(model: FluxTransformer2DModel, folder: Path) -> None:
    model.set_attn_processor(OtherProcessor())


def same_processor(model: FluxTransformer2DModel, folder: Path) -> None:
    model.set_attn_processor(FluxAttnProcessor())


def compiled_in_place(model: FluxTransformer2DModel, folder: Path) -> None:
    model.compile(fullgraph=True, backend="aot_eager")


def compiled_blocks(model: FluxTransformer2DModel, folder: Path) -> None:
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


def cache(config: Callable) -> Callable:
    def enable(model: FluxTransformer2DModel, folder: Path) -> None:
        model.enable_cache(config())

    return enable


class Packed(nn.Module):
    """A quantised layer: what it holds is no weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.packed = (linear.weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> None:
        raise AssertionError("the weight of a quantised layer was read")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, make(child))
        else:
            replace_linears(child, make)


@torch.no_grad()
def packed(model: FluxTransformer2DModel, folder: Path) -> None:
    replace_linears(model, Packed)


def torchao_int8(model: FluxTransformer2DModel, folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def bitsandbytes_4bit(model: FluxTransformer2DModel, folder: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(*linear.weight.T.shape, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False)
        new.bias = linear.bias
        return new.to("cpu")  # packs

    replace_linears(model, make)


NOW = [1000.0]  # the step that a sampler is at
CACHES = {
    "first_block_cache": cache(lambda: FirstBlockCacheConfig(threshold=5.0)),
    "mag_cache": cache(
        lambda: MagCacheConfig(
            threshold=1.0, num_inference_steps=6, mag_ratios=FLUX_MAG_RATIOS, retention_ratio=0.1
        )
    ),
    "taylorseer": cache(
        lambda: TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
        )
    ),
    "pyramid_attention": cache(
        lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 870),
            current_timestep_callback=lambda: NOW[0],
        )
    ),
    "faster_cache": cache(
        lambda: FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 870),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 870),
            current_timestep_callback=lambda: NOW[0],
            attention_weight_callback=lambda _: 0.3,
            is_guidance_distilled=True,
        )
    ),
}


FEATURES = {  # the feature -> the sites that then run diffusers' code, in whole or in part
    lora: set(),
    lora_fused: set(),
    sequential_offload: ATTENTION,  # the norms of q and k have no weights before they are called
    model_offload: set(),
    block_offload: set(),
    leaf_offload: ATTENTION,
    layerwise_casting: set(),
    fused_projections: set(),
    other_attention_backend: ATTENTION,
    native_attention_backend: set(),
    other_processor: ATTENTION,
    same_processor: set(),
    compiled_in_place: set(),
    compiled_blocks: set(),
    packed: set(),
    torchao_int8: set(),
    bitsandbytes_4bit: set(),
    **{enable: set() for enable in CACHES.values()},
}
NAMES = {enable: name for name, enable in CACHES.items()}


def steps(model: FluxTransformer2DModel) -> list[torch.Tensor]:
    """Six calls as a sampler makes them."""
    torch.manual_seed(5)
    given = inputs(model)
    found = []
    with model.cache_context("cond"):
        for timestep in (0.9, 0.88, 0.86, 0.84, 0.5, 0.2):
            NOW[0] = 1000 * timestep
            given["timestep"] = torch.full((2,), timestep)
            given["hidden_states"] = given["hidden_states"] * 0.99
            found.append(run(model, given))
    return found


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(distance(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: NAMES.get(f) or f.__name__)
def test_feature_and_accelerate_in_either_order(
    model: FluxTransformer2DModel, feature: Callable, order: str, tmp_path: Path
):
    original = copy.deepcopy(model)
    feature(original, tmp_path / "original")
    expected = steps(original)
    if order == "before":
        fluxkern.accelerate(model)
        feature(model, tmp_path / "ours")
    else:
        feature(model, tmp_path / "ours")
        fluxkern.accelerate(model)
    assert agree(steps(model), expected)
    sites = fluxkern.explain(model)
    assert {site.name for site in sites if site.reason} == FEATURES[feature]
    fluxkern.restore(model)
    assert not fused(fluxkern.explain(model))
    assert not any(isinstance(m, _fused.Fused) for m in model.modules())
    if feature not in NAMES:  # a cache is elsewhere by now
        assert agree(steps(model), expected)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_has_an_effect_and_ends(model: FluxTransformer2DModel, name: str):
    fluxkern.accelerate(model, strict=True)
    plain = steps(model)
    CACHES[name](model, Path())
    assert not agree(steps(model), plain)
    model.disable_cache()
    assert agree(steps(model), plain)
    assert not any(site.reason for site in fluxkern.explain(model))


@pytest.mark.parametrize("name", ["compile", "compile_repeated_blocks", "torch.compile"])
def test_what_was_compiled_and_run_before_runs_on_ops_after(
    model: FluxTransformer2DModel, name: str
):
    graphs, called = [], model

    def backend(graph, _inputs):
        graphs.append(str(graph.code))
        return graph

    if name == "torch.compile":
        called = torch.compile(model, fullgraph=True, backend=backend)
    else:
        getattr(model, name)(fullgraph=True, backend=backend)
    expected = steps(called)
    assert not any("fluxkern" in code for code in graphs)
    fluxkern.accelerate(called, strict=True)
    graphs.clear()
    assert agree(steps(called), expected)
    assert any("fluxkern" in code for code in graphs)
    fluxkern.restore(called)
    assert agree(steps(called), expected)


PAIRED = (
    lora,
    model_offload,
    block_offload,
    layerwise_casting,
    CACHES["first_block_cache"],
)
PAIRS = [
    *permutations(PAIRED, 2),
    (lora, compiled_blocks),
    (compiled_blocks, lora),
    (torchao_int8, lora),
    (torchao_int8, block_offload),
]


def output_or_error(
    model: FluxTransformer2DModel, folder: Path, *acts: Callable
) -> list[torch.Tensor] | str:
    try:
        for n, act in enumerate(acts):
            act(model, folder / str(n))
        return steps(model)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return str(error)


@pytest.mark.parametrize("first, second", PAIRS, ids=lambda act: NAMES.get(act) or act.__name__)
def test_accelerate_between_two_features(
    model: FluxTransformer2DModel, first: Callable, second: Callable, tmp_path: Path
):
    """What two features give together, or the error that they end in, is the original's."""
    original = copy.deepcopy(model)
    expected = output_or_error(original, tmp_path / "original", first, second)
    found = output_or_error(
        model, tmp_path / "ours", first, lambda m, _: fluxkern.accelerate(m), second
    )
    if isinstance(expected, str):
        assert found == expected
    else:
        assert agree(found, expected)
        assert not any(site.reason for site in fluxkern.explain(model))


# LoRA


def test_lora_has_its_effect_and_leaves_no_bit_behind(model: FluxTransformer2DModel, tmp_path):
    fluxkern.accelerate(model, strict=True)
    plain = steps(model)
    lora(model, tmp_path)
    styled = steps(model)
    assert not agree(styled, plain)
    given = inputs(model)
    half = run(model, given | {"joint_attention_kwargs": {"scale": 0.5}})
    none = run(model, given | {"joint_attention_kwargs": {"scale": 0.0}})
    assert distance(half, run(model, given)) > 1e-3 < distance(half, none)
    model.disable_lora()
    assert all(map(torch.equal, steps(model), plain))
    model.enable_lora()
    assert all(map(torch.equal, steps(model), styled))
    model.fuse_lora()
    assert agree(steps(model), styled)
    model.unfuse_lora()
    assert agree(steps(model), styled)
    model.delete_adapters("style")
    model.unload_lora()
    assert agree(steps(model), plain)  # fusing rounds the weights, here and in diffusers
    assert not any(site.reason for site in fluxkern.explain(model))


def test_lora_unloads_to_the_same_bits(model: FluxTransformer2DModel, tmp_path):
    fluxkern.accelerate(model, strict=True)
    plain = steps(model)
    lora(model, tmp_path)
    assert not agree(steps(model), plain)
    model.unload_lora()
    assert all(map(torch.equal, steps(model), plain))


def test_lora_is_swapped_hot(model: FluxTransformer2DModel, tmp_path: Path):
    fluxkern.accelerate(model, strict=True)
    plain = steps(model)
    lora(model, tmp_path)
    first = steps(model)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.unload_lora()
    lora(model, tmp_path, init_lora_weights="gaussian")  # its second factor is zero
    assert agree(steps(model), plain)
    model.load_lora_adapter(
        tmp_path, adapter_name="style", hotswap=True, prefix=None, use_safetensors=True
    )
    assert agree(steps(model), first)


def test_a_lora_trains_as_with_the_original(model: FluxTransformer2DModel, tmp_path: Path):
    original = copy.deepcopy(model)
    fluxkern.accelerate(model, strict=True)
    given, losses = inputs(model), {}
    target = torch.randn(2, 16, 16)
    for net in (original, model):
        net.requires_grad_(False)
        lora(net, tmp_path)
        weights = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, 1e-2)
        losses[net] = []
        for _ in range(5):
            loss = F.mse_loss(net(**given, return_dict=False)[0], target)
            loss.backward()
            assert all(w.grad is not None and w.grad.any() for w in weights)
            optimizer.step()
            optimizer.zero_grad()
            losses[net].append(loss.item())
    assert losses[model] == pytest.approx(losses[original], rel=1e-4)
    assert losses[model][-1] < losses[model][0]


# calls that the ops cannot take


def reasons(model: nn.Module) -> dict[str, str]:
    return {site.name: site.reason for site in fluxkern.explain(model) if site.reason}


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_runs_diffusers_attention_behind_our_norm_and_rotation(
    model: FluxTransformer2DModel, kind: str, caplog: pytest.LogCaptureFixture
):
    mask = torch.rand(2, 1, 1, 21) > 0.3
    mask = mask if kind == "bool" else mask.float().log().clip(-1e4)
    given = inputs(model) | {"joint_attention_kwargs": {"attention_mask": mask}}
    expected = run(model, given)
    fluxkern.accelerate(model)
    with caplog.at_level(logging.WARNING, "fluxkern"):
        assert distance(run(model, given), expected) < 1e-5
        run(model, given)
    assert [r.message for r in caplog.records] == [
        "diffusers' own code runs where attention has a mask"
    ]
    assert reasons(model) == dict.fromkeys(ATTENTION, "in the last call attention has a mask")
    runs = {s.runs for s in fluxkern.explain(model) if s.kind == "attention"}
    assert runs == {"joint_qk_norm_rope", "qk_norm_rope"}
    run(model, inputs(model))
    assert reasons(model) == {}


def test_unknown_kwargs_run_the_original_attention(
    model: FluxTransformer2DModel, caplog: pytest.LogCaptureFixture
):
    given = inputs(model)
    expected = run(fluxkern.accelerate(model), given)
    with caplog.at_level(logging.WARNING, "fluxkern"):
        found = run(model, given | {"joint_attention_kwargs": {"colour": "red"}})
    assert distance(found, expected) < 1e-5
    ours = [r.message for r in caplog.records if r.name == "fluxkern"]
    assert len(ours) == 1 and "joint_attention_kwargs hold colour" in ours[0]
    assert reasons(model).keys() == ATTENTION


def test_strict_refuses_a_call_that_the_ops_cannot_take(model: FluxTransformer2DModel):
    fluxkern.accelerate(model, strict=True)
    given = inputs(model) | {"joint_attention_kwargs": {"colour": "red"}}
    with pytest.raises(NotImplementedError, match="joint_attention_kwargs hold colour"):
        run(model, given)
    run(model, inputs(model))


# IP-Adapter, ControlNet


def ip_adapter(model: FluxTransformer2DModel) -> dict:
    torch.manual_seed(7)
    processors = {
        name: FluxAttnProcessor()
        if name.startswith("single")
        else FluxIPAdapterAttnProcessor(32, 24, num_tokens=(4,), scale=0.7)
        for name in model.attn_processors
    }
    model.set_attn_processor(processors)
    return {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 4, 24)]}}


def test_ip_adapter_runs_in_its_own_processor_between_our_gates(model: FluxTransformer2DModel):
    plain = inputs(model)
    fluxkern.accelerate(model)
    without = run(model, plain)
    given = plain | ip_adapter(model)
    found = run(model, given)
    sites = {s.name: s.reason for s in fluxkern.explain(model) if s.runs == "original"}
    processor = "the attention processor is FluxIPAdapterAttnProcessor"
    expected_sites = dict.fromkeys(DOUBLE_ATTENTION, processor)
    single = "in the last call joint_attention_kwargs hold ip_hidden_states"
    assert sites == expected_sites | dict.fromkeys(ATTENTION - DOUBLE_ATTENTION, single)
    assert distance(found, run(fluxkern.restore(model), given)) < 1e-5 < distance(found, without)
    fluxkern.accelerate(model).set_attn_processor(FluxAttnProcessor())  # as unload_ip_adapter does
    assert torch.equal(run(model, plain), without) and not reasons(model)


@pytest.mark.parametrize("repeat", [True, False])
def test_controlnet_residuals_are_added_between_the_blocks(
    model: FluxTransformer2DModel, repeat: bool
):
    given = inputs(model)
    without = run(fluxkern.accelerate(model, strict=True), given)
    residuals = [torch.randn(2, 16, 32) for _ in range(2)]
    given |= {
        "controlnet_block_samples": residuals,
        "controlnet_single_block_samples": residuals[:1],
        "controlnet_blocks_repeat": repeat,
    }
    found = run(model, given)
    assert distance(found, run(fluxkern.restore(model), given)) < 1e-5 < distance(found, without)


def test_a_controlnet_is_accelerated_too(model: FluxTransformer2DModel):
    from diffusers import FluxControlNetModel

    net = FluxControlNetModel.from_transformer(
        model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    ).eval()
    for module in (*net.controlnet_blocks, *net.controlnet_single_blocks):
        nn.init.normal_(module.weight)
    given = inputs(model)
    given |= {"controlnet_cond": given["hidden_states"], "return_dict": False}
    with torch.no_grad():
        expected = net(**given)
        found = fluxkern.accelerate(net, strict=True)(**given)
    for ours, theirs in zip(sum(map(list, found), []), sum(map(list, expected), []), strict=True):
        assert distance(ours, theirs) < 1e-5
    assert len(fused(fluxkern.explain(net))) == len(fluxkern.explain(net)) == 11 + 4


# attention of others


class Interception(TorchFunctionMode):
    """What ParaAttention does: every scaled_dot_product_attention passes through here."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def test_a_package_that_intercepts_attention_sees_it(model: FluxTransformer2DModel):
    given = inputs(model)
    expected = run(fluxkern.accelerate(model), given)
    with Interception() as mode:
        found = run(model, given)
    assert mode.seen == 4 and distance(found, expected) < 1e-5
    assert reasons(model).keys() == ATTENTION
    with torch.device("cpu"):  # a mode too
        run(model, given)
    assert not reasons(model)


def test_a_package_that_replaces_torchs_attention_is_called(
    model: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch
):
    given, seen, attention = inputs(model), [], F.scaled_dot_product_attention
    expected = run(fluxkern.accelerate(model), given)

    def other(*args, **kwargs):
        seen.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    assert distance(run(model, given), expected) < 1e-5 and len(seen) == 4
    monkeypatch.undo()
    run(model, given)
    assert len(seen) == 4 and not reasons(model)


def test_an_attention_backend_for_the_whole_process_is_used(model: FluxTransformer2DModel):
    from diffusers.models.attention_dispatch import attention_backend

    given = inputs(model)
    expected = run(fluxkern.accelerate(model), given)
    with attention_backend("_native_math"):
        assert distance(run(model, given), expected) < 1e-5
        assert set(reasons(model).values()) == {"diffusers' attention backend _native_math is set"}
    run(model, given)
    assert not reasons(model)


# blocks of others


def test_a_forward_replaced_on_an_instance_is_left_alone(model: FluxTransformer2DModel):
    block = model.single_transformer_blocks[0]
    forward, seen = block.forward, []

    def traced(*args, **kwargs):
        seen.append(1)
        return forward(*args, **kwargs)

    block.forward = traced
    given = inputs(model)
    expected = run(model, given)
    assert distance(run(fluxkern.accelerate(model), given), expected) < 1e-5 and len(seen) == 2
    assert reasons(model) == {
        "single_transformer_blocks.0.gate": "the forward of a FluxSingleTransformerBlock "
        "was replaced on the instance"
    }
    fluxkern.restore(model)
    assert block.forward is traced


def test_a_new_forward_of_a_known_package_keeps_its_hook(model: FluxTransformer2DModel):
    """A hook that was there before, removed after: ours runs in between and is gone at the end."""
    FirstBlock = CACHES["first_block_cache"]
    plain = steps(model)
    FirstBlock(model, Path())
    fluxkern.accelerate(model, strict=True)
    model.disable_cache()
    assert agree(steps(model), plain)
    assert not any(site.reason for site in fluxkern.explain(model))
    fluxkern.restore(model)
    assert all(map(torch.equal, steps(model), plain))


def test_projections_of_another_function_are_called(model: FluxTransformer2DModel):
    """One processor may serve two models; only the accelerated one changes."""
    other = tiny_transformer()
    processor = FluxAttnProcessor()
    model.set_attn_processor(processor)
    other.set_attn_processor(processor)
    given = inputs(model)
    expected = run(other, given)
    fluxkern.accelerate(model, strict=True)
    assert torch.equal(run(other, given), expected)
    assert not fused(fluxkern.explain(other))


# two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(diffusers_parallel.main, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("split", diffusers_parallel.SPLITS)
def test_a_model_split_over_two_processes(two_processes: list[dict], split: str, order: str):
    assert all(found[f"{split}, {order}"] < 1e-5 for found in two_processes)


@pytest.mark.parametrize("split", ["ulysses", "ring"])
def test_gradients_of_a_split_sequence(two_processes: list[dict], split: str):
    assert all(found[f"gradients, {split}"] < 1e-5 for found in two_processes)


@pytest.mark.parametrize("order", ["before", "after"])
def test_fully_sharded(two_processes: list[dict], order: str):
    assert all(found[f"sharded, {order}"] < 1e-5 for found in two_processes)


def test_sharding_changes_classes_and_is_said(two_processes: list[dict]):
    for found in two_processes:
        assert "a module became a FSDPFluxTransformerBlock" in found["restored"]
        assert "FSDPFluxTransformerBlock, which is not known" in found["sharded first"]


def test_the_example_of_a_lora_fine_tune_has_the_originals_losses(tmp_path: Path):
    pytest.importorskip("peft")
    example = Path(__file__).parents[1] / "examples" / "train_lora.py"
    found = {}
    for extra in ((), ("--original",)):
        command = [sys.executable, str(example), "--steps", "12", "--output", str(tmp_path), *extra]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found[extra] = json.loads(done.stdout)["losses"]
    assert len(found[()]) == 12 and found[()] == pytest.approx(found[("--original",)], rel=1e-4)
    assert list(tmp_path.glob("*.safetensors"))
