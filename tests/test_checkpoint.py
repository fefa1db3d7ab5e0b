import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    TINY_AUTOENCODER,
    TINY_FLUX,
    files_below,
    randomise,
    same_bits,
    tiny_autoencoder,
    tiny_flux,
    write_raw_safetensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fluxkern import _files
from fluxkern.checkpoint import (
    INDEX,
    autoencoder_config_from_diffusers,
    autoencoder_config_from_state,
    autoencoder_config_to_diffusers,
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    check_model_index,
    convert,
    files,
    flux_config_from_diffusers,
    flux_config_from_state,
    flux_config_to_diffusers,
    flux_from_diffusers,
    flux_to_diffusers,
    load_autoencoder,
    load_flux,
    require_text_to_image,
    resolve,
    save_autoencoder,
    save_flux,
    variant,
    weights_hash,
)
from fluxkern.model.autoencoder import AutoEncoder, AutoEncoderConfig
from fluxkern.model.transformer import CONFIGS, Flux, FluxConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHER = 54321  # the id of a user who is not here

# BFL's names written by hand for one block of each kind, hidden 2 and MLP 3: rows, columns, and the
# name diffusers gives to a layer that is only renamed
LINEARS = """
img_in 2 5 x_embedder
txt_in 2 6 context_embedder
time_in.in_layer 2 4 time_text_embed.timestep_embedder.linear_1
time_in.out_layer 2 2 time_text_embed.timestep_embedder.linear_2
vector_in.in_layer 2 7 time_text_embed.text_embedder.linear_1
vector_in.out_layer 2 2 time_text_embed.text_embedder.linear_2
guidance_in.in_layer 2 4 time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer 2 2 time_text_embed.guidance_embedder.linear_2
double_blocks.0.img_mod.lin 12 2 transformer_blocks.0.norm1.linear
double_blocks.0.txt_mod.lin 12 2 transformer_blocks.0.norm1_context.linear
double_blocks.0.img_attn.qkv 6 2 -
double_blocks.0.txt_attn.qkv 6 2 -
double_blocks.0.img_attn.proj 2 2 transformer_blocks.0.attn.to_out.0
double_blocks.0.txt_attn.proj 2 2 transformer_blocks.0.attn.to_add_out
double_blocks.0.img_mlp.0 3 2 transformer_blocks.0.ff.net.0.proj
double_blocks.0.img_mlp.2 2 3 transformer_blocks.0.ff.net.2
double_blocks.0.txt_mlp.0 3 2 transformer_blocks.0.ff_context.net.0.proj
double_blocks.0.txt_mlp.2 2 3 transformer_blocks.0.ff_context.net.2
single_blocks.0.modulation.lin 6 2 single_transformer_blocks.0.norm.linear
single_blocks.0.linear1 9 2 -
single_blocks.0.linear2 2 5 single_transformer_blocks.0.proj_out
final_layer.linear 5 2 proj_out
final_layer.adaLN_modulation.1 4 2 -
"""
NORMS = """
double_blocks.0.img_attn.norm.query_norm.scale transformer_blocks.0.attn.norm_q.weight
double_blocks.0.img_attn.norm.key_norm.scale transformer_blocks.0.attn.norm_k.weight
double_blocks.0.txt_attn.norm.query_norm.scale transformer_blocks.0.attn.norm_added_q.weight
double_blocks.0.txt_attn.norm.key_norm.scale transformer_blocks.0.attn.norm_added_k.weight
single_blocks.0.norm.query_norm.scale single_transformer_blocks.0.attn.norm_q.weight
single_blocks.0.norm.key_norm.scale single_transformer_blocks.0.attn.norm_k.weight
"""


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


def bfl_state() -> dict[str, torch.Tensor]:
    sd = {}
    for start, (name, height, width, _) in enumerate(rows(LINEARS)):
        height, width = int(height), int(width)
        sd[f"{name}.weight"] = 1000 * start + torch.arange(height * width).view(height, width)
        sd[f"{name}.bias"] = 1000 * start + 500 + torch.arange(height)
    for start, (name, _) in enumerate(rows(NORMS)):
        sd[name] = -1000 * start - torch.arange(2)
    return sd


@cache
def meta_flux(config: FluxConfig) -> Flux:
    with torch.device("meta"):
        return Flux(config)


def shapes_of(sd: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sd.items()}


# names


def test_layers_that_are_only_renamed_get_the_names_written_here():
    sd = bfl_state()
    out = flux_to_diffusers(sd)
    for ours, _, _, theirs in rows(LINEARS):
        if theirs != "-":
            assert out[f"{theirs}.weight"].equal(sd[f"{ours}.weight"])
            assert out[f"{theirs}.bias"].equal(sd[f"{ours}.bias"])
    for ours, theirs in rows(NORMS):
        assert out[theirs].equal(sd[ours])


