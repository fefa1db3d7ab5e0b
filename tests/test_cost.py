"""FLOPs and bytes of operators: from the Cases, of a whole step, against torch's own count."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step
from fluxkern import bench, checkpoint, ops
from fluxkern.cases import CASES, SHAPES, Maker
from fluxkern.model.transformer import CONFIGS

DEV = CONFIGS["dev"]


@pytest.fixture(scope="module")
def dev_step() -> bench.Counted:
    return step.meta_step(DEV, 1024)


def test_a_step_of_flux_has_the_published_flops(dev_step: bench.Counted):
    """74.4 TFLOP; cache-dit's table has 3726.87 for 50 steps."""
    assert dev_step.flops / 1e12 == pytest.approx(74.4, abs=0.05)
    assert dev_step.flops / 1e12 == pytest.approx(3726.87 / 50, rel=3e-3)


def test_torch_counts_the_same_flops_in_diffusers(dev_step: bench.Counted):
    with torch.device("meta"):
        config = checkpoint.flux_config_to_diffusers(DEV)
        theirs = FluxTransformer2DModel.from_config(config)
        given = step.inputs(DEV, (1024, 1024), torch.float32, "meta")
    names = {
        "img": "hidden_states",
        "txt": "encoder_hidden_states",
        "y": "pooled_projections",
        "timesteps": "timestep",
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(**{names.get(name, name): value for name, value in given.items()})
    assert counter.get_total_flops() == dev_step.flops


def test_a_step_moves_its_weights_and_the_streams_between_its_ops(dev_step: bench.Counted):
    weights = 2 * 11.9e9
    assert weights < step.least_bytes(dev_step) < dev_step.bytes < 3 * weights


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if not op.endswith("_")])
def test_the_bytes_of_an_op_are_those_of_its_case(op: str):
    """But for vectors, tables and weights of a head, which a Case leaves out."""
    args = CASES[op].inputs(Maker(SHAPES["flux-512"], torch.float32, "meta"))
    costs = bench.counted(partial(getattr(ops, op), **args)).costs
    found = sum(cost.bytes for cost in costs if cost.op == f"fluxkern::{op}")
    size, flops = bench.unavoidable(CASES[op], SHAPES["flux-512"], torch.float32, "forward")
    if "fp8" not in op:
        assert found == pytest.approx(size, rel=0.06)
    assert sum(cost.flops for cost in costs) == flops


def test_the_attention_of_a_cpu_has_its_flops():
    q, k = torch.ones(1, 2, 8, 16), torch.ones(1, 2, 12, 16)
    costs = bench.counted(lambda: F.scaled_dot_product_attention(q, k, k)).costs
    assert [cost.op for cost in costs] == ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert costs[0].flops == 2 * 2 * (2 * 8 * 12 * 16)


def test_views_move_nothing_and_what_is_written_over_is_read_and_written():
    x = torch.ones(4, 8)
    moved = {
        "view": (lambda: x.view(8, 4).unsqueeze(0), 0),
        "empty": (lambda: torch.empty(1000), 0),
        "copy": (lambda: x.copy_(x + 0), 128 * 2 + 128 * 2),
        "in place": (lambda: x.mul_(2), 128 * 2),
        "expanded": (lambda: x[:1].expand(4, 8) + x, 32 + 128 + 128),
    }
    for name, (call, size) in moved.items():
        assert bench.counted(call).bytes == size, name
    linear = bench.counted(lambda: F.linear(x, torch.ones(3, 8)))
    assert linear.flops == 2 * 4 * 8 * 3
