"""Files of quantised weights as people have them."""

import contextlib
import json
import random
import re
from functools import partial
from pathlib import Path

import pytest
import quantised_files as make
import torch
from checkpoint_files import same_bits, tiny_autoencoder, tiny_flux
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from fluxkern import ops
from fluxkern.checkpoint import (
    convert,
    flux_config_to_diffusers,
    flux_to_diffusers,
    load_autoencoder,
    load_flux,
    read_header,
    save_autoencoder,
    save_flux,
)
from fluxkern.model.int8 import block_linears
from fluxkern.model.transformer import Flux

LAYER = "single_blocks.0.linear1"
GGUF = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
METADATA = {  # Comfy's notes in the header of the file, in the place of tensors
    "_quantization_metadata": json.dumps(
        {
            "format_version": "1.0",
            "layers": {
                name.removesuffix(".weight"): {"format": "float8_e4m3fn"}
                for name in make.model().state_dict()
                if make.is_quantised(name)
            },
        }
    )
}
SAFETENSORS = {
    "fp8": {"quantise": make.fp8_plain},
    "scaled fp8": {
        "quantise": make.fp8_scaled,
        "extra": {"scaled_fp8": torch.zeros(2, dtype=make.E4M3)},
    },
    "comfy fp8": {"quantise": make.fp8_comfy},
    "comfy fp8 e5m2": {"quantise": partial(make.fp8_comfy, dtype=torch.float8_e5m2)},
    "metadata fp8": {"quantise": make.fp8_rows, "metadata": METADATA},
    "BFL fp8r": {"quantise": make.fp8_rows},
    "int8": {"quantise": make.int8},
    "int8 convrot": {"quantise": make.int8_convrot},
    "nf4": {"quantise": make.nf4},
    "nested nf4": {"quantise": partial(make.nf4, nested=True)},
}


def written(path: Path, kind: str, flux: Flux | None = None) -> dict[str, Tensor]:
    """Writes a tiny transformer in a format and returns the weights that it stands for."""
    if kind in GGUF:
        pytest.importorskip("gguf")
        return make.write_gguf(path, (flux or make.model(256)).state_dict(), kind)
    return make.write(path, (flux or make.model()).state_dict(), **SAFETENSORS[kind])


def tolerance(kind: str) -> float:
    return 2e-6 if kind == "int8 convrot" else 0  # sums in another order; all else is to the bit


@pytest.mark.parametrize("kind", [*GGUF, *SAFETENSORS])
def test_a_quantised_transformer_is_what_its_oracle_reads(tmp_path, kind):
    path = tmp_path / ("flux.gguf" if kind in GGUF else "flux.safetensors")
    expected = written(path, kind)
    found = load_flux(path, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.std() > 1e-4
        assert (found[name] - tensor).abs().max() <= tolerance(kind) * tensor.abs().max()


@pytest.mark.parametrize("kind", [*GGUF, *SAFETENSORS])
def test_quantised_weights_are_bf16_where_nothing_else_is_asked_for(tmp_path, kind):
    path = tmp_path / ("flux.gguf" if kind in GGUF else "flux.safetensors")
    expected = written(path, kind)
    for name, tensor in load_flux(path).state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if make.is_quantised(name) else torch.float32)
        if not tolerance(kind):
            assert torch.equal(tensor, expected[name].to(tensor.dtype))


@pytest.mark.parametrize("kind", [*GGUF, *SAFETENSORS])
def test_quantised_weights_become_int8(tmp_path, kind):
    path = tmp_path / ("flux.gguf" if kind in GGUF else "flux.safetensors")
    expected = written(path, kind)
    flux = load_flux(path, dtype=torch.float32, int8=True)
    for name in block_linears(Flux(flux.config)):
        layer = flux.get_submodule(name)
        weight = expected[f"{name}.weight"]
        assert layer.rotation == (64 if kind == "int8 convrot" else 0)
        if layer.rotation:
            weight = (weight.unflatten(1, (-1, 64)) @ make.hadamard(64)).flatten(1)
        values, scale = ops.quantize_int8(weight)
        assert torch.equal(layer.values, values)
        torch.testing.assert_close(layer.scale, scale, rtol=4e-6, atol=0)
        assert torch.equal(layer.bias, expected[f"{name}.bias"])


