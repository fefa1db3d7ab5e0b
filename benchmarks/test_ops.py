"""Each op with kernels of ours, in each dtype and direction, by each provider."""

from collections.abc import Callable

import pytest
import torch

from fluxkern import bench
from fluxkern.cases import CASES

from .ops import OPS

RUNS = [
    (op, dtype, direction, provider)
    for dtype in ("bf16", "fp32")
    for op in OPS
    for direction in ("forward", "forward + backward")
    if direction == "forward" or CASES[op].moved_backward is not None
    for provider in ("copy", *bench.BASELINES, *CASES[op].backends)
]


def test_the_suite_holds_every_op_with_kernels():
    assert {run[0] for run in RUNS} == {op for op, case in CASES.items() if case.backends}


@pytest.mark.parametrize("op, dtype, direction, provider", RUNS)
def test_op(
    op: str,
    dtype: str,
    direction: str,
    provider: str,
    shape: str,
    comparison: Callable,
    replayed: Callable,
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = comparison(bench.measure, (op, shape, dtype, direction, device), bench.ROUNDS)
    replayed(found, provider, f"{op} {direction} {dtype}")
