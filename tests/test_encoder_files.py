"""CLIP and T5 from single files, and pipelines whose weights lie in files as people have them."""

import re
from pathlib import Path

import numpy as np
import pytest
import quantised_files as make
import torch
from checkpoint_files import same_bits
from safetensors.torch import load_file, save_file
from tiny_flux import write_tiny_flux
from torch import Tensor

from fluxkern import FluxPipeline, ops
from fluxkern.checkpoint import (
    autoencoder_from_diffusers,
    convert,
    flux_from_diffusers,
    load_clip,
    load_flux,
    load_t5,
    parts_in,
    weights_hash,
)
from fluxkern.model.int8 import Int8Linear
from fluxkern.model.text_encoder import TextEncoder
from fluxkern.pipeline import COMPACT

TO_GGUF = [  # transformers' names to llama.cpp's
    (r"^shared\.", "token_embd."),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.(\d+)\.", r"enc.blk.\1."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "attn_rel_b."),
    (r"layer\.0\.SelfAttention\.", "attn_"),
    (r"layer\.0\.layer_norm\.", "attn_norm."),
    (r"layer\.1\.layer_norm\.", "ffn_norm."),
    (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn_gate."),
    (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn_up."),
    (r"layer\.1\.DenseReluDense\.wo\.", "ffn_down."),
]


def to_gguf(name: str) -> str:
    for pattern, replacement in TO_GGUF:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_tiny_flux(folder, guidance=False)
    return folder / "flux"


def tensors(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def state(root: Path) -> dict[str, Tensor]:
    return tensors(root / "text_encoder_2")


def is_linear(name: str) -> bool:
    return bool(re.search(r"\.(q|k|v|o|wi_0|wi_1|wo)\.weight$", name))


def test_a_t5_of_llama_cpp_is_that_of_transformers(root, state, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "t5.gguf"
    kept = {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    expected = make.write_gguf(
        path, kept, "Q8_0", names=to_gguf, selected=lambda n: is_linear(n) and ".wo." not in n
    )
    t5 = load_t5(path, root / "text_encoder_2", dtype=torch.float32)
    found = t5.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert t5.encoder.embed_tokens.weight is t5.shared.weight
    whole = TextEncoder.from_folder(root).t5
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    out, exact = t5(ids).last_hidden_state, whole(ids).last_hidden_state
    assert 0 < (out - exact).norm() < 0.02 * exact.norm()


def test_a_t5_becomes_int8_but_for_the_layers_with_outliers(root, state, tmp_path):
    save_file(state, tmp_path / "t5.safetensors")
    t5 = load_t5(tmp_path / "t5.safetensors", root / "text_encoder_2", int8=True)
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if not is_linear(name):
            continue
        module = t5.get_submodule(layer)
        if layer.endswith(".wo"):
            assert torch.equal(module.weight, tensor.bfloat16())
        else:
            assert isinstance(module, Int8Linear)
            assert torch.equal(module.values, ops.quantize_int8(tensor)[0])
    exact = TextEncoder.from_folder(root).t5(torch.tensor([[3, 1, 4, 1, 5]])).last_hidden_state
    out = t5(torch.tensor([[3, 1, 4, 1, 5]])).last_hidden_state
    assert out.dtype == torch.bfloat16
    assert 0 < (out.float() - exact).norm() < 0.05 * exact.norm()


def test_a_t5_is_written_in_int8_and_mapped(root, tmp_path):
    path, folder = tmp_path / "t5.safetensors", root / "text_encoder_2"
    convert(folder, path, "bfl", dtype="int8")
    assert parts_in([path]) == {"text_encoder_2": path}
    found, made = load_t5(path, folder, int8=True), load_t5(folder, folder, int8=True)
    assert same_bits(found.state_dict(), made.state_dict())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(found(ids).last_hidden_state, made(ids).last_hidden_state)
    with pytest.raises(ValueError, match="holds no Flux|_class_name"):
        convert(folder, tmp_path / "other.safetensors", "bfl")


@pytest.mark.parametrize("kind", ["fp8", "scaled", "nf4"])
def test_a_t5_may_be_quantised_in_a_folder_of_its_own(root, state, tmp_path, kind):
    quantise = {"fp8": make.fp8_plain, "scaled": make.fp8_scaled, "nf4": make.nf4}[kind]

    def linears(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        fits = is_linear(name) and tensor.shape[1] % 64 == 0 or kind != "nf4"
        return quantise(name, tensor) if fits and is_linear(name) else ({name: tensor}, tensor)

    file, expected = {}, {}
    for name, tensor in state.items():
        parts, expected[name] = linears(name, tensor)
        file |= parts
    folder = tmp_path / "text_encoder_2"
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in file.items()}, folder / "model.safetensors")
    t5 = load_t5(folder, root / "text_encoder_2", dtype=torch.float32).state_dict()
    assert all(torch.equal(t5[name], tensor) for name, tensor in expected.items())


def test_a_clip_is_that_of_transformers_under_any_of_its_names(root, tmp_path):
    state = tensors(root / "text_encoder")
    exact = TextEncoder.from_folder(root).clip
    ids = torch.tensor([[5, 6, 7, exact.config.eos_token_id]])
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    prefix = "text_encoders.clip_l.transformer."
    spare = {"text_projection.weight": torch.eye(3), "logit_scale": torch.ones(())}
    named = {f"text_model.{name}": tensor for name, tensor in bare.items()}
    inside = {prefix + name: tensor for name, tensor in (named | spare).items()}
    inside["text_encoders.clip_l.logit_scale"] = torch.ones(())
    for i, names in enumerate((bare, named, named | spare, inside)):
        save_file(names, tmp_path / f"{i}.safetensors")
        clip = load_clip(tmp_path / f"{i}.safetensors", root / "text_encoder")
        assert torch.equal(clip(ids).pooler_output, exact(ids).pooler_output)


def test_an_encoder_that_does_not_fit_its_config_is_refused(root, state, tmp_path):
    path = tmp_path / "t5.safetensors"
    wrong = {
        "1 missing": {n: t for n, t in state.items() if not n.endswith("final_layer_norm.weight")},
        "1 unexpected.*dec.blk.0": state | {"dec.blk.0.attn_q.weight": torch.zeros(2, 2)},
        "1 mis-shaped.*shared": state | {"shared.weight": torch.zeros(3, 32)},
    }
    for message, names in wrong.items():
        save_file(names, path)
        with pytest.raises(ValueError, match=message):
            load_t5(path, root / "text_encoder_2")
    with pytest.raises(ValueError, match="model_type must be 't5'"):
        load_t5(path, root / "text_encoder")


# whole pipelines


def native(root: Path) -> dict[str, dict[str, Tensor]]:
    """The parts of the pipeline under the names that single files have."""
    return {
        "model.diffusion_model.": flux_from_diffusers(tensors(root / "transformer")),
        "vae.": autoencoder_from_diffusers(tensors(root / "vae")),
        "text_encoders.t5xxl.transformer.": tensors(root / "text_encoder_2"),
        "text_encoders.clip_l.transformer.": {
            f"text_model.{name.removeprefix('text_model.')}": tensor
            for name, tensor in tensors(root / "text_encoder").items()
        },
    }


def draw(pipe: FluxPipeline) -> np.ndarray:
    return pipe(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        progress=False,
    ).images


def test_an_all_in_one_file_draws_what_its_folder_draws(tmp_path):
    folder = COMPACT["compact"]
    parts = native(folder)
    del parts["vae."]  # of other groups than a single file can say
    whole = {prefix + n: t for prefix, part in parts.items() for n, t in part.items()}
    path = tmp_path / "all.sft"
    save_file({name: t.contiguous() for name, t in whole.items()}, path)
    for file in folder.rglob("*"):
        place = tmp_path / "bare" / file.relative_to(folder)
        if file.suffix in (".json", ".txt", ".model") or file.match("vae/*.safetensors"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    pipe = FluxPipeline.from_pretrained(tmp_path / "bare", weights=[path])
    assert np.array_equal(draw(pipe), draw(FluxPipeline.from_pretrained("compact")))
    assert parts_in([path]).keys() == {"transformer", "text_encoder", "text_encoder_2"}


def test_files_take_the_place_of_the_folders_weights(tmp_path):
    """The compact model with its transformer as int8 and its T5 as GGUF."""
    pytest.importorskip("gguf")
    folder = COMPACT["compact"]
    convert(folder / "transformer", tmp_path / "flux.safetensors", "bfl", dtype="int8")
    state = {n: t.float() for n, t in tensors(folder / "text_encoder_2").items()}
    make.write_gguf(tmp_path / "t5.gguf", state, "Q8_0", names=to_gguf, selected=is_linear)
    files = [tmp_path / "flux.safetensors", tmp_path / "t5.gguf"]
    pipe = FluxPipeline.from_pretrained("compact", weights=files, dtype="int8")
    expected = load_flux(files[0], dtype=torch.float32, int8=True)
    assert torch.equal(
        pipe.transformer.single_blocks[0].linear1.values, expected.single_blocks[0].linear1.values
    )
    kinds = {type(m).__name__ for m in pipe.text_encoder.t5.modules()}
    assert "Int8Linear" in kinds and "Linear" in kinds
    exact = draw(FluxPipeline.from_pretrained("compact"))
    error = np.square(draw(pipe) - exact).mean()
    assert 0 < error < 1e-2


def test_weights_that_are_no_part_or_twice_a_part_are_refused(tmp_path):
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no part of a FLUX.1 pipeline, but something"):
        FluxPipeline.from_pretrained("compact", weights=[tmp_path / "other.safetensors"])
    flux = make.model().state_dict()
    for name in ("a", "b"):
        save_file(flux, tmp_path / f"{name}.safetensors")
    both = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(ValueError, match=r"transformer must be in one file, got .*a\.s.* and .*b"):
        FluxPipeline.from_pretrained("compact", weights=both)
    with pytest.raises(ValueError, match="the transformer's in_channels must be 64, got 8"):
        FluxPipeline.from_pretrained("compact", weights=both[:1])


def test_the_hash_follows_the_files_that_take_a_place(root, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "flux.safetensors")
    file = {"transformer": tmp_path / "flux.safetensors"}
    first = weights_hash(root, file)
    assert first != weights_hash(root) and first == weights_hash(root, file)
    save_file({"a": torch.ones(2)}, tmp_path / "flux.safetensors")
    assert weights_hash(root, file) != first
