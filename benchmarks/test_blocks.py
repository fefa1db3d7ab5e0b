"""A double and a single block of each shape, by diffusers and by us."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from fluxkern.cases import SHAPES

from . import whole
from .blocks import DIRECTIONS, DTYPES, KINDS, Pair
from .runs import default_device


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, shape: str) -> Iterator[Pair]:
    yield Pair(request.param, SHAPES[shape], default_device())


PROVIDERS = (whole.BASELINE, whole.COMPILED, whole.OURS)
RUNS = [(dtype, way, by) for way in DIRECTIONS for dtype in DTYPES for by in PROVIDERS]


@pytest.mark.parametrize("dtype, direction, provider", [*RUNS, ("fp32", "forward", whole.INT8)])
def test_block(
    pair: Pair, shape: str, dtype: str, direction: str, provider: str, compare: Callable
):
    measure = partial(pair.measure, dtype, direction)
    compare(f"{pair.what(direction)} {dtype} {shape}", provider, measure)