@pytest.mark.parametrize("kind", ["int8", "int8 convrot"])
def test_the_codes_of_an_int8_file_are_kept_and_lie_in_the_file(tmp_path, kind):
    path = tmp_path / "flux.safetensors"
    written(path, kind)
    file, flux = load(path.read_bytes()), load_flux(path, int8=True)
    addresses = []
    for name in block_linears(Flux(flux.config)):
        layer = flux.get_submodule(name)
        assert torch.equal(layer.values, file[f"{name}.weight"])
        assert torch.equal(layer.scale, file[f"{name}.weight_scale"][:, 0])
        addresses.append(layer.values.data_ptr())
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    begin, end = (int(number, 16) for number in maps[0].split()[0].split("-"))
    assert len(maps) == 1 and all(begin <= address < end for address in addresses)


def forward(flux: Flux) -> Tensor:
    generator, config = torch.Generator().manual_seed(0), flux.config
    sizes = ((1, 6, config.in_channels), (1, 3, config.context_in_dim), (1, config.vec_in_dim))
    img, txt, vec = (torch.randn(size, generator=generator) for size in sizes)
    one = torch.full((1,), 0.5)
    with torch.no_grad():
        return flux(img, torch.zeros(6, 3), txt, torch.zeros(3, 3), one, vec, one)


def test_a_rotated_model_computes_what_its_numbers_do(tmp_path):
    path = tmp_path / "flux.safetensors"
    written(path, "int8 convrot")
    exact = forward(load_flux(path, dtype=torch.float32))
    out = forward(load_flux(path, dtype=torch.float32, int8=True))
    assert 0 < (out - exact).norm() < 0.05 * exact.norm()


def test_a_rotated_model_is_saved_as_it_is(tmp_path):
    path, again = tmp_path / "flux.safetensors", tmp_path / "again.safetensors"
    written(path, "int8 convrot")
    save_flux(load_flux(path, int8=True), again, format="bfl")
    assert same_bits(load_file(again), load_file(path))


