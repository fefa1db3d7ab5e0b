"""One of two processes that run a FLUX transformer with its sequence split between them."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers_models import distance, inputs, run, tiny_transformer
from torch.distributed.device_mesh import init_device_mesh

import fluxkern


def split(model: torch.nn.Module, config: ContextParallelConfig, rank: int) -> None:
    """What enable_parallelism does, which asks for an accelerator."""
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    both = ParallelConfig(context_parallel_config=config)
    both.setup(rank, 2, torch.device("cpu"), mesh=mesh)
    for processor in model.attn_processors.values():
        processor._parallel_config = both
    apply_context_parallel(model, both.context_parallel_config, model._cp_plan)


def main(rank: int, folder: str, degrees: dict, order: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=limit)
    torch.manual_seed(0)
    model = tiny_transformer()
    given = inputs(model, 2, 4, 6)
    expected = run(model, given)
    if order == "before":
        fluxkern.accelerate(model, strict=True)
    split(model, ContextParallelConfig(**degrees), rank)
    fluxkern.accelerate(model, strict=True)
    found = run(model, given)
    assert not any(site.reason for site in fluxkern.explain(model))
    Path(folder, str(rank)).write_text(str(distance(found, expected)))
    dist.destroy_process_group()
