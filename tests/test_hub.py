"""The kernel for the Hugging Face hub, as the `kernels` package loads it: layout, ops, layers."""

import ast
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import kernels
import pytest
import torch
import triton_interpreter
from diffusers.models import activations, normalization
from diffusers.models.transformers import transformer_flux
from diffusers_models import distance
from kernels._rust import Build, Digest, DigestAlgorithm
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.activations import GELUTanh

from fluxkern import ops
from fluxkern.cases import CASES, Maker, Sizes
from fluxkern.testing import copied, gradients, outputs
from hub import __main__ as hub

if not torch.cuda.is_available():
    triton_interpreter.install()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERAL = {"name": "fluxkern", "version": 0, "license": "Apache-2.0"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "kernel"
    hub.generate(target)
    return target


@pytest.fixture(scope="session")
def kernel(folder: Path) -> ModuleType:
    return kernels.get_local_kernel(folder)


# layout


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_build_is_what_its_metadata_says(folder: Path, backend: str):
    build = folder / "build" / f"torch-{backend}"
    metadata = kernels.Metadata.read_from_file(build / "metadata.json")
    assert metadata.id.startswith(f"_fluxkern_{backend}_") and metadata.id.isidentifier()
    assert str(metadata.name) == "fluxkern" and metadata.license == "Apache-2.0"
    assert metadata.python_depends == [] and metadata.kernel_depends == []
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))


def test_the_source_is_of_the_newest_edition_and_holds_what_is_built(
    folder: Path, capfd: pytest.CaptureFixture
):
    backends = [str(backend) for backend in Build.open(folder).general.backends]
    assert [name.rpartition(".")[2].lower() for name in backends] == ["cpu", "cuda"]
    assert capfd.readouterr().err == ""  # of an older edition it warns
    source = hub.files_of(folder / "torch-ext/fluxkern")
    for backend in ("cpu", "cuda"):
        built = hub.files_of(folder / f"build/torch-{backend}")
        assert source == {name: built[name] for name in source}
        assert set(built) - set(source) == {"_ops.py", "metadata.json"}


def test_two_commands_give_the_same_files(folder: Path, tmp_path: Path):
    hub.generate(tmp_path / "again")
    assert hub.files_of(tmp_path / "again") == hub.files_of(folder)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        hub.generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_python_is_of_3_10_and_imports_torch_triton_and_itself(folder: Path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    files = sorted((folder / "build/torch-cuda").rglob("*.py"))
    assert len(files) > 25
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(), feature_version=(3, 10))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed


# ops


def test_a_kernel_has_a_namespace_of_its_own(folder: Path, kernel: ModuleType, tmp_path: Path):
    source = tmp_path / "source"
    hub.copy(folder / "torch-ext/fluxkern", source)
    (source / "layers.py").write_text("# nothing\n")
    hub.write_variant(source, tmp_path / "torch-cpu", GENERAL, "cpu")
    other = kernels.get_local_kernel(tmp_path, backend="cpu")
    x, vec = torch.randn(1, 3, 8), torch.randn(1, 8)
    names = {kernel: kernel.__name__, other: other.__name__, ops: "fluxkern"}
    assert len(set(names.values())) == 3
    for module, name in names.items():
        code = make_fx(lambda *args, m=module: m.norm_modulate(*args))(x, vec, vec).code
        assert f"torch.ops.{name}.norm_modulate.default" in code


@pytest.mark.parametrize("op", CASES)
def test_an_op_and_its_gradients_are_those_of_fluxkern_to_the_bit(op: str, kernel: ModuleType):
    args = CASES[op].inputs(Maker(Sizes(), torch.float32))
    pair = [partial(getattr(module, op), backend="reference") for module in (kernel, ops)]
    found, expected = (outputs(function, copied(args)) for function in pair)
    if CASES[op].moved_backward:
        dout = tuple(torch.randn_like(t) for t in expected)
        found += gradients(pair[0], args, dout)
        expected += gradients(pair[1], args, dout)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


# layers

SIZE = {"dim": 32, "num_attention_heads": 2, "attention_head_dim": 16}
HEADS = {"query_dim": 32, "heads": 2, "dim_head": 16, "out_dim": 32, "added_kv_proj_dim": 32}
MADE = {  # layer -> the module whose place it takes, and what a call of it takes
    "AdaLayerNormZero": (lambda: normalization.AdaLayerNormZero(32), ["x", "emb"]),
    "AdaLayerNormZeroSingle": (lambda: normalization.AdaLayerNormZeroSingle(32), ["x", "emb"]),
    "AdaLayerNormContinuous": (
        lambda: normalization.AdaLayerNormContinuous(32, 32, elementwise_affine=False),
        ["x", "conditioning_embedding"],
    ),
    "FluxAttention": (
        lambda: transformer_flux.FluxAttention(**HEADS),
        ["hidden_states", "encoder_hidden_states", "image_rotary_emb"],
    ),
    "FluxTransformerBlock": (
        lambda: transformer_flux.FluxTransformerBlock(**SIZE),
        ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"],
    ),
    "FluxSingleTransformerBlock": (
        lambda: transformer_flux.FluxSingleTransformerBlock(**SIZE),
        ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"],
    ),
    "GELU": (lambda: activations.GELU(32, 64, approximate="tanh"), ["hidden_states"]),
    "GeluTanh": (GELUTanh, ["input"]),
}
every_layer = pytest.mark.parametrize("name", MADE)


def made(name: str) -> tuple[nn.Module, dict[str, Any]]:
    make, names = MADE[name]
    with torch.device(DEVICE):
        angle = torch.randn(12, 8).repeat_interleave(2, dim=1)
        values = {
            **dict.fromkeys(("x", "hidden_states", "input"), torch.randn(2, 7, 32)),
            **dict.fromkeys(("emb", "temb", "conditioning_embedding"), torch.randn(2, 32)),
            "encoder_hidden_states": torch.randn(2, 5, 32),
            "image_rotary_emb": (angle.cos(), angle.sin()),
        }
        return make(), {name: values[name] for name in names}


@pytest.fixture
def replace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, str], None]:
    """Puts a layer in the place of a module, ready for gradients and torch.compile, or raises."""

    def replace(module: nn.Module, name: str) -> None:
        cls = type(module)
        for attribute, value in (("kernel_layer_name", name), ("kernel_condition", None)):
            monkeypatch.setattr(cls, attribute, value, raising=False)
        layer = kernels.LocalLayerRepository(folder, layer_name=name)
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        with kernels.use_kernel_mapping({name: {DEVICE: layer}}, inherit_mapping=False):
            kernels.kernelize(module, mode=mode, device=DEVICE, use_fallback=False)

    return replace


def with_gradients(call: Callable, module: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    given = {
        n: v.clone().requires_grad_() if isinstance(v, Tensor) else v for n, v in given.items()
    }
    out = call(**given)
    outs = list(out) if isinstance(out, tuple) else [out]
    leaves = [v for v in given.values() if isinstance(v, Tensor)] + list(module.parameters())
    return outs + list(torch.autograd.grad([o.square().sum() for o in outs], leaves))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and distance(f, e) < 1e-5


def test_every_layer_is_tested_and_named_on_both_pages(kernel: ModuleType, folder: Path):
    layers = {n for n, v in vars(kernel.layers).items() if isinstance(v, type)} - {"Tensor"}
    assert layers == set(MADE)
    for page in (folder / "CARD.md", hub.ROOT / "docs/using-the-kernels.md"):
        assert not [name for name in MADE if f"`{name}`" not in page.read_text()]


@every_layer
def test_a_layer_has_the_gradients_of_its_class_also_compiled(
    name: str, kernel: ModuleType, replace: Callable
):
    layer = getattr(kernel.layers, name)
    assert layer.has_backward and layer.can_torch_compile
    module, given = made(name)
    expected = with_gradients(module, module, given)
    replace(module, name)
    assert module.forward.__func__ is layer.forward
    assert_same(with_gradients(module, module, given), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, module, given), expected)


@pytest.mark.parametrize("name", ["AdaLayerNormZero", "FluxAttention", "FluxTransformerBlock"])
def test_a_layer_runs_on_the_triton_kernels(name: str, kernel: ModuleType, replace: Callable):
    module, given = made(name)
    expected = with_gradients(module, module, given)
    replace(module, name)
    with kernel.ops.use_backend("triton"):
        assert_same(with_gradients(module, module, given), expected)


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda *_: None)
    return norm


def hooked_norm() -> nn.Module:
    return hooked(nn.LayerNorm(32, elementwise_affine=False))


def other_norm() -> nn.Module:
    """One that computes something else on the same parameters."""
    other = type("Other", (nn.LayerNorm,), {"forward": lambda self, x: x})
    return other(32, elementwise_affine=False)


@pytest.mark.parametrize(
    "name, change, given, named",
    [
        ("GELU", {"approximate": "none"}, {}, "approximate must be 'tanh', got 'none'"),
        ("AdaLayerNormZero", {"norm": nn.LayerNorm(32)}, {}, "the norm must be a LayerNorm"),
        (
            "AdaLayerNormZeroSingle",
            {},
            {"x": torch.ones(2, 7, 32, device=DEVICE).half()},
            "torch.float16",
        ),
        ("FluxTransformerBlock", {"norm2": nn.RMSNorm(32)}, {}, "LayerNorm without weights, got"),
        ("FluxTransformerBlock", {"norm2": other_norm()}, {}, "LayerNorm without weights, got"),
        ("FluxTransformerBlock", {"norm2_context": hooked_norm()}, {}, "a norm must have no hook"),
        ("AdaLayerNormContinuous", {"norm": hooked_norm()}, {}, "a norm must have no hook"),
        ("FluxAttention", {"norm_q": hooked(nn.RMSNorm(16, 1e-6))}, {}, "a norm must have no hook"),
        ("FluxAttention", {}, {"attention_mask": torch.ones(12, 12)}, "no mask"),
        ("FluxAttention", {}, {"ip_hidden_states": 1, "ip_adapter_masks": 2}, "ip_adapter_masks"),
        ("FluxAttention", {"processor": nn.Identity()}, {}, "FluxAttnProcessor, got Identity"),
        ("FluxAttention", {"norm_k": nn.RMSNorm(16, eps=0.1)}, {}, "RMSNorms with one eps"),
        ("FluxAttention", {}, {"image_rotary_emb": None}, "image_rotary_emb must be cos and sin"),
    ],
)
def test_what_a_layer_cannot_take_is_refused_by_name(
    name: str, change: dict, given: dict, named: str, replace: Callable
):
    module, usual = made(name)
    for attribute, value in change.items():
        setattr(module, attribute, value)
    replace(module, name)
    with pytest.raises(ValueError, match=re.escape(named)):
        module(**usual | given)


def test_attention_of_one_stream_and_of_fused_projections(replace: Callable):
    block, _ = made("FluxSingleTransformerBlock")
    joint, of_joint = made("FluxAttention")
    joint.fuse_projections()
    for attention, given in (
        (block.attn, {"hidden_states": torch.randn(2, 12, 32, device=DEVICE)}),
        (joint, of_joint),
    ):
        given = {"image_rotary_emb": of_joint["image_rotary_emb"], **given}
        expected = attention(**given)
        replace(attention, "FluxAttention")
        found = attention(**given)
        assert_same([*found], [*expected])
