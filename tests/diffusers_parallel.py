"""Two processes that run a FLUX transformer with its sequence or its weights split between them."""

import json
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.hooks.tensor_parallel import _resolve_tp_plan, _styles
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers_models import distance, inputs, run, tiny_transformer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import fluxkern

Split = Callable[[FluxTransformer2DModel], None]


def split_sequence(model: FluxTransformer2DModel, **degrees: int) -> None:
    """What enable_parallelism does, which asks for an accelerator."""
    config = ContextParallelConfig(**degrees)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    both = ParallelConfig(context_parallel_config=config)
    both.setup(dist.get_rank(), 2, torch.device("cpu"), mesh=mesh)
    for processor in model.attn_processors.values():
        processor._parallel_config = both
    apply_context_parallel(model, config, model._cp_plan)


def split_weights(model: FluxTransformer2DModel) -> None:
    """Likewise, with diffusers' plan for its Linears."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for block, plan in _resolve_tp_plan(model, model._tp_plan):
        parallelize_module(block, mesh, _styles(plan))
    assert model.transformer_blocks[0].attn.to_q.weight.to_local().shape == (16, 32)


def shard(model: FluxTransformer2DModel) -> None:
    """FSDP2, block by block."""
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


SPLITS: dict[str, Split] = {
    "ulysses": partial(split_sequence, ulysses_degree=2),
    "ring": partial(split_sequence, ring_degree=2),
    "tensor parallel": split_weights,
}


def drawn() -> tuple[FluxTransformer2DModel, dict[str, Tensor]]:
    """The same in both processes."""
    torch.manual_seed(0)
    model = tiny_transformer()
    return model, inputs(model, 2, 4, 6)


def output(split: Split, order: str) -> float:
    model, given = drawn()
    expected = run(model, given)
    if order == "before":
        fluxkern.accelerate(model, strict=True)
    split(model)
    if order == "after":
        fluxkern.accelerate(model, strict=True)
    found = run(model, given)
    assert not any(site.reason for site in fluxkern.explain(model))
    return distance(found, expected)


def all_gradients(model: FluxTransformer2DModel, given: dict) -> list[Tensor]:
    out = model(**given, return_dict=False)[0]
    wave = torch.arange(out.numel()).sin().view(out.shape)
    return list(torch.autograd.grad((out * wave).sum(), list(model.parameters())))


def gradients(split: Split) -> float:
    """Each process has the part of its tokens."""
    model, given = drawn()
    expected = all_gradients(model, given)
    split(model)
    found = all_gradients(fluxkern.accelerate(model, strict=True), given)
    assert not any(site.reason for site in fluxkern.explain(model))
    for gradient in found:
        dist.all_reduce(gradient)
    largest = max(gradient.abs().max() for gradient in expected)
    off = [(f - e).abs().max() for f, e in zip(found, expected, strict=True)]
    return (max(off) / largest).item()


def sharded(order: str) -> float:
    model, given = drawn()
    expected = run(model, given)
    if order == "before":
        shard(fluxkern.accelerate(model, strict=True))
    else:
        shard(model)
        fluxkern.accelerate(model)
    found = run(model, given)
    original = {s.kind for s in fluxkern.explain(model) if s.runs == "original"}
    assert original == (set() if order == "before" else {"gate", "norm"})
    return distance(found, expected)


def reason(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def accelerated_after_sharding() -> str:
    model, _ = drawn()
    shard(model)
    return reason(lambda: fluxkern.accelerate(model, strict=True))


def restored_after_sharding() -> str:
    model, _ = drawn()
    shard(fluxkern.accelerate(model, strict=True))
    return reason(lambda: fluxkern.restore(model))


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=limit)
    found: dict[str, float | str] = {
        f"{name}, {order}": output(split, order)
        for name, split in SPLITS.items()
        for order in ("before", "after")
    }
    found |= {f"gradients, {name}": gradients(SPLITS[name]) for name in ("ulysses", "ring")}
    found |= {f"sharded, {order}": sharded(order) for order in ("before", "after")}
    found |= {
        "sharded first": accelerated_after_sharding(),
        "restored": restored_after_sharding(),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
