"""pytest-benchmark over the cases: `pytest benchmarks --benchmark-json FILE`, -compare, -autosave.

Providers of one comparison are timed in turn by `fluxkern.bench`; pytest-benchmark is then given
those samples, one after the other, so that its statistics and comparisons are of interleaved runs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluxkern import bench
from fluxkern.cases import SHAPES

GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fluxkern")
    shape = "flux-1024" if GPU else "flux-512"
    group.addoption("--shape", choices=SHAPES, default=shape, help=f"of the inputs; {shape}")
    group.addoption("--threads", type=int, help="of torch; as many as there are cores")


def pytest_configure(config: pytest.Config) -> None:
    bench.pin_threads(config.option.threads)
    bench.keep_pages()


def pytest_report_header(config: pytest.Config) -> str:
    return f"shape {config.option.shape}, threads {torch.get_num_threads()}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fluxkern"] = {  # two runs are compared without a warning if this is the same
        name: value
        for name, value in bench.machine().items()
        if name not in ("time", "load", "commit", "source")
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info["source"] = bench.source_hash()


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> str:
    return request.config.option.shape


@pytest.fixture(scope="session")
def compared() -> dict[tuple, bench.Comparison | bench.WrongResult]:
    return {}


@pytest.fixture
def comparison(compared: dict, request: pytest.FixtureRequest) -> Callable:
    """Measures a comparison when it is first asked for; a refusal fails all of its benchmarks.

    What measures it takes its key and the rounds, of which there are `rounds` at least.
    """
    option = request.config.option

    def find(measure: Callable, key: tuple, rounds: int) -> bench.Comparison:
        rounds = 0 if option.benchmark_disable else max(rounds, option.benchmark_min_rounds)
        if (measure, *key) not in compared:
            try:
                found = measure(*key, rounds=rounds)
            except bench.WrongResult as refusal:
                found = refusal
            compared[measure, *key] = found
        found = compared[measure, *key]
        if isinstance(found, bench.WrongResult):
            pytest.fail(str(found))
        return found

    return find


def clock(samples: list[float]) -> Callable[[], float]:
    """A timer that moves by one sample between every first and second look at it."""
    ticks, now = [], 0.0
    for seconds in samples:
        ticks += [now, now + seconds]
        now += seconds
    return iter(ticks).__next__


@pytest.fixture
def replayed(benchmark: Any) -> Callable:
    """Hands the samples of a provider to pytest-benchmark."""

    def replay(found: bench.Comparison, provider: str, group: str) -> None:
        if provider in found.skipped:
            pytest.skip(f"{provider}: {found.skipped[provider]}")
        benchmark.group = group
        row = found.row(provider)
        if row is None:  # --benchmark-disable: it was verified, not timed
            benchmark(lambda: None)
            return
        benchmark.extra_info.update(row.as_dict())
        benchmark._timer = clock(row.seconds)
        benchmark.pedantic(lambda: None, rounds=len(row.seconds))
        benchmark.stats.options["timer"] = row.timer

    return replay
