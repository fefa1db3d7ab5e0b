"""Each op with kernels of ours, in each dtype and direction, by each provider."""

from collections.abc import Callable
from functools import partial

import pytest

from fluxkern import bench
from fluxkern.cases import CASES

from .ops import OPS
from .runs import default_device

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
def test_op(op: str, dtype: str, direction: str, provider: str, shape: str, compare: Callable):
    case = (op, shape, dtype, direction, default_device())
    compare(" ".join(case[:-1]), provider, partial(bench.measure, *case), bench.ROUNDS)