def test_the_last_modulations_halves_change_places():
    sd = bfl_state()
    sd["final_layer.adaLN_modulation.1.weight"] = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    sd["final_layer.adaLN_modulation.1.bias"] = torch.tensor([10, 20, 30, 40])
    out = flux_to_diffusers(sd)
    assert out["norm_out.linear.weight"].tolist() == [[5, 6], [7, 8], [1, 2], [3, 4]]
    assert out["norm_out.linear.bias"].tolist() == [30, 40, 10, 20]
    back = flux_from_diffusers(out)
    assert back["final_layer.adaLN_modulation.1.bias"].tolist() == [10, 20, 30, 40]


def test_linear1_is_split_into_q_k_v_and_mlp():
    sd = bfl_state()
    sd["single_blocks.0.linear1.weight"] = torch.arange(18).view(9, 2)
    sd["single_blocks.0.linear1.bias"] = torch.arange(9)
    out = flux_to_diffusers(sd)
    block = "single_transformer_blocks.0"
    assert out[f"{block}.attn.to_q.weight"].tolist() == [[0, 1], [2, 3]]
    assert out[f"{block}.attn.to_k.weight"].tolist() == [[4, 5], [6, 7]]
    assert out[f"{block}.attn.to_v.weight"].tolist() == [[8, 9], [10, 11]]
    assert out[f"{block}.proj_mlp.weight"].tolist() == [[12, 13], [14, 15], [16, 17]]
    assert out[f"{block}.proj_mlp.bias"].tolist() == [6, 7, 8]


def test_qkv_of_both_streams_is_split_in_the_order_q_k_v():
    sd = bfl_state()
    sd["double_blocks.0.img_attn.qkv.bias"] = torch.tensor([1, 2, 3, 4, 5, 6])
    sd["double_blocks.0.txt_attn.qkv.bias"] = torch.tensor([7, 8, 9, 10, 11, 12])
    out = flux_to_diffusers(sd)
    found = {
        name: out[f"transformer_blocks.0.attn.{name}.bias"].tolist()
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    }
    assert list(found.values()) == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]


def test_diffusers_tensors_are_joined_in_the_order_q_k_v_mlp():
    theirs = flux_to_diffusers(bfl_state())
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        theirs[f"single_transformer_blocks.0.{name}.bias"] = torch.tensor([2 * i, 2 * i + 1])
    theirs["single_transformer_blocks.0.proj_mlp.bias"] = torch.tensor([6, 7, 8])
    theirs["norm_out.linear.bias"] = torch.tensor([1, 2, 3, 4])  # scale, scale, shift, shift
    out = flux_from_diffusers(theirs)
    assert out["single_blocks.0.linear1.bias"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert out["final_layer.adaLN_modulation.1.bias"].tolist() == [3, 4, 1, 2]


@settings(max_examples=15, deadline=None)
@given(
    depth=st.integers(1, 12),
    singles=st.integers(0, 12),
    heads=st.integers(1, 2),
    guidance=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_transformers_names_there_and_back_are_the_identity(
    depth, singles, heads, guidance, dtype
):
    sizes = {"hidden_size": 16 * heads, "num_heads": heads, "axes_dim": (4, 6, 6)}
    counts = {"depth": depth, "depth_single_blocks": singles, "guidance_embed": guidance}
    sd = tiny_flux(**sizes, **counts).to(dtype).state_dict()
    theirs = flux_to_diffusers(sd)
    assert same_bits(flux_from_diffusers(theirs), sd)
    assert same_bits(flux_to_diffusers(flux_from_diffusers(theirs)), theirs)


def test_a_transformer_state_with_a_name_too_many_or_too_few_is_refused():
    sd = bfl_state()
    del sd["single_blocks.0.linear2.bias"]
    sd["double_blocks.0.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing.*linear2\.bias.*unexpected.*extra"):
        flux_to_diffusers(sd)
    with pytest.raises(ValueError, match="x_embedder"):
        flux_from_diffusers(bfl_state())


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "parameters"),
    [
        ("dev", 780, 1160, 11_901_408_320),
        ("schnell", 776, 1156, 11_891_178_560),
        ("fill", 780, 1160, 11_902_391_360),
        ("control", 780, 1160, 11_901_604_928),
    ],
)
def test_full_size_models_have_the_published_counts_in_both_namings(name, ours, theirs, parameters):
    from diffusers import FluxTransformer2DModel

    sd = meta_flux(CONFIGS[name]).state_dict()
    out = flux_to_diffusers(sd)
    assert (len(sd), len(out)) == (ours, theirs)
    assert sum(t.numel() for t in sd.values()) == parameters
    assert sum(t.numel() for t in out.values()) == parameters
    config = flux_config_to_diffusers(CONFIGS[name])
    with torch.device("meta"):
        known = FluxTransformer2DModel.from_config(config).state_dict()
    assert shapes_of(out) == shapes_of(known)
    assert shapes_of(flux_from_diffusers(known)) == shapes_of(sd)
    assert all(tensor.is_meta for tensor in out.values())


