"""LoRA files of every layout, laid out here from their description or written by peft."""

import copy
import json
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline as DiffusersPipeline
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from test_transformer import TINY, distance, inputs, random_flux, run_theirs, theirs
from tiny_flux import write_tiny_flux
from torch import Tensor, nn

import fluxkern
from fluxkern.checkpoint import read_lora, save_flux, weights_hash
from fluxkern.checkpoint.lora import targets
from fluxkern.cli import main
from fluxkern.model.adapters import Adapters
from fluxkern.model.int8 import Int8Linear, to_int8
from fluxkern.model.transformer import CONFIGS, Flux
from fluxkern.pipeline import FluxPipeline

peft = pytest.importorskip("peft")
RANK, H = 4, TINY.hidden_size
Tensors = dict[str, Tensor]
SINGLE = "single_transformer_blocks"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Random changes are as large as the random weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* times its norm")
        yield


@pytest.fixture
def model() -> Flux:
    return random_flux(TINY).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.safetensors"


def factors(rows: int, columns: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Down and up, whose product is about half as large as a random weight."""
    return torch.randn(rank, columns) * columns**-0.5, torch.randn(rows, rank) * 0.25


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def change(model: nn.Module, name: str, delta: Tensor, parameter: str = "weight") -> None:
    """W + delta, in fp64."""
    weight = getattr(model.get_submodule(name), parameter)
    weight.data = (weight.data.double() + delta).to(weight.dtype)


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (up.double() @ down.double())


def write(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata)
    return file


def load(model: nn.Module, file: Path, strength: float = 1.0, **options: bool) -> Adapters:
    adapters = Adapters({"transformer": model})
    lora = read_lora(file, adapters.parts, **options)
    adapters.set({"a": lora.updates}, {"a": strength})
    return adapters


def outputs(model: nn.Module, args: dict) -> Tensor:
    with torch.no_grad():
        return model(**args) if isinstance(model, Flux) else run_theirs(model, args)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


# layouts: each fills `tensors` and changes the model that has those names


def _dotted(prefix: str, a: str, b: str, alpha: float | None) -> Callable[[nn.Module], Tensors]:
    def lay_out(model: nn.Module) -> Tensors:
        tensors = {}
        for name, layer in linears(model).items():
            down, up = factors(layer.out_features, layer.in_features)
            tensors |= {f"{prefix}{name}.{a}.weight": down, f"{prefix}{name}.{b}.weight": up}
            if alpha is not None:
                tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
            change(model, name, product(down, up, 1 if alpha is None else alpha / RANK))
        return tensors

    return lay_out


def _underscored(prefix: str, alpha: float) -> Callable[[nn.Module], Tensors]:
    dotted = _dotted("", "lora_down", "lora_up", alpha)

    def lay_out(model: nn.Module) -> Tensors:
        found = {}
        for key, tensor in dotted(model).items():
            ending = ".alpha" if key.endswith(".alpha") else "." + ".".join(key.split(".")[-2:])
            found[prefix + key.removesuffix(ending).replace(".", "_") + ending] = tensor
        return found

    return lay_out


def split_qkv(model: nn.Module) -> Tensors:
    """kohya's stack: A above each other, B in blocks, alpha as it was."""
    tensors = {}
    for name, rows in (
        ("double_blocks.0.img_attn.qkv", (H, H, H)),
        ("single_blocks.1.linear1", (H, H, H, 4 * H)),
    ):
        parts = [factors(n, H) for n in rows]
        down, up = torch.cat([d for d, _ in parts]), torch.block_diag(*[u for _, u in parts])
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
        deltas = [product(*part, 2.0 / (RANK * len(rows))) for part in parts]
        change(model, name, torch.cat(deltas))
    return tensors


def xlabs(model: nn.Module) -> Tensors:
    tensors = {}

    def add(theirs: str, ours: str, rows: int, columns: int, total: int) -> None:
        down, up = factors(rows, columns)
        tensors.update({f"{theirs}.down.weight": down, f"{theirs}.up.weight": up})
        delta = torch.zeros(total, columns, dtype=torch.float64)
        delta[:rows] = product(down, up)
        change(model, ours, delta)

    for n in range(TINY.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            stem, ours = f"double_blocks.{n}.processor", f"double_blocks.{n}.{stream}_attn"
            add(f"{stem}.qkv_lora{number}", f"{ours}.qkv", 3 * H, H, 3 * H)
            add(f"{stem}.proj_lora{number}", f"{ours}.proj", H, H, H)
    for n in range(TINY.depth_single_blocks):
        stem, ours = f"single_blocks.{n}.processor", f"single_blocks.{n}"
        add(f"{stem}.qkv_lora", f"{ours}.linear1", 3 * H, H, 7 * H)
        add(f"{stem}.proj_lora", f"{ours}.linear2", H, 5 * H, H)
    return tensors


def bfl(model: nn.Module) -> Tensors:
    """Biases of the up-projections and new weights of norms, as the control LoRAs have them."""
    tensors = _dotted("", "lora_A", "lora_B", None)(model)
    for name, layer in linears(model).items():
        if layer.bias is not None:
            tensors[f"{name}.lora_B.bias"] = bias = torch.randn(layer.out_features)
            change(model, name, bias, "bias")
    for name, module in model.named_modules():
        if name.endswith(("query_norm", "key_norm")):
            tensors[f"{name}.scale"] = torch.rand(TINY.head_dim) + 0.5
            module.scale.data = tensors[f"{name}.scale"].clone()
    return tensors


def onetrainer(model: nn.Module) -> Tensors:
    tensors = _dotted("transformer.", "lora_down", "lora_up", 1.0)(model)
    return tensors | {"bundle_emb.cat.clip_l": torch.randn(3, 8)}


def kohya_of_alpha_0(model: nn.Module) -> Tensors:
    """Which counts as alpha = rank."""
    tensors = _underscored("lora_unet_", float(RANK))(model)
    for key in tensors:
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(0.0)
    return tensors


BFL_LAYOUTS = {
    "kohya": _underscored("lora_unet_", 2.0),
    "kohya of alpha 0": kohya_of_alpha_0,
    "kohya split_qkv": split_qkv,
    "comfy": _dotted("diffusion_model.", "lora_down", "lora_up", 2.0),
    "comfy whole": _dotted("model.diffusion_model.", "lora_down", "lora_up", None),
    "xlabs": xlabs,
    "fal": _dotted("base_model.model.", "lora_A", "lora_B", None),
    "ai-toolkit": _dotted("diffusion_model.", "lora_A", "lora_B", None),
    "bfl": bfl,
}
DIFFUSERS_LAYOUTS = {
    "diffusers": _dotted("transformer.", "lora_A", "lora_B", None),
    "diffusers with alpha": _dotted("transformer.", "lora_A", "lora_B", 8.0),
    "peft's own": _dotted("base_model.model.", "lora_A.default", "lora_B.default", None),
    "bare": _dotted("", "lora_A", "lora_B", None),
    "old diffusers": _dotted("transformer.", "lora.down", "lora.up", None),
    "onetrainer before": _underscored("lora_transformer_", 2.0),
    "onetrainer": onetrainer,
    "simpletuner": _underscored("lycoris_", 2.0),
}


@pytest.mark.parametrize("layout", BFL_LAYOUTS)
def test_a_file_of_bfl_names_adds_its_products(model: Flux, file: Path, layout: str) -> None:
    expected, args = copy.deepcopy(model), inputs(TINY)
    write(file, BFL_LAYOUTS[layout](expected))
    base = outputs(model, args)
    load(model, file)
    assert distance(outputs(model, args), outputs(expected, args)) < 1e-5
    assert distance(outputs(model, args), base) > 1e-2


@pytest.mark.parametrize("layout", DIFFUSERS_LAYOUTS)
def test_a_file_of_diffusers_names_adds_its_products(model: Flux, file: Path, layout: str) -> None:
    expected, args = theirs(model), inputs(TINY)
    write(file, DIFFUSERS_LAYOUTS[layout](expected))
    load(model, file)
    assert distance(outputs(model, args), outputs(expected, args)) < 1e-5


# kinds: what one module's tensors are, and the new weight by hand in fp64


def _lora(w: Tensor) -> tuple[Tensors, Tensor]:
    down, up = factors(*w.shape)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    return tensors, w + product(down, up, 2 / RANK)


def _dora(axis: int) -> Callable[[Tensor], tuple[Tensors, Tensor]]:
    def lay_out(w: Tensor) -> tuple[Tensors, Tensor]:
        tensors, v = _lora(w)
        magnitude = torch.rand(len(w), 1) + 0.5 if axis else torch.rand(1, w.shape[1]) + 0.5
        return tensors | {"dora_scale": magnitude}, v / v.norm(dim=axis, keepdim=True) * magnitude

    return lay_out


def _loha(w: Tensor) -> tuple[Tensors, Tensor]:
    (b1, a1), (b2, a2) = factors(*w.shape), factors(*w.shape)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    delta = 0.5 * product(b1, a1) * product(b2, a2)
    return tensors | {"alpha": torch.tensor(2.0)}, w + delta


def _lokr(first: bool, second: bool) -> Callable[[Tensor], tuple[Tensors, Tensor]]:
    """Which of the factors is a product of two; alpha counts where one is."""

    def lay_out(w: Tensor) -> tuple[Tensors, Tensor]:
        tensors: Tensors = {"alpha": torch.tensor(2.0 if first or second else 1e10)}
        whole = []
        sizes = ((4, 2), (len(w) // 4, w.shape[1] // 2))
        for n, (size, cut) in enumerate(zip(sizes, (first, second), strict=True), 1):
            down, up = factors(*size, rank=2 * n)
            if cut:
                tensors |= {f"lokr_w{n}_a": up, f"lokr_w{n}_b": down}
            else:
                tensors[f"lokr_w{n}"] = (up @ down).clone()
            whole.append((up @ down).double() if not cut else product(down, up))
        rank = 4 if second else 2
        scale = 2.0 / rank if first or second else 1.0
        return tensors, w + scale * torch.kron(*whole)

    return lay_out


def _glora(lycoris: bool) -> Callable[[Tensor], tuple[Tensors, Tensor]]:
    def lay_out(w: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = w.shape
        (a2, a1), (b2, b1) = factors(columns, columns), factors(rows, columns)
        delta = 0.5 * (product(b2, b1) + w @ product(a2, a1))
        if lycoris:  # which has the first layer of each pair first
            a1, a2, b1, b2 = a2, a1, b2, b1
        tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
        return tensors | {"alpha": torch.tensor(2.0)}, w + delta

    return lay_out


def _full(w: Tensor) -> tuple[Tensors, Tensor]:
    diff = torch.randn(w.shape) * 0.1
    return {"diff": diff}, w + diff


KINDS = {
    "LoRA": _lora,
    "DoRA by row": _dora(1),
    "DoRA by column": _dora(0),
    "LoHa": _loha,
    "LoKr of whole factors": _lokr(False, False),
    "LoKr of a product first": _lokr(True, False),
    "LoKr of a product second": _lokr(False, True),
    "LoKr of products": _lokr(True, True),
    "GLoRA": _glora(False),
    "GLoRA of LyCORIS": _glora(True),
    "full": _full,
}
PLACES = {  # a layer of each layout that has its rows elsewhere in the other
    "fused q, k, v": ("lora_unet_", "double_blocks.0.txt_attn.qkv"),
    "linear1": ("diffusion_model.", "single_blocks.1.linear1"),
    "linear2": ("lora_unet_", "single_blocks.0.linear2"),
    "last modulation": ("diffusion_model.", "final_layer.adaLN_modulation.1"),
    "k of diffusers": ("transformer.", "transformer_blocks.1.attn.add_k_proj"),
    "MLP of diffusers": ("lycoris_", f"{SINGLE}.0.proj_mlp"),
    "last modulation of diffusers": ("transformer.", "norm_out.linear"),
}


def one_module(model: Flux, place: str, kind: str) -> tuple[Tensors, nn.Module]:
    prefix, name = PLACES[place]
    expected = copy.deepcopy(model) if name in linears(model) else theirs(model)
    weight = expected.get_submodule(name).weight
    parts, new = KINDS[kind](weight.data.double())
    weight.data = new.float()
    stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    return {f"{stem}.{key}": tensor for key, tensor in parts.items()}, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_kind_gives_the_weight_of_its_formula(
    model: Flux, file: Path, place: str, kind: str
) -> None:
    tensors, expected = one_module(model, place, kind)
    write(file, tensors)
    load(model, file)
    args = inputs(TINY)
    assert distance(outputs(model, args), outputs(expected, args)) < 1e-5


def test_differences_of_biases_and_norms_are_added(model: Flux, file: Path) -> None:
    expected, args = copy.deepcopy(model), inputs(TINY)
    bias, norm = torch.randn(3 * H), torch.randn(TINY.head_dim)
    change(expected, "double_blocks.0.img_attn.qkv", bias, "bias")
    change(expected, "double_blocks.0.img_attn.norm.key_norm", norm, "scale")
    write(
        file,
        {
            "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": bias,
            "diffusion_model.double_blocks.0.img_attn.norm.key_norm.diff": norm,
        },
    )
    load(model, file)
    assert distance(outputs(model, args), outputs(expected, args)) < 1e-5


# files that peft writes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 2},
        {"lora_alpha": 2, "use_rslora": True},
        {"lora_alpha": 2, "use_dora": True},
        {"lora_alpha": 2, "lora_bias": True},
        {
            "rank_pattern": {"transformer_blocks.0.attn.to_q": 3},
            "alpha_pattern": {"transformer_blocks.0.attn.to_q": 7},
        },
    ],
    ids=str,
)
def test_what_peft_and_diffusers_write_gives_what_they_compute(
    model: Flux, tmp_path: Path, options: dict
) -> None:
    other, args = theirs(model), inputs(TINY)
    targets = [name for name in linears(other) if "blocks." in name or "norm_out" in name]
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": targets} | options
    other.add_adapter(peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    other.save_lora_adapter(tmp_path)
    load(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert distance(outputs(model, args), outputs(other, args)) < 1e-5


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("more", [{}, {"decompose_both": True}, {"alpha": 2}], ids=str)
def test_what_peft_writes_of_its_other_kinds_gives_what_it_computes(
    model: Flux, tmp_path: Path, kind: str, more: dict
) -> None:
    if kind == "LoHaConfig":
        more = {key: value for key, value in more.items() if key != "decompose_both"}
    other, args = theirs(model), inputs(TINY)
    targets = [name for name in linears(other) if "blocks." in name]
    config = getattr(peft, kind)(r=RANK, target_modules=targets, **{"alpha": RANK} | more)
    wrapped = peft.get_peft_model(other, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "hada" in name or "lokr" in name:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path)
    load(model, tmp_path / "adapter_model.safetensors")
    assert distance(outputs(model, args), outputs(other, args)) < 1e-5


# strengths


def test_strength_counts_and_two_loras_add(model: Flux, tmp_path: Path) -> None:
    name, args = "single_blocks.0.linear1", inputs(TINY)
    expected, files = copy.deepcopy(model), []
    for n, strength in enumerate((0.5, -2.0)):
        down, up = factors(7 * H, H)
        change(expected, name, product(down, up, strength))
        tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        files.append(write(tmp_path / f"{n}.safetensors", tensors))
    adapters = Adapters({"transformer": model})
    updates = {file.name: read_lora(file, adapters.parts).updates for file in files}
    adapters.set(updates, {"0.safetensors": 0.5, "1.safetensors": -2.0})
    assert distance(outputs(model, args), outputs(expected, args)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA by row", "GLoRA"])
def test_a_hundred_changes_leave_the_bits_of_the_base(
    model: Flux, file: Path, kind: str, dtype: torch.dtype
) -> None:
    tensors, _ = one_module(model, "linear1", kind)
    model.single_blocks[1].linear1.weight.data[0, :2] = torch.tensor([-0.0, 0.0])
    model.to(dtype)
    before = bits_of(model)
    adapters = load(model, write(file, tensors), 0.0)
    assert bits_of(model) == before
    for n in range(100):
        adapters.set(adapters.updates, {"a": 0.1 * n + 0.1})
    assert bits_of(model) != before
    adapters.set(adapters.updates, {"a": 0.0})
    assert bits_of(model) == before
    adapters.set(adapters.updates, {"a": 1.0})
    adapters.set({}, {})
    assert bits_of(model) == before


def bits_of(model: nn.Module) -> dict[str, bytes]:
    return {n: t.view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()}


# int8


def relative_error(found: nn.Module, base: nn.Module, name: str, delta: Tensor) -> float:
    """Of the change of a layer's output that a delta makes, on inputs of any direction."""
    x = torch.randn(64, delta.shape[1])
    layers = found.get_submodule(name), base.get_submodule(name)
    changed, before = (layer(x).double() for layer in layers)
    return distance(changed - before, x.double() @ delta.double().T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["fused q, k, v", "linear1", "linear2"])
def test_a_small_delta_survives_on_int8(model: Flux, file: Path, place: str, kind: str) -> None:
    """Half a per cent of the weight's norm, which merged into the grid would be lost."""
    name = PLACES[place][1]
    base = to_int8(copy.deepcopy(model))
    weight = base.get_submodule(name).weight.dequantised(torch.float64)
    model.get_submodule(name).weight.data = weight.float()
    tensors, expected = one_module(model, place, kind)
    delta = expected.get_submodule(name).weight.detach().double() - weight
    strength = 0.005 * float(weight.norm() / delta.norm())
    if kind.startswith("DoRA"):  # which is not linear in its strength
        tensors, delta = small_dora(tensors, weight)
        strength = 1.0
    found = copy.deepcopy(base)
    load(found, write(file, tensors), strength)
    assert relative_error(found, base, name, strength * delta) < 0.1


def small_dora(tensors: Tensors, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Magnitudes and products close to what the weight has."""
    up = next(key for key in tensors if key.endswith("lora_up.weight"))
    down = next(key for key in tensors if key.endswith("lora_down.weight"))
    magnitude = next(key for key in tensors if key.endswith("dora_scale"))
    axis = 1 if tensors[magnitude].shape[1] == 1 else 0
    scaled = tensors | {up: 0.01 * tensors[up]}
    scaled[magnitude] = weight.norm(dim=axis, keepdim=True).float() * 1.002
    v = weight + product(scaled[down], scaled[up], 2 / RANK)
    new = v / v.norm(dim=axis, keepdim=True) * scaled[magnitude]
    return scaled, new - weight


@pytest.mark.parametrize("layout", ["kohya", "bfl", "xlabs"])
def test_a_whole_model_in_int8_has_its_lora_beside_it(model: Flux, file: Path, layout: str) -> None:
    expected, args = to_int8(copy.deepcopy(model)), inputs(TINY)
    for name, layer in linears_of_int8(expected).items():
        model.get_submodule(name).weight.data = layer.weight.dequantised(torch.float32)
    write(file, BFL_LAYOUTS[layout](model))  # W + delta, in fp32
    base = outputs(expected, args)
    before = {n: t.numpy().tobytes() for n, t in expected.state_dict().items()}
    adapters = load(expected, file)
    wanted = outputs(model, args)
    assert distance(outputs(expected, args), wanted) < 0.05
    assert distance(base, wanted) > 0.2
    adapters.set({}, {})
    assert {n: t.numpy().tobytes() for n, t in expected.state_dict().items()} == before
    assert torch.equal(outputs(expected, args), base)


def linears_of_int8(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear)}


def test_an_int8_layer_that_is_called_adds_its_lora_too(model: Flux, file: Path) -> None:
    args = inputs(TINY)
    to_int8(model)
    load(model, write(file, BFL_LAYOUTS["comfy"](copy.deepcopy(random_flux(TINY)))))
    by_op = outputs(model, args)
    for layer in linears_of_int8(model).values():
        layer.register_forward_hook(lambda *_: None)
    assert distance(outputs(model, args), by_op) < 0.02


# keys and damage


def kohya(model: Flux) -> Tensors:
    return BFL_LAYOUTS["kohya"](copy.deepcopy(model))


def refused(model: Flux, file: Path, tensors: Tensors, *words: str, **options: bool) -> None:
    before = bits(model)
    with pytest.raises(ValueError) as error:
        load(model, write(file, tensors), **options)
    assert all(word in str(error.value) for word in (str(file), *words)), error.value
    assert bits(model) == before


def test_a_key_that_fits_nothing_is_named(model: Flux, file: Path) -> None:
    extra = {"lora_unet_double_blocks_7_img_mlp_0.lora_up.weight": torch.randn(4 * H, RANK)}
    refused(model, file, kohya(model) | extra, *extra)
    lora = read_lora(file, {"transformer": model}, allow_unused=True)
    assert lora.unused == tuple(extra)
    assert len(lora.keys) == len(kohya(model))


def test_keys_of_embeddings_are_listed_as_ignored(model: Flux, file: Path) -> None:
    write(file, onetrainer(theirs(model)))
    lora = read_lora(file, {"transformer": model})
    assert lora.ignored == ("bundle_emb.cat.clip_l",)


STEM = "lora_unet_double_blocks_0_img_attn_qkv"
FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "half a pair": (lambda t: {k: v for k, v in t.items() if k != f"{STEM}.lora_up.weight"}, "up"),
    "a NaN": (lambda t: t | {f"{STEM}.lora_up.weight": torch.full((3 * H, RANK), torch.nan)}, STEM),
    "an infinite alpha": (lambda t: t | {f"{STEM}.alpha": torch.tensor(torch.inf)}, STEM),
    "two ranks": (lambda t: t | {f"{STEM}.lora_up.weight": torch.ones(3 * H, RANK + 1)}, STEM),
    "rows of q alone": (lambda t: t | {f"{STEM}.lora_up.weight": torch.ones(H, RANK)}, f"{3 * H}"),
    "no rank": (lambda t: t | {f"{STEM}.lora_down.weight": torch.ones(0, H)}, STEM),
    "integers": (
        lambda t: t | {f"{STEM}.lora_up.weight": torch.ones(3 * H, RANK, dtype=torch.int32)},
        STEM,
    ),
    "Tucker": (lambda t: t | {f"{STEM}.lora_mid.weight": torch.ones(4, 4)}, "lora_mid"),
    "OFT": (lambda t: t | {f"{STEM}.oft_blocks": torch.ones(4, 4)}, "oft_blocks"),
    "two kinds": (lambda t: t | {f"{STEM}.diff": torch.ones(3 * H, H)}, STEM),
    "two magnitudes": (
        lambda t: (
            t
            | {f"{STEM}.dora_scale": torch.ones(3 * H, 1)}
            | {f"{STEM}.lora_magnitude_vector": torch.ones(3 * H)}
        ),
        STEM,
    ),
    "twice the same": (
        lambda t: t | {"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(RANK, H)},
        STEM,
    ),
    "a control LoRA": (
        lambda t: (
            t
            | {
                "lora_unet_img_in.lora_down.weight": torch.ones(RANK, 2 * TINY.in_channels),
            }
        ),
        "control LoRA",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_applied(model: Flux, file: Path, fault: str) -> None:
    spoil, word = FAULTS[fault]
    refused(model, file, spoil(kohya(model)), word)


def test_a_merge_that_overflows_takes_all_of_it_back(model: Flux, file: Path) -> None:
    tensors = {k: v for k, v in kohya(model).items() if not k.startswith("lora_unet_txt_in")}
    tensors["lora_unet_txt_in.diff"] = torch.full((H, TINY.context_in_dim), 1e6)
    before = bits_of(model.half())
    with pytest.raises(ValueError, match="txt_in.weight must be finite"):
        load(model, write(file, tensors))
    assert bits_of(model) == before


def test_a_pickle_is_not_read(model: Flux, tmp_path: Path) -> None:
    torch.save(kohya(model), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="pickle"):
        load(model, tmp_path / "a.safetensors")


def test_damaged_files_give_errors_and_change_nothing(model: Flux, file: Path, seed: int) -> None:
    rng, before = random.Random(seed), bits(model)
    whole = write(file, kohya(model), {"lora_adapter_metadata": '{"lora_alpha": 3}'}).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 30))):
            data[rng.randrange(rng.choice((8, header)))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        adapters = Adapters({"transformer": model})
        try:
            lora = read_lora(file, adapters.parts)
            adapters.set({"a": lora.updates}, {"a": 1.0})
        except ValueError as error:
            assert str(file) in str(error) or "must be finite" in str(error)
        else:
            adapters.set({}, {})
        assert bits(model) == before


def on_meta() -> Flux:
    with torch.device("meta"):
        return Flux(CONFIGS["dev"])


def test_every_name_of_a_full_size_file_resolves() -> None:
    doubles = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    singles = ("linear1", "linear2", "modulation_lin")
    kohya = [
        *(f"double_blocks_{n}_{s}_{m}" for n in range(19) for s in ("img", "txt") for m in doubles),
        *(f"single_blocks_{n}_{m}" for n in range(38) for m in singles),
        *("img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1"),
        *(f"{p}_in_{e}_layer" for p in ("time", "vector", "guidance") for e in ("in", "out")),
    ]
    parts = [f"{p}_lora{s}" for p in ("qkv", "proj") for s in (1, 2)]
    xlabs = [
        *(f"double_blocks.{n}.processor.{part}" for n in range(19) for part in parts),
        *(f"single_blocks.{n}.processor.{p}_lora" for n in range(38) for p in ("qkv", "proj")),
    ]
    with torch.device("meta"):
        diffusers = list(linears(FluxTransformer2DModel(guidance_embeds=True)))
    found = targets("transformer", on_meta())
    underscored = [name.replace(".", "_") for name in diffusers]
    assert [n for n in (*kohya, *xlabs, *diffusers, *underscored) if n not in found] == []


# a diffusers pipeline


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers")
    write_tiny_flux(folder, guidance=True)
    return folder / "flux"


@pytest.fixture
def both(diffusers_folder: Path) -> tuple[FluxPipeline, DiffusersPipeline]:
    other = DiffusersPipeline.from_pretrained(diffusers_folder, local_files_only=True)
    other.set_progress_bar_config(disable=True)
    return FluxPipeline.from_pretrained(diffusers_folder), other


DRAWN = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 32}


def drawn(pipe: FluxPipeline | DiffusersPipeline) -> np.ndarray:
    options = DRAWN | {"generator": torch.Generator().manual_seed(1), "output_type": "np"}
    return pipe("a red circle", **options).images


def of_both(both: tuple[FluxPipeline, DiffusersPipeline], layout: str) -> Tensors:
    """A file whose changes are a tenth of the weights, so that pictures stay comparable."""
    if layout in BFL_LAYOUTS:
        return smaller(BFL_LAYOUTS[layout](copy.deepcopy(both[0].transformer)))
    return smaller(DIFFUSERS_LAYOUTS[layout](copy.deepcopy(both[1].transformer)))


def smaller(tensors: Tensors) -> Tensors:
    ups = ("lora_up.weight", "lora_B.weight", ".up.weight", "lora_B.bias")
    return {key: 0.1 * t if key.endswith(ups) else t for key, t in tensors.items()}


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfy", "ai-toolkit", "fal", "bfl"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_diffusers_pipeline_draws_what_ours_draws_with_a_lora(
    both: tuple[FluxPipeline, DiffusersPipeline], file: Path, layout: str, accelerated: bool
) -> None:
    ours, other = both
    write(file, of_both(both, layout))
    before, base = bits(other.transformer), drawn(other)
    if accelerated:
        fluxkern.accelerate(other)
    fluxkern.load_lora(other, file)
    ours.load_lora(file)
    assert abs(drawn(other) - drawn(ours)).max() < 1 / 255
    assert abs(drawn(other) - base).max() > 1 / 255
    fluxkern.unload_loras(other)
    assert bits(other.transformer) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["linear1", "last modulation", "k of diffusers"])
def test_a_kind_in_a_diffusers_model_gives_the_weight_of_its_formula(
    model: Flux, file: Path, place: str, kind: str
) -> None:
    tensors, expected = one_module(model, place, kind)
    other, args = theirs(model), inputs(TINY)
    load(other, write(file, tensors))
    assert distance(outputs(other, args), outputs(expected, args)) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "xlabs"])
def test_diffusers_reads_the_same_file_the_same_way(
    both: tuple[FluxPipeline, DiffusersPipeline], file: Path, layout: str
) -> None:
    ours, other = both
    tensors = of_both(both, layout) if layout != "xlabs" else xlabs_of(ours.transformer)
    tensors = {key: t for key, t in tensors.items() if not OTHERS.search(key)}
    ours.load_lora(write(file, tensors))
    other.load_lora_weights(file)
    assert abs(drawn(other) - drawn(ours)).max() < 1 / 255


OTHERS = re.compile(
    "_in[_.]|final_layer|linear1|modulation"
)  # that it leaves out, or is 3072 wide in


def xlabs_of(model: Flux) -> Tensors:
    hidden, tensors = model.config.hidden_size, {}
    for n, part, rows in ((0, "qkv_lora1", 3), (0, "proj_lora1", 1), (0, "qkv_lora2", 3)):
        down, up = factors(rows * hidden, hidden)
        tensors[f"double_blocks.{n}.processor.{part}.down.weight"] = down
        tensors[f"double_blocks.{n}.processor.{part}.up.weight"] = 0.1 * up
    return tensors


def test_what_stands_in_the_way_in_diffusers_is_named(
    both: tuple[FluxPipeline, DiffusersPipeline], file: Path
) -> None:
    other = both[1]
    write(file, of_both(both, "diffusers"))
    other.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections"):
        fluxkern.load_lora(other, file)
    other.transformer.unfuse_qkv_projections()
    other.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="no adapters of peft"):
        fluxkern.load_lora(other, file, allow_unused=True)


# the pipeline and the command


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return FluxPipeline.from_pretrained("compact-schnell")


def pixels(pipe: FluxPipeline) -> np.ndarray:
    options = {"num_inference_steps": 1, "output_type": "np", "progress": False}
    return pipe("a red circle", generator=torch.Generator().manual_seed(1), **options).images


def style(pipe: FluxPipeline, seed: int = 0) -> Tensors:
    """Of all parts, in the names of kohya."""
    torch.manual_seed(seed)
    parts = {"unet": pipe.transformer, "te1": pipe.text_encoder.clip, "te3": pipe.text_encoder.t5}
    tensors = {}
    for part, model in parts.items():
        for name, layer in linears(model).items():
            if "blocks" in name or part != "unet":
                stem = f"lora_{part}_{name.replace('.', '_')}"
                down, up = factors(layer.out_features, layer.in_features)
                tensors[f"{stem}.lora_down.weight"] = down
                tensors[f"{stem}.lora_up.weight"] = 0.1 * up
    return tensors


def test_a_pipeline_loads_scales_and_unloads(pipe: FluxPipeline, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.safetensors", style(pipe, n)) for n in range(2)]
    base = pixels(pipe)
    lora = pipe.load_lora(files[0])
    assert {name.partition(".")[0] for name in lora.kinds} == set(PARTS)
    first = pixels(pipe)
    assert not np.array_equal(first, base)
    pipe.load_lora(files[1], 0.5, name="second")
    both = pixels(pipe)
    pipe.set_loras({"0": 1})
    assert np.array_equal(pixels(pipe), first)
    pipe.set_loras({"0": 1, "second": 0.5})
    assert np.array_equal(pixels(pipe), both)
    with pytest.raises(ValueError, match="name must be new, got '0'"):
        pipe.load_lora(files[0])
    with pytest.raises(ValueError, match="scales must be of 0, second, got 'third'"):
        pipe.set_loras({"third": 1})
    with pytest.raises(ValueError, match="the scale of 0 must be a finite number, got nan"):
        pipe.set_loras({"0": float("nan")})
    assert np.array_equal(pixels(pipe), both)
    pipe.unload_loras()
    assert np.array_equal(pixels(pipe), base)


PARTS = ("transformer", "text_encoder", "text_encoder_2")


def test_keys_of_the_text_encoders_change_them(pipe: FluxPipeline, tmp_path: Path) -> None:
    clip, t5 = pipe.text_encoder.clip, pipe.text_encoder.t5
    names = {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
            clip,
            "encoder.layers.0.self_attn.q_proj",
        ),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (clip, "encoder.layers.0.mlp.fc1"),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_k": (
            t5,
            "encoder.block.0.layer.0.SelfAttention.k",
        ),
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.o": (
            t5,
            "encoder.block.0.layer.0.SelfAttention.o",
        ),
    }
    tensors, wanted = {}, []
    for stem, (model, name) in names.items():
        layer = model.get_submodule(name)
        down, up = factors(*layer.weight.shape)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        wanted.append((layer, layer.weight.detach() + product(down, up)))
    pipe.load_lora(write(tmp_path / "text.safetensors", tensors))
    try:
        assert all(distance(layer.weight, weight) < 1e-6 for layer, weight in wanted)
    finally:
        pipe.unload_loras()


def test_a_pipeline_in_int8_with_a_lora_is_not_saved(tmp_path: Path) -> None:
    pipe = FluxPipeline.from_pretrained("compact-schnell", dtype="int8")
    base = pixels(pipe)
    pipe.load_lora(
        write(tmp_path / "a.safetensors", style(FluxPipeline.from_pretrained("compact-schnell")))
    )
    assert not np.array_equal(pixels(pipe), base)
    with pytest.raises(ValueError, match="model must have no LoRA in int8 to be saved"):
        save_flux(pipe.transformer, tmp_path / "new.safetensors", format="bfl")
    pipe.unload_loras()
    save_flux(pipe.transformer, tmp_path / "new.safetensors", format="bfl")
    assert np.array_equal(pixels(pipe), base)


def test_generate_takes_loras_and_says_so(
    pipe: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("style.safetensors"), style(pipe))
    command = ["generate", "a red circle", "--model", "compact-schnell", "--steps", "1"]
    command += ["--seed", "1", "--device", "cpu", "--output"]
    assert main([*command, "base.png"]) == 0
    assert main([*command, "zero.png", "--lora", "style.safetensors:0"]) == 0
    loras = ["--lora", "style.safetensors:0.5", "--lora", "style.safetensors"]
    assert main([*command, "style.png", *loras]) == 0
    base, zero, style_ = (np.asarray(Image.open(f"{n}.png")) for n in ("base", "zero", "style"))
    assert np.array_equal(base, zero) and not np.array_equal(base, style_)
    digits = weights_hash("style.safetensors")
    assert json.loads(Image.open("style.png").text["fluxkern"])["loras"] == [
        {"file": "style.safetensors", "hash": digits, "scale": scale} for scale in (0.5, 1.0)
    ]
    assert main([*command, "no.png", "--lora", "none.safetensors"]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    assert not Path("no.png").exists()
