"""Teach the compact model one drawing style with a LoRA, through diffusers and peft.

    python examples/train_lora.py --steps 50            # on fluxkern's ops
    python examples/train_lora.py --steps 50 --original # diffusers' own code, for comparison

Prints a JSON line with the loss of every step, seconds and peak memory. Needs diffusers and peft.
"""

import argparse
import json
import logging
import resource
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

import fluxkern
from fluxkern import compact
from fluxkern.compact.drawings import caption, draw, random_scene

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]


def examples(pipe: FluxPipeline, count: int, rng: np.random.Generator) -> list[tuple[Tensor, ...]]:
    """(latents, prompt, pooled prompt) of drawings with their colours inverted."""
    found = []
    for _ in range(count):
        scene = random_scene(rng)
        pixels = torch.from_numpy(255 - draw(scene, rng)).float().permute(2, 0, 1)[None]
        latents = pipe.vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        packed = pipe._pack_latents(latents, 1, *latents.shape[1:])
        prompt, pooled, _ = pipe.encode_prompt(caption(scene, rng), None, max_sequence_length=32)
        found.append((packed, prompt, pooled))
    return found


def ids(length: int) -> Tensor:
    side = int(length**0.5)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack((torch.zeros(side, side), rows, columns), -1).view(-1, 3).float()


def train(
    pipe: FluxPipeline, data: list[tuple[Tensor, ...]], steps: int, batch: int
) -> list[float]:
    """Flow matching: the velocity from picture to noise, at a random point of the path."""
    generator = torch.Generator().manual_seed(1)
    weights = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-3)
    losses = []
    for step in range(steps):
        rows = [data[(step * batch + n) % len(data)] for n in range(batch)]
        latents, prompt, pooled = (torch.cat(parts) for parts in zip(*rows, strict=True))
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.rand(batch, generator=generator)
        velocity = pipe.transformer(
            hidden_states=torch.lerp(latents, noise, t[:, None, None]),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=t,
            img_ids=ids(latents.shape[1]),
            txt_ids=torch.zeros(prompt.shape[1], 3),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--original", action="store_true", help="without fluxkern's ops")
    parser.add_argument("--output", type=Path, help="folder for the adapter")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    folder = Path(compact.__file__).parent / "weights"
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    torch.manual_seed(0)
    with torch.no_grad():
        data = examples(pipe, 64, np.random.default_rng(0))
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    if not args.original:
        fluxkern.accelerate(pipe, strict=True)
    start = time.perf_counter()
    losses = train(pipe, data, args.steps, args.batch)
    seconds = time.perf_counter() - start
    if args.output:
        pipe.transformer.save_lora_adapter(args.output)
        fluxkern.FluxPipeline.from_pretrained(folder).load_lora(args.output)  # reads every key
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"losses": losses, "seconds": seconds, "peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
