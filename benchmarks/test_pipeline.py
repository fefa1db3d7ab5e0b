"""The compact model: its loop and a whole picture, by diffusers and by us."""

from collections.abc import Callable
from functools import partial

import pytest

from . import whole
from .pipeline import WHOLES, Pipelines


@pytest.fixture(scope="module")
def pipelines() -> Pipelines:
    return Pipelines()


@pytest.mark.parametrize("provider", (whole.BASELINE, whole.COMPILED, whole.OURS))
@pytest.mark.parametrize("what", WHOLES)
def test_pipeline(pipelines: Pipelines, what: str, provider: str, compare: Callable):
    compare(what, provider, partial(pipelines.measure, what))


def test_the_picture_is_that_of_diffusers(pipelines: Pipelines):
    assert pipelines.levels()["largest"] <= 2
