"""A step of the transformer, its gradients and a picture, random weights of each shape's model."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from . import whole
from .runs import default_device
from .step import WHOLES, Model, of_shape


@pytest.fixture(scope="module", params=("fp32", "bf16"))
def model(request: pytest.FixtureRequest, shape: str) -> Iterator[Model]:
    config, pixels, batch = of_shape(shape)
    if config != "compact" and default_device() == "cpu":
        pytest.skip("12 billion weights take a GPU; test_blocks.py has a block of each kind")
    if config != "compact" and request.param == "fp32":
        pytest.skip("a step of FLUX.1 is timed in bf16")
    yield Model(config, pixels, request.param, default_device(), batch)


@pytest.mark.parametrize(
    "provider", (whole.BASELINE, whole.COMPILED, whole.EAGER, whole.OURS, whole.INT8)
)
@pytest.mark.parametrize("what", WHOLES)
def test_step(model: Model, shape: str, what: str, provider: str, compare: Callable):
    if what == "gradients" and model.name != "compact":
        pytest.skip("what 57 blocks keep for a backward takes more than the memory of a GPU")
    group = f"{WHOLES[what]} {model.dtype_name} {shape}"
    compare(group, provider, partial(model.measure, what))