def test_a_rotation_that_a_split_of_columns_cuts_is_undone(tmp_path):
    """The 256 columns of linear2 are used as 64 and 192."""
    path, layer = tmp_path / "flux.safetensors", "single_blocks.0.linear2"
    sizes = {"hidden_size": 64, "num_heads": 1, "depth": 1, "depth_single_blocks": 1}
    state = tiny_flux(**sizes, mlp_ratio=3.0).state_dict()

    def quantise(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return make.int8_convrot(name, weight, 256 if layer in name else 64)

    expected = make.write(path, state, quantise)
    flux = load_flux(path, dtype=torch.float32, int8=True)
    found = flux.get_submodule(layer)
    values, _ = ops.quantize_int8(expected[f"{layer}.weight"])
    assert (found.rotation, flux.get_submodule("single_blocks.0.linear1").rotation) == (0, 64)
    assert (found.values.int() - values.int()).abs().max() <= 1
    exact = forward(load_flux(path, dtype=torch.float32))
    assert (forward(flux) - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", ["fp8", "scaled fp8", "BFL fp8r", "int8", "nested nf4"])
def test_a_diffusers_folder_may_be_quantised(tmp_path, kind):
    """The rows of q, k and v lie in tensors of their own, with their scales."""
    flux = make.model()
    folder = tmp_path / "flux"
    folder.mkdir()
    state = flux_to_diffusers(flux.state_dict())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = flux_config_to_diffusers(flux.config) | {"quantization_config": about}
    (folder / "config.json").write_text(json.dumps(config))
    quantise = SAFETENSORS[kind]["quantise"]
    path = folder / "diffusion_pytorch_model.safetensors"
    expected = make.write(path, state, quantise, extra=SAFETENSORS[kind].get("extra"))
    loaded = load_flux(folder, dtype=torch.float32).state_dict()
    found = flux_to_diffusers(loaded)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    flux = load_flux(folder, dtype=torch.float32, int8=True)
    for name in block_linears(Flux(flux.config)):
        values, scale = ops.quantize_int8(loaded[f"{name}.weight"])
        assert torch.equal(flux.get_submodule(name).values, values)
        torch.testing.assert_close(flux.get_submodule(name).scale, scale, rtol=4e-6, atol=0)


@pytest.mark.parametrize("kind", ["Q8_0", *SAFETENSORS])
def test_the_defaults_of_torch_change_nothing(tmp_path, kind):
    path = tmp_path / ("flux.gguf" if kind in GGUF else "flux.safetensors")
    written(path, kind)
    for int8 in (False, True):
        expected = load_flux(path, int8=int8).state_dict()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                found = load_flux(path, int8=int8).state_dict()
        finally:
            torch.set_default_dtype(torch.float32)
        assert same_bits(found, expected)


def test_a_layer_may_lie_in_two_shards(tmp_path):
    flux = make.model()
    state = flux_to_diffusers(flux.state_dict())
    expected = make.write(tmp_path / "all.safetensors", state, make.fp8_rows)
    tensors = load_file(tmp_path / "all.safetensors")
    (tmp_path / "all.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(flux_config_to_diffusers(flux.config)))
    stem, places = "diffusion_pytorch_model", {}
    for i, is_first in enumerate((True, False), 1):
        shard = {n: t for n, t in tensors.items() if n.endswith(".weight_scale") == is_first}
        file = f"{stem}-{i:05d}-of-00002.safetensors"
        save_file(shard, tmp_path / file)
        places |= dict.fromkeys(shard, file)
    index = json.dumps({"weight_map": places})
    (tmp_path / f"{stem}.safetensors.index.json").write_text(index)
    found = flux_to_diffusers(load_flux(tmp_path, dtype=torch.float32).state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_all_in_one_file_gives_its_transformer_and_its_autoencoder(tmp_path):
    flux, vae = make.model(), tiny_autoencoder()
    extra = {f"vae.{name}": tensor.detach() for name, tensor in vae.state_dict().items()}
    extra["text_encoders.clip_l.transformer.text_model.a.weight"] = torch.zeros(2, 2)
    extra["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(2, dtype=make.E4M3)
    extra["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=make.E4M3)
    path = tmp_path / "all.sft"
    state = flux.state_dict()
    prefix = "model.diffusion_model."
    expected = make.write(path, state, make.fp8_scaled, extra=extra, prefix=prefix)
    assert same_bits(load_flux(path, dtype=torch.float32).state_dict(), expected)
    assert same_bits(load_autoencoder(path).state_dict(), dict(vae.state_dict()))


@pytest.mark.parametrize("folder", [False, True])
def test_biases_and_norms_may_be_fp8_too(tmp_path, folder):
    flux = make.model()
    state = flux_to_diffusers(flux.state_dict()) if folder else dict(flux.state_dict())
    codes = {name: tensor.to(make.E4M3).contiguous() for name, tensor in state.items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(codes, path)
    (tmp_path / "config.json").write_text(json.dumps(flux_config_to_diffusers(flux.config)))
    found = load_flux(tmp_path if folder else path, dtype=torch.float32).state_dict()
    found = flux_to_diffusers(found) if folder else found
    assert same_bits(found, {name: tensor.float() for name, tensor in codes.items()})


def test_norms_may_be_called_weight(tmp_path):
    flux = make.model()
    state = {re.sub(r"_norm\.scale$", "_norm.weight", n): t for n, t in flux.state_dict().items()}
    save_file(state, tmp_path / "flux.safetensors")
    assert same_bits(load_flux(tmp_path / "flux.safetensors").state_dict(), dict(flux.state_dict()))


@pytest.mark.parametrize("others", ["F16", "BF16"])
def test_a_gguf_of_numbers_and_a_prefix(tmp_path, others):
    pytest.importorskip("gguf")
    state = make.model().state_dict()
    path = tmp_path / "flux.gguf"
    expected = make.write_gguf(
        path, state, others, others, names=lambda name: f"model.diffusion_model.{name}"
    )
    found = load_flux(path, dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_of_bitsandbytes_is_what_it_reads_itself(tmp_path, nested):
    functional = pytest.importorskip("bitsandbytes").functional
    state, expected = dict(make.model().state_dict()), {}
    for name in filter(make.is_quantised, list(state)):
        codes, about = functional.quantize_4bit(
            state[name], blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        expected[name] = functional.dequantize_4bit(codes, about)
        state[name] = codes
        state |= {f"{name}.{part}": t for part, t in about.as_dict(packed=True).items()}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "flux.safetensors")
    found = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_int8_of_comfy_kitchen_is_what_it_reads_itself_and_it_reads_ours(tmp_path):
    layout = pytest.importorskip("comfy_kitchen.tensor.int8").TensorWiseINT8Layout
    flux, layer = make.model(256), f"{LAYER}.weight"
    weight = flux.state_dict()[layer]
    codes, about = layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=256)
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
    parts = {layer: codes, f"{layer}_scale": about.scale, f"{LAYER}.comfy_quant": make.note(note)}
    save_file(dict(flux.state_dict()) | parts, tmp_path / "theirs.safetensors")
    found = load_flux(tmp_path / "theirs.safetensors", dtype=torch.float32).state_dict()[layer]
    theirs = layout.dequantize(codes, about)
    assert (found - theirs).abs().max() < 2e-6 * theirs.abs().max()  # sums in another order
    save_flux(flux, tmp_path / "flux.safetensors", format="bfl")
    convert(tmp_path / "flux.safetensors", tmp_path / "ours.safetensors", "bfl", dtype="int8")
    file = load_file(tmp_path / "ours.safetensors")
    about = layout.Params(file[f"{layer}_scale"], torch.float32, tuple(weight.shape))
    assert (layout.dequantize(file[layer], about) - weight).norm() < 0.01 * weight.norm()


# what is refused


def tampered(path: Path, kind: str, change: dict[str, object]) -> None:
    """Changes tensors of a file: name -> a tensor, a function of the tensor, or None: no more."""
    written(path, kind)
    tensors = load_file(path)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value
    save_file(tensors, path)


STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def with_note(**changes: object):
    def change(tensor: Tensor) -> Tensor:
        return make.note(json.loads(bytes(tensor.tolist())) | changes)

    return change


def first(value: float):
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", {f"{LAYER}.weight": first(torch.nan)}, f"{LAYER}.weight in fp8 has a damaged"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": first(torch.inf)}, "must be finite and positive"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": first(-1)}, "must be finite and positive"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": torch.ones(3)}, r"one number or one a row.*\[3\]"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": torch.ones(3)[None]}, r"one number or one a row"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": lambda t: 1e9 / t}, "scales are damaged or in ano"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": lambda t: t.to(make.E4M3)}, "nvfp4, which is not"),
        ("BFL fp8r", {f"{LAYER}.weight_scale": lambda t: t.to(torch.uint8)}, "mxfp8"),
        ("BFL fp8r", {f"{LAYER}.weight_scale_2": torch.ones(1)}, "nvfp4, which is not read"),
        ("BFL fp8r", {f"{LAYER}.pre_quant_scale": torch.ones(64)}, "AWQ of modelopt, which is"),
        ("fp8", {f"{LAYER}.qweight": torch.ones(64)}, "nunchaku.*which is not read"),
        ("int8", {f"{LAYER}.SCB": torch.ones(64)}, "bitsandbytes int8, which is not read"),
        ("fp8", {f"{LAYER}.smooth": torch.ones(64)}, r"1 unexpected \(single_blocks.0.linear1.smo"),
        ("int8", {f"{LAYER}.weight_scale": None}, "must have 1 scale, got 0"),
        ("int8", {f"{LAYER}.scale_weight": torch.ones(1)}, "must have 1 scale, got 2"),
        ("int8", {f"{LAYER}.comfy_quant": with_note(format="nvfp4")}, "nvfp4, which is not read"),
        ("int8", {f"{LAYER}.comfy_quant": with_note(format=3)}, "is not said"),
        ("int8", {f"{LAYER}.comfy_quant": with_note(format="float8_e5m2")}, "must be torch.float8"),
        ("int8", {f"{LAYER}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "is not a JSON obj"),
        ("int8", {f"{LAYER}.comfy_quant": torch.zeros(9)}, "must be uint8 of at most"),
        ("int8", {"lost.comfy_quant": make.note({"format": "int8_tensorwise"})}, "but no weight"),
        ("int8 convrot", {f"{LAYER}.comfy_quant": with_note(convrot_groupsize=32)}, "power of 4"),
        ("int8 convrot", {f"{LAYER}.comfy_quant": with_note(convrot_groupsize=256)}, "divides 64"),
        ("int8 convrot", {f"{LAYER}.comfy_quant": with_note(convrot_groupsize="4")}, "power of 4"),
        ("nf4", {f"{LAYER}.weight.absmax": first(torch.nan)}, "must be finite and positive"),
        (
            "nf4",
            {f"{LAYER}.weight.absmax": torch.ones(5)},
            r"absmax must hold 448 numbers, got \[5",
        ),
        ("nf4", {f"{LAYER}.weight.quant_map": None}, "quant_map must hold 16 numbers, got none"),
        ("nf4", {f"{LAYER}.weight.quant_map": torch.full((16,), torch.inf)}, "has a damaged block"),
        ("nf4", {STATE: with_note(shape=[448, 63])}, r"must hold \[N, K\].*\[448, 63\]"),
        ("nf4", {STATE: with_note(shape=[-448, -64])}, r"must hold \[N, K\]"),
        ("nf4", {STATE: with_note(shape=[64, 448])}, r"mis-shaped.*found \[64, 448\]"),
        ("nf4", {STATE: with_note(blocksize=100)}, "blocksize must divide its 64 columns, got 100"),
        ("nf4", {STATE: with_note(blocksize=0)}, "blocksize must divide"),
        ("nf4", {STATE: with_note(quant_type="fp4")}, "bitsandbytes nf4.*which is not read"),
        ("nested nf4", {STATE: with_note(nested_offset="0")}, "nested_offset must be numbers"),
        (
            "nested nf4",
            {STATE: with_note(nested_blocksize=0)},
            "nested_blocksize and nested_offset",
        ),
        ("nested nf4", {f"{LAYER}.weight.nested_absmax": torch.ones(9)}, "must hold 2 numbers"),
    ],
)
def test_what_is_damaged_or_of_another_format_is_refused_by_its_name(
    tmp_path, kind, change, message
):
    path = tmp_path / "flux.safetensors"
    tampered(path, kind, change)
    for int8 in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            load_flux(path, int8=int8)
        assert str(path) in str(error.value)


def gguf_of(path: Path) -> bytearray:
    pytest.importorskip("gguf")
    make.write_gguf(path, make.model().state_dict(), "Q8_0")
    return bytearray(path.read_bytes())


def place(data: bytes, name: str, behind: int) -> int:
    """Where something lies behind the name of a tensor in a header."""
    return data.index(name.encode()) + len(name) + behind


AXES, SHAPE, KIND, OFFSET = (0,), (4,), (20,), (24,)  # of a matrix, behind its name


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, (4).to_bytes(4, "little"), "version 2 or 3, got 4"),
        (4, (3).to_bytes(4, "big"), "little-endian GGUF"),
        (8, (2**63).to_bytes(8, "little"), "entries at byte"),
        (16, (2**40).to_bytes(8, "little"), "entries at byte"),
        (24, (2**33).to_bytes(8, "little"), "bytes at byte"),
        (AXES, (5).to_bytes(4, "little"), "1 to 4 axes, got 5"),
        (AXES, (0).to_bytes(4, "little"), "1 to 4 axes, got 0"),
        (SHAPE, (2**62).to_bytes(8, "little"), "must have 1 to .* elements"),
        (SHAPE, (0).to_bytes(8, "little"), "must have 1 to .* elements"),
        (SHAPE, (63).to_bytes(8, "little"), "rows of 63, not of blocks of 32"),
        (SHAPE, (96).to_bytes(8, "little"), "does not follow byte"),
        (KIND, (20).to_bytes(4, "little"), "is IQ4_NL, which is not read; those read are Q4_0"),
        (KIND, (39).to_bytes(4, "little"), "is MXFP4, which is not read"),
        (KIND, (99).to_bytes(4, "little"), "is type 99, which is not read"),
        (OFFSET, (2**40).to_bytes(8, "little"), "does not follow byte"),
        (OFFSET, (7).to_bytes(8, "little"), "lies at 7"),
        (OFFSET, (0).to_bytes(8, "little"), "does not follow byte"),
    ],
)
def test_a_damaged_header_of_a_gguf_is_refused(tmp_path, at, value, message):
    path = tmp_path / "flux.gguf"
    data = gguf_of(path)
    at = at if isinstance(at, int) else place(data, f"{LAYER}.weight", at[0])
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_flux(path)


def test_a_gguf_that_is_cut_short_or_too_long_is_refused(tmp_path):
    path = tmp_path / "flux.gguf"
    data = gguf_of(path)
    for length in (5, 30, 100, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"{path} (cannot be read|is damaged)"):
            load_flux(path)
    path.write_bytes(data + bytes(64))
    with pytest.raises(ValueError, match="64 bytes at the end belong to no tensor"):
        load_flux(path)


def test_any_changed_byte_of_a_gguf_header_is_an_error_or_does_not_matter(tmp_path):
    path = tmp_path / "flux.gguf"
    data = gguf_of(path)
    end = place(data, "final_layer.adaLN_modulation.1.bias", 24)
    for at in random.Random(0).sample(range(end), 300):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            load_flux(path)


def test_a_damaged_block_of_a_gguf_is_refused_by_its_tensor(tmp_path):
    path = tmp_path / "flux.gguf"
    data = gguf_of(path)
    name = "double_blocks.0.img_attn.qkv.weight"
    begin = read_header(path)[name].codes.offset
    data[begin + 34 : begin + 36] = b"\x00\x7e"  # NaN, in row 0
    path.write_bytes(data)
    for int8 in (False, True):
        with pytest.raises(ValueError, match=f"{name} in GGUF Q8_0 has a damaged block in row 0"):
            load_flux(path, int8=int8)


def test_metadata_that_names_no_layers_is_refused(tmp_path):
    state = make.model().state_dict()
    path = tmp_path / "flux.safetensors"
    for text, message in {
        "{": "is not a JSON object",
        '{"layers": 3}': "has no layers",
        '{"layers": {"img_in": 3}}': "format of img_in. is not said",
        '{"layers": {"nowhere": {"format": "float8_e4m3fn"}}}': "nowhere. has a format but no",
    }.items():
        make.write(path, state, make.fp8_rows, metadata={"_quantization_metadata": text})
        with pytest.raises(ValueError, match=message):
            load_flux(path)


def test_int8_is_written_as_comfys_int8_tensorwise(tmp_path):
    flux = make.model()
    save_flux(flux, tmp_path / "flux", dtype=torch.bfloat16)
    path = tmp_path / "int8.safetensors"
    convert(tmp_path / "flux", path, "bfl", dtype="int8")
    file, state = load_file(path), flux.state_dict()
    for name in block_linears(flux):
        weight = state.pop(f"{name}.weight").bfloat16()
        codes, scale = file.pop(f"{name}.weight"), file.pop(f"{name}.weight_scale")
        assert (codes.dtype, scale.shape) == (torch.int8, (len(weight), 1))
        error = (codes.float() * scale - weight.float()).abs()
        assert (error <= scale * 0.501).all()  # to the nearest
        note = bytes(file.pop(f"{name}.comfy_quant").tolist())
        assert json.loads(note) == {"format": "int8_tensorwise"}
    assert same_bits(file, {name: tensor.bfloat16() for name, tensor in state.items()})
    found, made = load_flux(path, int8=True), load_flux(tmp_path / "flux", int8=True)
    assert same_bits(found.state_dict(), made.state_dict())


@pytest.mark.parametrize(
    ("kind", "to", "dtype", "message"),
    [
        (
            "flux",
            "diffusers",
            "int8",
            "for a transformer or T5 to bfl, got transformer to diffusers",
        ),
        ("vae", "bfl", "int8", "got autoencoder to bfl"),
        ("flux", "bfl", "int4", "dtype must be 'int8' or None, got 'int4'"),
    ],
)
def test_what_cannot_be_int8_is_refused(tmp_path, kind, to, dtype, message):
    save_flux(make.model(), tmp_path / "flux")
    save_autoencoder(tiny_autoencoder(), tmp_path / "vae")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / kind, tmp_path / "out.safetensors", to, dtype=dtype)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_int8_model_is_written_in_one_way_alone(tmp_path):
    written(tmp_path / "flux.safetensors", "fp8")
    flux = load_flux(tmp_path / "flux.safetensors", int8=True)
    for options in ({"format": "diffusers"}, {"format": "bfl", "dtype": torch.float32}):
        with pytest.raises(ValueError, match="format must be 'bfl' and dtype None for a model in"):
            save_flux(flux, tmp_path / "out.safetensors", **options)


def test_a_quantised_model_is_saved_by_its_numbers(tmp_path):
    expected = written(tmp_path / "flux.safetensors", "BFL fp8r")
    flux = load_flux(tmp_path / "flux.safetensors", dtype=torch.float32)
    save_flux(flux, tmp_path / "plain.safetensors", format="bfl")
    assert same_bits(load_file(tmp_path / "plain.safetensors"), expected)