def test_kontext_has_devs_tensors():
    assert CONFIGS["kontext"] == CONFIGS["dev"]


AUTOENCODER_NAMES = """
encoder.conv_in.weight encoder.conv_in.weight
encoder.down.0.block.1.norm1.weight encoder.down_blocks.0.resnets.1.norm1.weight
encoder.down.1.block.0.nin_shortcut.bias encoder.down_blocks.1.resnets.0.conv_shortcut.bias
encoder.down.2.downsample.conv.weight encoder.down_blocks.2.downsamplers.0.conv.weight
encoder.mid.block_1.conv1.weight encoder.mid_block.resnets.0.conv1.weight
encoder.mid.block_2.conv2.bias encoder.mid_block.resnets.1.conv2.bias
encoder.mid.attn_1.norm.weight encoder.mid_block.attentions.0.group_norm.weight
encoder.mid.attn_1.q.bias encoder.mid_block.attentions.0.to_q.bias
encoder.mid.attn_1.k.bias encoder.mid_block.attentions.0.to_k.bias
decoder.mid.attn_1.v.bias decoder.mid_block.attentions.0.to_v.bias
decoder.mid.attn_1.proj_out.bias decoder.mid_block.attentions.0.to_out.0.bias
encoder.norm_out.weight encoder.conv_norm_out.weight
decoder.up.0.block.2.conv1.weight decoder.up_blocks.3.resnets.2.conv1.weight
decoder.up.1.block.0.nin_shortcut.weight decoder.up_blocks.2.resnets.0.conv_shortcut.weight
decoder.up.2.upsample.conv.weight decoder.up_blocks.1.upsamplers.0.conv.weight
decoder.up.3.upsample.conv.bias decoder.up_blocks.0.upsamplers.0.conv.bias
decoder.conv_out.weight decoder.conv_out.weight
"""


def test_the_autoencoders_tensors_get_the_names_written_here():
    names = rows(AUTOENCODER_NAMES)
    sd = {ours: torch.tensor([float(i)]) for i, (ours, _) in enumerate(names)}
    out = autoencoder_to_diffusers(sd)
    assert {name: t.item() for name, t in out.items()} == {
        theirs: float(i) for i, (_, theirs) in enumerate(names)
    }
    assert same_bits(autoencoder_from_diffusers(out), sd)


def test_attention_weights_of_the_autoencoder_are_matrices_for_diffusers():
    sd = {"encoder.mid.attn_1.q.weight": torch.tensor([[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]])}
    out = autoencoder_to_diffusers(sd)
    theirs = out["encoder.mid_block.attentions.0.to_q.weight"]
    assert theirs.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert same_bits(autoencoder_from_diffusers(out), sd)


def test_the_autoencoders_names_are_those_of_diffusers():
    from diffusers import AutoencoderKL

    for config in (AutoEncoderConfig(), TINY_AUTOENCODER):
        with torch.device("meta"):
            sd = AutoEncoder(config).state_dict()
            fields = autoencoder_config_to_diffusers(config)
            known = AutoencoderKL.from_config(fields).state_dict()
        assert shapes_of(autoencoder_to_diffusers(sd)) == shapes_of(known)
        assert shapes_of(autoencoder_from_diffusers(known)) == shapes_of(sd)


