"""Each FLUX pipeline of diffusers from tiny random components: accelerated against original."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxPriorReduxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from diffusers_models import distance, fused, inputs, run, tiny_transformer
from PIL import Image
from tiny_flux import SCHEDULE, tiny_vae, write_tiny_flux
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import fluxkern
from fluxkern import compact

SIZE = {"height": 32, "width": 32}
EDIT = {"image", "strength"}
PIPELINES = {  # pipeline -> channels of a packed token of its transformer, its inputs
    FluxPipeline: (64, set()),
    FluxImg2ImgPipeline: (64, EDIT),
    FluxInpaintPipeline: (64, {*EDIT, "mask_image"}),
    FluxFillPipeline: (384, {"image", "mask_image"}),
    FluxControlPipeline: (128, {"control_image"}),
    FluxControlImg2ImgPipeline: (128, {*EDIT, "control_image"}),
    FluxControlInpaintPipeline: (128, {*EDIT, "control_image", "mask_image"}),
    FluxControlNetPipeline: (64, {"control_image"}),
    FluxControlNetImg2ImgPipeline: (64, {*EDIT, "control_image"}),
    FluxControlNetInpaintPipeline: (64, {*EDIT, "control_image", "mask_image"}),
    FluxKontextPipeline: (64, {"image"}),
    FluxKontextInpaintPipeline: (64, {*EDIT, "mask_image"}),
}


def tiny_controlnet() -> FluxControlNetModel:
    net = FluxControlNetModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    ).eval()
    for module in (*net.controlnet_blocks, *net.controlnet_single_blocks):
        nn.init.normal_(module.weight, std=0.3)
    return net


def build(pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    channels, _ = PIPELINES[pipeline]
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        "vae": tiny_vae(),
        "transformer": tiny_transformer(
            in_channels=channels, out_channels=64, guidance_embeds=True
        ),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    }
    if "ControlNet" in pipeline.__name__:
        parts["controlnet"] = tiny_controlnet()
    pipe = pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: DiffusionPipeline, dtype: torch.dtype = torch.float32, **more: object
) -> torch.Tensor:
    """The latents of a run."""
    _, takes = PIPELINES[type(pipe)]
    torch.manual_seed(2)
    picture = torch.rand(1, 3, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    offered = {
        "image": picture,
        "control_image": picture,
        "mask_image": mask,
        "strength": 0.75,
    }
    kwargs = {name: offered[name] for name in takes}
    if "Kontext" in type(pipe).__name__:
        kwargs |= {"_auto_resize": False, "max_area": 32 * 32}
    return pipe(
        prompt_embeds=torch.randn(1, 6, 24).to(dtype),
        pooled_prompt_embeds=torch.randn(1, 20).to(dtype),
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        **SIZE,
        **kwargs,
        **more,
    ).images


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.__name__)
def test_accelerated_and_original_give_the_same_latents(pipeline: type[DiffusionPipeline]):
    pipe = build(pipeline)
    expected = call(pipe)
    assert fluxkern.accelerate(pipe, strict=True) is pipe
    assert distance(call(pipe), expected) < 1e-5
    sites = fluxkern.explain(pipe)
    assert len(sites) == len(fused(sites)) == 1 + 22 + 8 + 15 * hasattr(pipe, "controlnet")
    fluxkern.restore(pipe)
    assert torch.equal(call(pipe), expected)


def test_the_prior_of_redux_has_no_block_and_its_embeddings_are_taken():
    siglip = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    prior = FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel(siglip).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        image_embedder=ReduxImageEncoder(16, 4096),  # widths that the prior has written down
    )
    with pytest.raises(ValueError, match="nothing to accelerate in FluxPriorReduxPipeline"):
        fluxkern.accelerate(prior)
    pipe = build(FluxPipeline)
    pipe.transformer = tiny_transformer(
        in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768
    )
    embeds = prior(Image.new("RGB", (32, 32), "red"))

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        settings = {"num_inference_steps": 2, "generator": generator, "output_type": "latent"}
        return pipe(**embeds, **SIZE, **settings).images

    expected = draw()
    fluxkern.accelerate(pipe, strict=True)
    assert distance(draw(), expected) < 1e-5


def test_prompts_true_cfg_and_a_saved_pipeline(tmp_path: Path):
    pipe = write_tiny_flux(tmp_path, guidance=True)
    asked = {"prompt": "a red ring", "negative_prompt": "a star", "true_cfg_scale": 2.0, **SIZE}

    def draw(pipe: FluxPipeline) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        out = pipe(**asked, num_inference_steps=3, generator=generator, output_type="np")
        return out.images

    expected = draw(pipe)
    assert np.abs(draw(fluxkern.accelerate(pipe, strict=True)) - expected).max() < 1e-4
    pipe.save_pretrained(tmp_path / "saved")
    assert "fluxkern" not in (tmp_path / "saved" / "model_index.json").read_text()
    loaded = FluxPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded), expected)


def test_a_lora_file_loads_scales_fuses_and_unloads(tmp_path: Path):
    peft = pytest.importorskip("peft")
    pipe = build(FluxPipeline)
    donor = copy.deepcopy(pipe.transformer)
    names = ["to_q", "to_out.0", "add_k_proj", "proj_mlp", "norm.linear"]
    donor.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)
    )
    layers = peft.get_peft_model_state_dict(donor)
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    load = {"adapter_name": "style", "use_safetensors": True, "local_files_only": True}
    original = copy.deepcopy(pipe)
    original.load_lora_weights(tmp_path, **load)
    fluxkern.accelerate(pipe, strict=True)
    plain = call(pipe)
    pipe.load_lora_weights(tmp_path, **load)
    for scale in (1.0, 0.3):
        for each in (pipe, original):
            each.set_adapters("style", scale)
        styled = call(pipe)
        assert distance(styled, call(original)) < 1e-5 < 1e-3 < distance(styled, plain)
    pipe.load_lora_weights(tmp_path, **load, hotswap=True)
    pipe.unload_lora_weights()
    assert torch.equal(call(pipe), plain)
    pipe.load_lora_weights(tmp_path, **load)
    whole = call(pipe)
    pipe.fuse_lora()
    assert distance(call(pipe), whole) < 1e-5
    assert not any(site.reason for site in fluxkern.explain(pipe))


# one device stands in for two: hooks run as with an accelerator, and weights wait on meta


def sequential_offload(pipe: DiffusionPipeline) -> None:
    """enable_sequential_cpu_offload, which refuses a machine without an accelerator."""
    accelerate = pytest.importorskip("accelerate")
    for module in filter(lambda part: isinstance(part, nn.Module), pipe.components.values()):
        accelerate.cpu_offload(module, "cpu", offload_buffers=True)


def model_offload(pipe: DiffusionPipeline) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe: DiffusionPipeline) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload", [model_offload, sequential_offload, group_offload])
def test_an_offloaded_pipeline(offload: Callable, order: str):
    pipe = build(FluxPipeline)
    expected = call(pipe)
    if order == "before":
        fluxkern.accelerate(pipe)
    offload(pipe)
    fluxkern.accelerate(pipe)
    assert distance(call(pipe), expected) < 1e-5
    sites = fluxkern.explain(pipe)
    without_weights = set() if offload is model_offload else {"a RMSNorm has a hook"}
    assert {site.reason for site in sites} - {None} == without_weights
    assert {site.kind for site in sites if site.reason} <= {"attention"}


def test_streams_are_refused_where_there_are_none():
    pipe = fluxkern.accelerate(build(FluxPipeline))
    expected = call(pipe)
    with pytest.raises(ValueError, match="[Ss]tream"):
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", use_stream=True)
    assert torch.equal(call(pipe), expected)


def test_a_single_file_is_loaded_and_accelerated(tmp_path: Path):
    model = tiny_transformer()
    given = inputs(model)
    expected = run(model, given)
    model.save_config(tmp_path)
    file = tmp_path / "one.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    loaded = FluxTransformer2DModel.from_single_file(str(file), config=str(tmp_path)).eval()
    assert distance(run(fluxkern.accelerate(loaded, strict=True), given), expected) < 1e-5


def write_ip_adapter(folder: Path, pipe: FluxPipeline) -> None:
    """Random weights of an adapter, and its image encoder."""
    config = pipe.transformer.config
    width, hidden = config.joint_attention_dim, pipe.transformer.inner_dim
    encoder = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder")
    sizes = {
        "image_proj.proj.weight": (4 * width, 12),
        "image_proj.proj.bias": (4 * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    for n in range(config.num_layers):
        for name in ("to_k_ip", "to_v_ip"):
            sizes[f"ip_adapter.{n}.{name}.weight"] = (hidden, width)
            sizes[f"ip_adapter.{n}.{name}.bias"] = (hidden,)
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    safetensors.torch.save_file(weights, folder / "adapter.safetensors")


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_ip_adapter_loads_scales_and_unloads(tmp_path: Path, order: str):
    pipe = build(FluxPipeline)
    write_ip_adapter(tmp_path, pipe)
    picture = {"ip_adapter_image": Image.new("RGB", (32, 32), "red")}
    load = {
        "weight_name": "adapter.safetensors",
        "image_encoder_pretrained_model_name_or_path": str(tmp_path / "image_encoder"),
        "local_files_only": True,
    }
    original = copy.deepcopy(pipe)
    original.load_ip_adapter(str(tmp_path), **load)
    if order == "before":
        fluxkern.accelerate(pipe)
        plain = call(pipe)
    pipe.load_ip_adapter(str(tmp_path), **load)
    fluxkern.accelerate(pipe)
    pictures = []
    for scale in (1.0, 0.2):
        for each in (pipe, original):
            each.set_ip_adapter_scale(scale)
        pictures.append(call(pipe, **picture))
        assert distance(pictures[-1], call(original, **picture)) < 1e-5
    assert distance(*pictures) > 1e-3
    reasons = {site.reason for site in fluxkern.explain(pipe) if site.reason}
    assert reasons == {
        "the attention processor is FluxIPAdapterAttnProcessor",
        "in the last call joint_attention_kwargs hold ip_hidden_states",
    }
    pipe.unload_ip_adapter()
    found = call(pipe)
    assert not any(site.reason for site in fluxkern.explain(pipe))
    assert order == "after" or torch.equal(found, plain)


def test_a_pipeline_made_of_another_shares_what_is_accelerated():
    pipe = fluxkern.accelerate(build(FluxPipeline), strict=True)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert len(fused(fluxkern.explain(other))) == len(fluxkern.explain(pipe))
    fluxkern.restore(other)
    assert not fused(fluxkern.explain(pipe))


def test_the_compact_pipeline_draws_the_same_picture():
    folder = Path(compact.__file__).parent / "weights"
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(7)
        asked = {"true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 32}
        out = pipe(
            "a red circle on a blue background",
            height=64,
            width=64,
            num_inference_steps=8,
            generator=generator,
            **asked,
        )
        return np.asarray(out.images[0]).astype(int)

    expected = draw()
    fluxkern.accelerate(pipe, strict=True)
    found = draw()
    assert np.abs(found - expected).max() <= 1 and expected.std() > 10


def test_a_modular_pipeline_draws_the_same_latents():
    from diffusers.modular_pipelines.flux import FluxAutoBlocks

    folder = Path(compact.__file__).parent / "weights"
    whole = FluxPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{n: c for n, c in whole.components.items() if n in pipe.components})
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        asked = {"num_inference_steps": 2, "output_type": "latent", "output": "images"}
        generator = torch.Generator().manual_seed(7)
        return pipe(prompt="a red circle", height=64, width=64, generator=generator, **asked)

    expected = draw()
    assert fluxkern.accelerate(pipe, strict=True) is pipe
    assert {site.name.partition(".")[0] for site in fluxkern.explain(pipe)} == {"transformer"}
    assert torch.allclose(draw(), expected, rtol=1e-4, atol=1e-4)
    assert not fused(fluxkern.explain(fluxkern.restore(pipe)))
    assert torch.equal(draw(), expected)


def test_bf16_latents_are_as_near_to_fp32_as_the_originals(seed: int):
    ours, theirs = 0.0, 0.0
    for n in range(8):
        torch.manual_seed(seed + n)
        pipe = build(FluxPipeline)
        exact = call(pipe)
        pipe.transformer.to(torch.bfloat16)
        theirs += (call(pipe, torch.bfloat16).float() - exact).square().mean().sqrt().item()
        fluxkern.accelerate(pipe, strict=True)
        ours += (call(pipe, torch.bfloat16).float() - exact).square().mean().sqrt().item()
    assert ours <= 1.05 * theirs
