"""A double and a single block of the shape, by diffusers and by us."""

from collections.abc import Callable, Iterator

import pytest

from fluxkern.cases import SHAPES

from . import whole
from .blocks import DTYPES, KINDS, Pair


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield Pair(request.param, SHAPES[request.config.option.shape])


RUNS = [(d, p) for d in DTYPES for p in (whole.BASELINE, whole.COMPILED, whole.OURS)]


@pytest.mark.parametrize("dtype, provider", [*RUNS, ("fp32", whole.INT8)])
def test_block(pair: Pair, dtype: str, provider: str, comparison: Callable, replayed: Callable):
    found = comparison(pair.measure, (dtype,), whole.ROUNDS)
    replayed(found, provider, f"{pair.kind} block {dtype}")
