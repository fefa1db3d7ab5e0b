"""The layers of our own models where something stands on them, and where autocast is on."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_transformer import TINY, distance, inputs, random_flux
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fluxkern import explain
from fluxkern.checkpoint import flux_to_diffusers
from fluxkern.model.int8 import to_int8
from fluxkern.model.transformer import Flux

LINEARS = [name for name, m in Flux(TINY).named_modules() if isinstance(m, nn.Linear)]
peft = pytest.importorskip("peft")


def reference(model: Flux) -> Flux:
    """The same model, with every layer called as PyTorch's own code would."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    return model


class Twice(nn.Module):
    """Stands on a weight; what it changes is not hidden by a rounding."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Packed(nn.Module):
    """A quantised layer of another package: what it holds is no weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.to(x.dtype) * self.scale, self.bias)


def forward_hook(model: Flux, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda _m, _x, y: 2 * y)


def pre_hook(model: Flux, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(lambda _m, x: (2 * x[0],))


def forward_of_the_instance(model: Flux, name: str) -> None:
    layer = model.get_submodule(name)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)


def parametrization(model: Flux, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Twice())


def weight_norm(model: Flux, name: str) -> None:
    layer = nn.utils.weight_norm(model.get_submodule(name))  # a hook computes the weight
    with torch.no_grad():
        layer.weight_g *= 2


def another_class(model: Flux, name: str) -> None:
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), nn.Tanh()))


def packed(model: Flux, name: str) -> None:
    with torch.no_grad():
        layer = Packed(model.get_submodule(name))
        layer.scale *= 2
    model.set_submodule(name, layer)


def dynamic_quantisation(model: Flux, name: str) -> None:
    layer = nn.Sequential(model.get_submodule(name))
    with torch.no_grad():
        layer[0].weight *= 8
    torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, inplace=True)
    model.set_submodule(name, layer[0])


