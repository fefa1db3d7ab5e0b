"""The autoencoder both ways and the text encoders, by diffusers and by us."""

from collections.abc import Callable, Iterator

import pytest

from .parts import TEXT, VAE, Part, of_shape
from .runs import default_device
from .whole import BASELINE, OURS


@pytest.fixture(scope="module")
def parts(shape: str) -> Iterator[dict[str, Part]]:
    yield {part.what: part for part in of_shape(shape, default_device())}


@pytest.mark.parametrize("provider", (BASELINE, OURS))
@pytest.mark.parametrize("what", (*VAE, TEXT))
def test_part(parts: dict[str, Part], shape: str, what: str, provider: str, compare: Callable):
    if what not in parts:
        pytest.skip("FLUX.1's are transformers' own modules in both: none of our ops is in them")
    compare(f"{what} {shape}", provider, parts[what].measure)