def test_autoencoder_names_of_the_other_layout_are_refused():
    with pytest.raises(ValueError, match="no tensor of diffusers"):
        autoencoder_from_diffusers({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no tensor of BFL"):
        autoencoder_to_diffusers({"encoder.down_blocks.0.resnets.0.norm1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="level"):
        autoencoder_to_diffusers({"decoder.up.7.block.0.norm1.weight": torch.zeros(1)})


# configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_written_for_diffusers_or_seen_in_shapes_is_the_same(name):
    config = CONFIGS[name]
    written = json.loads(json.dumps(flux_config_to_diffusers(config)))
    assert flux_config_from_diffusers(written) == config
    assert flux_config_from_state(shapes_of(meta_flux(CONFIGS[name]).state_dict())) == config


def test_the_published_dev_config_is_dev():
    published = {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": "../checkpoints/flux-dev/transformer",
        "attention_head_dim": 128,
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    }
    assert flux_config_from_diffusers(published) == CONFIGS["dev"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "os.system"}, "_class_name"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quant_method.*quanto"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "load_in_4bit"),
        ({"quantization_config": "bitsandbytes"}, "quantization_config"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"num_layers": "19"}, "num_layers"),
        ({"in_channels": 0}, "in_channels"),
        ({"in_channels": -64}, "in_channels"),
        ({"in_channels": 64.0}, "in_channels"),
        ({"attention_head_dim": 10**30}, "attention_head_dim"),
        ({"axes_dims_rope": [16, 56]}, "axes_dim"),
        ({"axes_dims_rope": "16,56,56"}, "axes_dims_rope"),
        ({"axes_dims_rope": [16] * 10_000}, "axes_dims_rope"),
        ({"guidance_embeds": 1}, "guidance_embeds"),
        ({"patch_size": 2}, "patch_size"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ({"pooled_projection_dim": None}, "pooled_projection_dim"),
    ],
)
def test_a_hostile_transformer_config_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        flux_config_from_diffusers({**flux_config_to_diffusers(CONFIGS["dev"]), **change})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"block_out_channels": [128, 200, 512, 512]}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"scaling_factor": "0.36"}, "scaling_factor"),
        ({"scaling_factor": 10**40}, "scaling_factor must be a finite number of at most 1e"),
        ({"shift_factor": -1e7}, "shift_factor must be a finite number of at most 1e"),
        ({"norm_num_groups": 0}, "norm_num_groups"),
        ({"layers_per_block": 10**6}, "layers_per_block"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_hostile_autoencoder_config_is_refused_in_one_line(change, message):
    data = autoencoder_config_to_diffusers(AutoEncoderConfig())
    assert autoencoder_config_from_diffusers(data) == AutoEncoderConfig()
    with pytest.raises(ValueError, match=message) as error:
        autoencoder_config_from_diffusers({**data, **change})
    assert "\n" not in str(error.value)


def test_an_autoencoder_config_is_seen_in_shapes():
    with torch.device("meta"):
        shapes = shapes_of(AutoEncoder(AutoEncoderConfig()).state_dict())
    assert autoencoder_config_from_state(shapes) == AutoEncoderConfig()


def test_variants_are_named():
    names = ("dev", "schnell", "fill", "control", "compact")
    assert [variant(CONFIGS[name]) for name in names] == list(names)
    assert variant(CONFIGS["kontext"]) == "dev"
    assert variant(TINY_FLUX) == "custom"


def test_variants_without_a_pipeline_are_refused_by_name():
    for name in ("dev", "schnell", "compact"):
        require_text_to_image(CONFIGS[name])
    with pytest.raises(ValueError, match=r"FLUX\.1 Fill has no pipeline in fluxkern yet.*64.*384"):
        require_text_to_image(CONFIGS["fill"])
    with pytest.raises(ValueError, match="control.*has no pipeline in fluxkern yet"):
        require_text_to_image(CONFIGS["control"])


def test_another_pipelines_folder_is_refused_by_name(tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    check_model_index(tmp_path)
    for name in ("FluxKontextPipeline", "FluxFillPipeline", "StableDiffusionPipeline"):
        index.write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=name):
            check_model_index(tmp_path)


# loading and saving


def test_a_file_in_bfls_layout_comes_back_to_the_bit(tmp_path):
    model = tiny_flux()
    save_flux(model, tmp_path / "flux.safetensors", format="bfl")
    stored = load_file(tmp_path / "flux.safetensors")
    assert same_bits(stored, model.state_dict())
    loaded = load_flux(tmp_path / "flux.safetensors")
    assert loaded.config == TINY_FLUX
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_the_prefix_of_single_files_is_stripped(tmp_path):
    model = tiny_flux()
    tensors = {f"model.diffusion_model.{name}": t for name, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    assert same_bits(load_flux(tmp_path / "flux.safetensors").state_dict(), model.state_dict())
    tensors["img_in.bias"] = torch.zeros(64)
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(
        ValueError, match=r"img_in\.bias twice, as (model\S+ and as img\S+|img\S+ and as model)"
    ):
        load_flux(tmp_path / "flux.safetensors")


@pytest.mark.parametrize("max_shard_size", ["10GB", "200KB"])
def test_a_transformer_that_diffusers_wrote_comes_back_to_diffusers_to_the_bit(
    tmp_path, max_shard_size
):
    from diffusers import FluxTransformer2DModel

    theirs = randomise(
        FluxTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=20,
            pooled_projection_dim=12,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (tmp_path / "theirs" / INDEX).exists() == (max_shard_size == "200KB")
    model = load_flux(tmp_path / "theirs")
    assert same_bits(model.state_dict(), flux_from_diffusers(theirs.state_dict()))
    save_flux(model, tmp_path / "ours", max_shard_size=max_shard_size)
    assert (tmp_path / "ours" / INDEX).exists() == (max_shard_size == "200KB")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert same_bits(again.state_dict(), theirs.state_dict())


def test_an_autoencoder_that_diffusers_wrote_comes_back_to_diffusers_to_the_bit(tmp_path):
    from diffusers import AutoencoderKL

    theirs = randomise(AutoencoderKL.from_config(autoencoder_config_to_diffusers(TINY_AUTOENCODER)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_autoencoder(tmp_path / "theirs")
    assert model.config == TINY_AUTOENCODER
    assert same_bits(model.state_dict(), autoencoder_from_diffusers(theirs.state_dict()))
    save_autoencoder(model, tmp_path / "ours")
    again = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert same_bits(again.state_dict(), theirs.state_dict())
    assert again.config.scaling_factor == TINY_AUTOENCODER.scale_factor
    assert again.config.shift_factor == TINY_AUTOENCODER.shift_factor


def test_shards_keep_to_their_size_and_the_index_adds_up(tmp_path):
    model = tiny_flux()
    save_flux(model, tmp_path, max_shard_size=200_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 200_000
    total = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert total == sum(t.nbytes for t in model.state_dict().values())


def test_saving_again_in_one_piece_removes_the_old_shards(tmp_path):
    model = tiny_flux()
    save_flux(model, tmp_path, max_shard_size="200KB")
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another's")
    save_flux(model, tmp_path)
    others = ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    assert files_below(tmp_path) == [*others, WEIGHTS]
    assert same_bits(load_flux(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["flux", "autoencoder"])
def test_converting_there_and_back_is_the_identity(tmp_path, kind):
    if kind == "flux":
        save_flux(tiny_flux().to(torch.bfloat16), tmp_path / "a.safetensors", format="bfl")
    else:
        save_autoencoder(tiny_autoencoder(), tmp_path / "a.safetensors", format="bfl")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "b.safetensors", "bfl")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "folder" / "config.json").exists()


def test_dtype_is_what_is_stored_unless_one_is_asked_for(tmp_path):
    model = tiny_flux()
    save_flux(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    half = model.to(torch.bfloat16).state_dict()
    assert same_bits(load_flux(tmp_path).state_dict(), half)
    wide = load_flux(tmp_path, dtype=torch.float32).state_dict()
    assert same_bits(wide, {name: tensor.float() for name, tensor in half.items()})
    with pytest.raises(ValueError, match="dtype"):
        load_flux(tmp_path, dtype=torch.int8)


def test_parts_of_different_dtypes_are_joined_without_loss(tmp_path):
    save_flux(tiny_flux().to(torch.bfloat16), tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    name = "transformer_blocks.0.attn.to_k.bias"
    stored[name] = torch.full((64,), 1.0009765625)  # no bfloat16
    save_file(stored, tmp_path / WEIGHTS)
    model = load_flux(tmp_path)
    joined = model.state_dict()["double_blocks.0.img_attn.qkv.bias"]
    assert joined.dtype == torch.float32
    assert joined[64:128].equal(stored[name])


def test_a_bfl_file_that_would_lose_a_setting_is_not_written(tmp_path):
    model = AutoEncoder(AutoEncoderConfig(**{**vars(TINY_AUTOENCODER), "scale_factor": 0.5}))
    with pytest.raises(ValueError, match=r"scale_factor.*0\.3611.*0\.5"):
        save_autoencoder(model, tmp_path / "ae.safetensors", format="bfl")
    with pytest.raises(ValueError, match="theta"):
        save_flux(tiny_flux(theta=2000), tmp_path / "flux.safetensors", format="bfl")
    with pytest.raises(ValueError, match="theta"):
        save_flux(tiny_flux(theta=2000), tmp_path / "flux")
    assert files_below(tmp_path) == []


def test_bad_arguments_of_saving_are_named(tmp_path):
    model = tiny_flux()
    with pytest.raises(ValueError, match="format"):
        save_flux(model, tmp_path / "a", format="pickle")
    with pytest.raises(ValueError, match="max_shard_size"):
        save_flux(model, tmp_path / "a", max_shard_size="-1GB")
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_flux(model, tmp_path / "a.bin", format="bfl")
    with pytest.raises(ValueError, match="dtype"):
        save_flux(model, tmp_path / "a", dtype=torch.int8)
    assert files_below(tmp_path) == []


# files that are wrong


@pytest.fixture
def folder(tmp_path):
    save_flux(tiny_flux(), tmp_path / "flux")
    return tmp_path / "flux"


@pytest.fixture
def sharded(tmp_path):
    save_flux(tiny_flux(), tmp_path / "flux", max_shard_size="200KB")
    return tmp_path / "flux"


def refused(path: Path, message: str) -> str:
    with pytest.raises(ValueError, match=message) as error:
        load_flux(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_missing_unexpected_and_misshaped_tensors_are_named_in_one_error(folder, monkeypatch):
    def change(tensors):
        del tensors["x_embedder.bias"]
        tensors["surprise"] = torch.zeros(3, 4)
        tensors["proj_out.bias"] = torch.zeros(9)

    change_tensors(folder, change)
    monkeypatch.setattr(files, "fill", lambda *_: pytest.fail("memory was taken"))
    message = refused(folder, r"1 missing \(x_embedder\.bias \[64\]\)")
    assert "1 unexpected (surprise [3, 4])" in message
    assert "1 mis-shaped (proj_out.bias found [9] expected [8])" in message


def test_a_config_larger_than_the_weights_is_refused_without_taking_memory(folder):
    data = json.loads((folder / "config.json").read_text())
    data |= {"num_layers": 40, "attention_head_dim": 128, "num_attention_heads": 1000}
    data["axes_dims_rope"] = [16, 56, 56]
    (folder / "config.json").write_text(json.dumps(data))
    message = refused(folder, "missing")
    assert len(message) < 4000


def test_a_lora_is_refused_by_name(tmp_path):
    for name in (
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "double_blocks.0.img_attn.qkv.lora_up.weight",
    ):
        save_file({name: torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
        refused(tmp_path / "lora.safetensors", "LoRA")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("I8", "must have 1 scale, got 0"),
        ("U8", "no part of a quantised weight"),
        ("I64", "must be one of .*got I64"),
        ("F8_E8M0", "must be one of .*got F8_E8M0"),
    ],
)
def test_weights_in_no_known_format_are_refused(tmp_path, code, message):
    size = 8 * (8 if code == "I64" else 1)
    write_raw_safetensors(tmp_path / "q.safetensors", {"img_in.weight": (code, [2, 4], size)})
    refused(tmp_path / "q.safetensors", f"img_in.weight.*{message}")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth", ".pkl"])
def test_a_pickle_is_refused_by_its_name(tmp_path, suffix):
    torch.save({"a": torch.zeros(1)}, tmp_path / f"model{suffix}")
    refused(tmp_path / f"model{suffix}", "pickle")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_under_another_name_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "pickle")
    torch.save({"a": Bomb()}, path)
    refused(path, "pickle")
    assert files_below(tmp_path) == ["model.safetensors"]


def test_a_folder_that_holds_only_pickles_is_refused(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    refused(folder, "pickle")


def test_other_bytes_under_the_name_safetensors_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for data, message in (
        (b"", "0 bytes"),
        (b"\x00" * 100, "not a safetensors file"),
        (b"GGUF" + bytes(100), "little-endian GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ((10**15).to_bytes(8, "little") + b"{" + bytes(100), "damaged"),
        ((8).to_bytes(8, "little") + b"{[{[{[{[", "damaged"),
    ):
        path.write_bytes(data)
        refused(path, message)


def test_a_truncated_file_is_refused_by_name(folder):
    data = (folder / WEIGHTS).read_bytes()
    for length in (len(data) - 1, len(data) // 2, 100, 9):
        (folder / WEIGHTS).write_bytes(data[:length])
        refused(folder, f"{WEIGHTS} is damaged or cut short")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path, "config.json")
    refused(tmp_path / "nothing", "not a file")
    refused(tmp_path / "nothing.safetensors", "not a file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a file")
    save_autoencoder(tiny_autoencoder(), tmp_path / "ae.safetensors", format="bfl")
    refused(tmp_path / "ae.safetensors", "img_in.weight")
    save_autoencoder(tiny_autoencoder(), tmp_path / "ae")
    refused(tmp_path / "ae", "_class_name")
    save_flux(tiny_flux(), tmp_path / "flux")
    refused(tmp_path / "flux" / WEIGHTS, "holds no Flux: .*img_in.weight")


@pytest.mark.parametrize(
    "text",
    [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"1" * 10_000 + b"}", b""],
)
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text)
    refused(folder, r"config\.json: not (JSON|a JSON object)")


def test_a_json_file_that_is_too_large_is_not_parsed(sharded):
    with open(sharded / INDEX, "ab") as file:
        file.truncate(_files.JSON_LIMIT + 1)
    refused(sharded, "larger than")


def point_first_shard_to(sharded: Path, name: object) -> None:
    index = json.loads((sharded / INDEX).read_text())
    shard = min(set(index["weight_map"].values()))
    for key, file in index["weight_map"].items():
        if file == shard:
            index["weight_map"][key] = name
    (sharded / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", "a\\b", 7],
)
def test_an_index_that_names_no_plain_file_of_its_folder_is_refused(sharded, name):
    shutil.copy(min(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    point_first_shard_to(sharded, name)
    refused(sharded, "must be a .safetensors file beside it")


def test_an_index_whose_shards_hold_other_tensors_is_refused(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["x_embedder.ghost"] = shards[0]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, r"against the index: 1 missing \(x_embedder\.ghost\)")
    (sharded / shards[0]).unlink()
    refused(sharded, f"has no {shards[0]}")


def lead_out(file: Path, uid: int) -> None:
    """A file becomes a link to itself elsewhere, which belongs to somebody."""
    outside = file.parent.parent / f"outside-{file.name}"
    file.rename(outside)
    file.symlink_to(f"../{outside.name}")
    os.chown(outside, uid, -1)


def test_links_to_files_of_the_caller_or_of_the_links_owner_are_followed(sharded):
    for file in (min(sharded.glob("*.safetensors")), sharded / "config.json", sharded / INDEX):
        lead_out(file, os.geteuid())
    assert same_bits(load_flux(sharded).state_dict(), tiny_flux().state_dict())
    if os.geteuid() == 0:
        for link in filter(Path.is_symlink, sharded.iterdir()):
            os.chown(link, OTHER, -1, follow_symlinks=False)
            os.chown(link.resolve(), OTHER, -1)
        load_flux(sharded)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_a_link_to_a_file_of_another_user_is_refused(sharded, tmp_path):
    for file in (min(sharded.glob("*.safetensors")), sharded / "config.json", sharded / INDEX):
        lead_out(file, OTHER)
        refused(sharded, "leads out of its folder, to a file of another user")
        os.chown(file.resolve(), 0, -1)
    save_flux(tiny_flux(), tmp_path / "one")
    lead_out(tmp_path / "one" / WEIGHTS, OTHER)
    refused(tmp_path / "one", "leads out of its folder")
    with pytest.raises(ValueError, match="leads out of its folder"):
        weights_hash(tmp_path / "one")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "/", "fifo"])
def test_a_link_to_what_is_no_regular_file_is_refused(folder, name, target):
    os.mkfifo(folder / "fifo")
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    refused(folder, f"{name} is not a file")


def test_a_hash_of_weights_reads_no_devices(folder):
    (folder / "extra.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is not a file"):
        weights_hash(folder)


def make_hub_cache(root: Path, folder: Path) -> Path:
    repo = root / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = repo / "blobs" / f"{i:064x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_of_a_hub_snapshot_to_its_blobs_are_followed(tmp_path, sharded):
    snapshot = make_hub_cache(tmp_path / "cache", sharded.parent)
    loaded = load_flux(snapshot / "flux").state_dict()
    assert same_bits(loaded, tiny_flux().state_dict())
    if os.geteuid() == 0:  # a cache that another user shares
        for path in (tmp_path / "cache").rglob("*"):
            os.chown(path, OTHER, -1, follow_symlinks=False)
        load_flux(snapshot / "flux")


def test_one_file_and_an_index_side_by_side_are_refused(sharded):
    shutil.copy(min(sharded.glob("*.safetensors")), sharded / WEIGHTS)
    refused(sharded, "holds both")


def test_a_nan_or_an_infinity_is_warned_of_by_name(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_flux(folder)

    def change(tensors):
        tensors["proj_out.weight"][3, 5] = float("nan")
        tensors["transformer_blocks.1.attn.to_k.bias"][0] = float("-inf")

    change_tensors(folder, change)
    with pytest.warns(UserWarning, match=r"qkv\.bias.*final_layer\.linear\.weight") as caught:
        load_flux(folder)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# nothing is left behind


@pytest.mark.parametrize("format", ["diffusers", "bfl"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, format):
    written = []

    def full(path, tensors, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        _files.write_tensors(path, tensors, metadata)
        if format == "bfl":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    name = "new/flux" if format == "diffusers" else "new/flux.safetensors"
    with pytest.raises(OSError, match="No space"):
        save_flux(tiny_flux(), tmp_path / name, format=format, max_shard_size="200KB")
    assert written
    assert files_below(tmp_path) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_a_write_that_the_system_cuts_short_leaves_the_old_checkpoint(folder):
    import resource

    before = {name: (folder / name).read_bytes() for name in files_below(folder)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            save_flux(tiny_flux(depth=1), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (folder / name).read_bytes() for name in files_below(folder)} == before


# memory

PEAKS = """
import json, os, sys
from pathlib import Path
import torch
from fluxkern.checkpoint import load_flux

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def peak(path, dtype):
    load_flux(sys.argv[1], int8=dtype == "int8")  # brings the code in
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    int8 = dtype == "int8"
    model = load_flux(path, dtype=torch.bfloat16 if int8 else getattr(torch, dtype), int8=int8)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    print(memory("VmHWM") - before, weights, flush=True)

for path, dtype in json.loads(sys.argv[2]):
    child = os.fork()  # a fresh one for each: memory that was freed would hide what is taken
    if not child:
        peak(path, dtype)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_no_more_than_the_weights_and_the_largest_tensor(tmp_path):
    sizes = {"hidden_size": 512, "num_heads": 8, "depth": 1}
    model = Flux(FluxConfig(**{**vars(TINY_FLUX), **sizes}))
    save_flux(tiny_flux(), tmp_path / "tiny")
    save_flux(model, tmp_path / "flux")
    save_flux(model, tmp_path / "flux.safetensors", format="bfl")
    loads = [
        (str(tmp_path / name), dtype)
        for name in ("flux", "flux.safetensors")
        for dtype in ("float32", "bfloat16", "int8")
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path / "tiny"), json.dumps(loads)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    largest = 7 * 512 * 512 * 4  # linear1
    peaks = [map(int, line.split()) for line in done.stdout.splitlines()]
    for (_, dtype), (peak, weights) in zip(loads, peaks, strict=True):
        assert weights > {"float32": 72, "bfloat16": 36, "int8": 18}[dtype] * 2**20
        assert weights * 0.9 < peak <= weights + largest + 8 * 2**20
    shutil.rmtree(tmp_path)  # 150 MB


# where a checkpoint is


def test_the_hash_changes_with_one_bit_and_with_a_name(folder, tmp_path):
    first = weights_hash(folder)
    assert first == weights_hash(folder)
    assert len(first) == 16
    alone = weights_hash(folder / WEIGHTS)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    assert len({first, alone, weights_hash(folder), weights_hash(folder / WEIGHTS)}) == 4
    changed = weights_hash(folder)
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert weights_hash(folder) != changed
    with pytest.raises(ValueError, match="no .safetensors"):
        weights_hash(tmp_path)


def test_the_hash_of_a_pipeline_covers_its_components(folder):
    root = folder.parent
    (root / "model_index.json").write_text("{}")
    first = weights_hash(root)
    save_autoencoder(tiny_autoencoder(), root / "vae")
    assert weights_hash(root) != first


def test_what_exists_here_is_a_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/flux"
    assert resolve(name) == Path(name)
    assert resolve(folder) == folder


@pytest.mark.parametrize(
    "name",
    ["nothing", "./a/b", "/a/b", "a/..", "../a", "a b/c", "https://example.org/a", "", "a/b\n"],
)
def test_what_is_neither_a_path_nor_an_id_is_refused(name):
    if name == "":
        name = "?"
    with pytest.raises(ValueError, match="neither a file or folder"):
        resolve(name)


def test_only_harmless_kinds_of_files_are_fetched():
    with pytest.raises(ValueError, match=r"\*\.bin"):
        resolve("org/name", allow_patterns=["*.json", "*.bin"])
    with pytest.raises(ValueError, match=r"run\.py"):
        resolve("org/name/run.py")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub's cache, as under HF_HUB_OFFLINE=1 and HF_HUB_CACHE; a connection is a failure."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    return tmp_path / "cache"


def test_an_id_is_found_in_the_hubs_cache_without_a_network(folder, offline):
    snapshot = make_hub_cache(offline, folder.parent)
    assert resolve("org/name") == resolve("org/name", "main") == snapshot
    assert resolve(f"org/name/flux/{WEIGHTS}") == snapshot / "flux" / WEIGHTS
    for lost in (["org/other"], ["org/name", "another-branch"], ["org/name/x.safetensors"]):
        with pytest.raises(ValueError, match=f"^{lost[0]} is not here"):
            resolve(*lost)