def tensor_subclass(model: Flux, name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight *= 2
    quantization.quantize_(nn.Sequential(layer), quantization.Int8WeightOnlyConfig())


def adapter(model: Flux, name: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


STANDING = [
    forward_hook, pre_hook, forward_of_the_instance, parametrization, weight_norm, another_class,
    packed, dynamic_quantisation, tensor_subclass, adapter,
]  # fmt: skip


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("stand", STANDING, ids=lambda f: f.__name__)
def test_what_stands_on_a_layer_has_its_effect(stand: Callable, name: str):
    model = random_flux(TINY).requires_grad_(False)
    args = inputs(TINY)
    before = model(**args)
    stand(model, name)
    expected = copy.deepcopy(model) if stand is not weight_norm else model
    found = model(**args)
    (site,) = [site for site in explain(model) if site.name == name]
    assert site.runs == "called" and site.reason
    assert sum(site.runs == "called" for site in explain(model)) == 1
    with torch.no_grad():
        # a number at the border of two of 8 bits may fall on either side
        bound = 2e-3 if stand is dynamic_quantisation else 1e-5
        assert distance(found, before) > 5 * bound
        assert distance(model(**args), found) <= bound
        assert distance(reference(expected)(**args), found) <= bound


@pytest.mark.parametrize("name", ["img_mlp", "img_mlp.1", "adaLN_modulation", "adaLN_modulation.0"])
def test_a_hook_of_a_container_or_activation_runs(name: str):
    model, args = random_flux(TINY), inputs(TINY)
    seen = []
    owner = model.final_layer if name.startswith("ada") else model.double_blocks[1]
    with torch.no_grad():
        expected = model(**args)
        handle = owner.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        found = model(**args)
        handle.remove()
        model(**args)
    assert len(seen) == 1 and distance(found, expected) <= 1e-6


def test_a_hook_for_all_modules_runs_at_every_linear():
    model, args, seen = random_flux(TINY), inputs(TINY), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        with torch.no_grad():
            model(**args)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == len(LINEARS)


def test_a_replaced_forward_of_the_class_runs(monkeypatch: pytest.MonkeyPatch):
    model, args, seen, original = random_flux(TINY), inputs(TINY), [], nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        seen.append(1)
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    with torch.no_grad():
        model(**args)
    assert len(seen) == len(LINEARS)


@torch.no_grad()
def test_what_a_hook_keeps_is_not_written_over():
    model, args = random_flux(TINY), inputs(TINY)
    kept = []
    for name in ("double_blocks.0.img_mlp.2", "double_blocks.0.txt_attn.proj"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _m, x, y: kept.extend((t, t.clone()) for t in (*x, y)))
    model(**args)
    assert len(kept) == 4
    assert all(torch.equal(view, copied) for view, copied in kept)


def test_explain_names_an_op_for_every_plain_layer():
    sites = explain(random_flux(TINY))
    assert {site.name for site in sites} >= set(LINEARS)
    assert {site.runs for site in sites} == {"linear", "modulation"}
    assert all(site.backend and not site.reason for site in sites)
    sites = explain(to_int8(random_flux(TINY).requires_grad_(False)))
    assert {site.runs for site in sites} == {"linear", "linear_int8", "modulation"}
    assert "double_blocks.0-1.img_attn.qkv" in str(sites)


@pytest.mark.parametrize("name", ["single_blocks.0.linear2", "double_blocks.1.img_mlp.0"])
@torch.no_grad()
def test_a_hook_of_an_8_bit_layer_runs(name: str):
    model, args, seen = to_int8(random_flux(TINY).requires_grad_(False)), inputs(TINY), []
    expected = model(**args)
    model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    assert distance(model(**args), expected) <= 2e-2 and len(seen) == 1
    assert [site.name for site in explain(model) if site.runs == "called"] == [name]


# adapters


def adapted(**changes: object) -> Flux:
    model = random_flux(TINY)
    settings = {"r": 3, "target_modules": LINEARS, "init_lora_weights": False}
    return peft.inject_adapter_in_model(peft.LoraConfig(**settings | changes), model)


def test_every_weight_of_an_adapter_trains():
    model, args = adapted(), inputs(TINY)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 60 and all("lora_" in name for name in trained)
    loss = model(**args).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    slope = sum(p.grad.square().sum() for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p -= 1e-3 * loss / slope * p.grad  # a thousandth down, by the gradients
        fall = 1 - model(**args).square().mean() / loss
    assert fall.item() == pytest.approx(1e-3, rel=0.3)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_dropout": 0.5}])
@torch.no_grad()
def test_an_adapter_merged_into_the_weights_gives_the_same_velocity(changes: dict):
    model, args = adapted(**changes).eval(), inputs(TINY)
    found = model(**args)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    merged = model(**args)
    plain = random_flux(TINY)
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    plain.load_state_dict({k: v for k, v in state.items() if "lora_" not in k})
    assert distance(merged, found) <= 1e-5
    assert distance(plain(**args), found) <= 1e-5


def test_gradients_of_an_adapter_agree_with_those_of_diffusers():
    from test_transformer import run_theirs, theirs

    model, args = random_flux(TINY), inputs(TINY)
    other = theirs(model)
    names = {"linear2": "proj_out", "proj": "to_out.0"}
    for net, targets in ((model, names.keys()), (other, names.values())):
        regex = r".*blocks\.\d+\.(.*\.)?(" + "|".join(t.replace(".", r"\.") for t in targets) + ")"
        config = peft.LoraConfig(r=2, target_modules=regex, init_lora_weights=False)
        peft.inject_adapter_in_model(config, net)
    pairs = []
    for n in range(TINY.depth_single_blocks):
        ours = model.single_blocks[n].linear2
        pairs.append((ours, other.single_transformer_blocks[n].proj_out))
    for n in range(TINY.depth):
        ours = model.double_blocks[n].img_attn.proj
        pairs.append((ours, other.transformer_blocks[n].attn.to_out[0]))
        other.transformer_blocks[n].attn.to_add_out.requires_grad_(False)
        model.double_blocks[n].txt_attn.proj = model.double_blocks[n].txt_attn.proj.base_layer
    for ours, others in pairs:
        others.load_state_dict(ours.state_dict())
    model(**args).square().sum().backward()
    run_theirs(other, args).square().sum().backward()
    for ours, others in pairs:
        for (name, a), b in zip(ours.named_parameters(), others.parameters(), strict=True):
            if "lora_" in name:
                assert distance(a.grad, b.grad) <= 1e-4


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_an_adapted_model_compiles_without_a_break(gradients: bool, autocast: bool):
    torch._dynamo.reset()
    model, args = adapted().eval(), inputs(TINY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    on = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.set_grad_enabled(gradients), on:
        found, expected = compiled(**args), model(**args)
    assert found.requires_grad == gradients
    assert distance(found.detach(), expected.detach()) <= (2e-2 if autocast else 1e-5)


# offload and casting


def sequential_offload(model: Flux) -> None:
    pytest.importorskip("accelerate").cpu_offload(model, "cpu", offload_buffers=True)


def model_offload(model: Flux) -> None:
    pytest.importorskip("accelerate").cpu_offload_with_hook(model, "cpu")


def group_offload(kind: str) -> Callable:
    def offload(model: Flux, folder: str) -> None:
        from diffusers.hooks import apply_group_offloading

        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, cpu, cpu, kind, offload_to_disk_path=folder, **blocks)

    return offload


@pytest.mark.parametrize(
    "place",
    [sequential_offload, model_offload, "block_level", "leaf_level"],
    ids=lambda place: getattr(place, "__name__", place),
)
@torch.no_grad()
def test_offloaded_weights_are_there_where_they_are_used(place: Callable | str, tmp_path):
    model, args = random_flux(TINY), inputs(TINY)
    expected = model(**args)
    if isinstance(place, str):
        group_offload(place)(model, str(tmp_path))
    else:
        place(model)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    for _ in range(2):
        assert distance(model(**args), expected) <= 1e-6


@pytest.mark.parametrize("pattern", ["auto", None], ids=["by layer", "the whole model"])
@torch.no_grad()
def test_weights_stored_in_8_bits_are_cast_where_they_are_used(pattern: str | None):
    from diffusers.hooks import apply_layerwise_casting

    model, args = random_flux(TINY), inputs(TINY)
    rounded = copy.deepcopy(model)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=pattern)
    for name, p in rounded.named_parameters():
        p.copy_(p.to(model.get_parameter(name).dtype).float())
    assert model.img_in.weight.dtype == torch.float8_e4m3fn and model.dtype == torch.float32
    assert distance(model(**args), rounded(**args)) <= 1e-6


# precisions


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_autocast_is_as_accurate_as_a_model_in_its_dtype(gradients: bool, int8: bool):
    model, args = random_flux(TINY).requires_grad_(not int8), inputs(TINY, batch=3)
    args["timesteps"], args["guidance"] = torch.tensor([1.0, 0.5, 0.25]), torch.ones(3)
    half = copy.deepcopy(model).bfloat16().requires_grad_(False)
    if int8:
        model, half = to_int8(model), to_int8(half)
    with torch.set_grad_enabled(gradients):
        truth = model(**args).detach()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**args)
        if gradients and not int8:
            found.float().square().sum().backward()
            assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        other = half(**{k: v if k.endswith("ids") else v.bfloat16() for k, v in args.items()})
    assert found.dtype == torch.bfloat16
    assert distance(found.detach(), truth) <= 2 * distance(other, truth)


@pytest.mark.parametrize("kind", ["double", "single", "all"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("sign", [1, -1])
def test_fp16_streams_stay_finite_as_in_diffusers(kind: str, gradients: bool, sign: int):
    from test_transformer import run_theirs, theirs

    model = random_flux(TINY).requires_grad_(False)
    for block in model.double_blocks[:1] if kind != "single" else []:
        block.txt_mod.lin.bias += 1
        block.txt_mlp[2].bias += sign * 60000
    for block in model.single_blocks[:1] if kind != "double" else []:
        block.modulation.lin.bias += 1
        block.linear2.bias += sign * 60000
    args = {k: v if k.endswith("ids") else v.half() for k, v in inputs(TINY).items()}
    args["timesteps"] = torch.full((2,), 0.5).half()
    other = theirs(model).half()
    model = model.half().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        found = model(**args)
    expected = run_theirs(other, args).detach()
    assert expected.isfinite().all() and found.isfinite().all()
    assert distance(found.detach(), expected) <= 0.02
    assert set(flux_to_diffusers(model.state_dict())) == set(other.state_dict())
