"""A random FLUX.1 small enough for tests, built and written by diffusers and transformers."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from fluxkern.compact.text import build_tokenizers

SCHEDULE = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def tiny_text(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast]:
    from transformers import CLIPTextConfig, T5Config

    clip_tokenizer, t5_tokenizer = build_tokenizers(folder)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip.eval(), clip_tokenizer, t5.eval(), t5_tokenizer


def tiny_transformer(guidance: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def write_tiny_flux(folder: Path, *, guidance: bool, seed: int = 0) -> FluxPipeline:
    """Write a diffusers folder of random weights and return what diffusers loads from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, clip_tokenizer, t5, t5_tokenizer = tiny_text(folder / "build")
        pipeline = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(**SCHEDULE),
            tiny_vae(),
            clip,
            clip_tokenizer,
            t5,
            t5_tokenizer,
            tiny_transformer(guidance),
        )
        for module in (pipeline.transformer, pipeline.vae, clip, t5):
            for parameter in module.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder / "flux")
    loaded = FluxPipeline.from_pretrained(folder / "flux", local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded
