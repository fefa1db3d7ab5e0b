"""The benchmarks of the drop-in, on a small scale."""

import pytest

from benchmarks import diffusers_accuracy, diffusers_loop, whole

PIPELINES = diffusers_accuracy.PIPELINES


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.__name__)
def test_bf16_of_a_pipeline_is_as_near_to_fp32_as_the_originals(pipeline: type, seed: int):
    row = diffusers_accuracy.compare(pipeline, seed, diffusers_accuracy.SEEDS)
    assert row["models"]["ratio"] <= diffusers_accuracy.LIMIT
    assert row["latents"]["ratio"] <= diffusers_accuracy.LIMIT
    assert 1e-4 < row["models"]["original"] < 0.1


def test_a_loop_is_verified_timed_and_taken_apart():
    found = diffusers_loop.Loops(steps=2).measure(64, rounds=1)
    assert found.verified.keys() == {whole.BASELINE, diffusers_loop.ACCELERATED}
    assert [row.provider for row in found.rows] == list(found.verified)
    for row in found.rows:
        assert 0 < row.of_bound and 0 < row.parts["linears"] < 1 > row.parts["attention"] > 0


def test_what_an_accelerated_loop_gets_wrong_is_not_timed():
    loops = diffusers_loop.Loops(steps=2)
    loops.accelerated.transformer.proj_out.bias.data += 0.1
    found = loops.measure(64, rounds=0)
    assert "relative L2 must be at most" in found.failed[diffusers_loop.ACCELERATED]
