"""pytest-benchmark over the cases: `pytest benchmarks --benchmark-json FILE`, -compare, -autosave.

All shapes are measured that fit the machine, or those of --shape; -k picks ops and providers.
Providers of one comparison are timed in turn by `fluxkern.bench`; pytest-benchmark is then given
those samples, one after the other, so that its statistics and comparisons are of interleaved runs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fluxkern import bench
from fluxkern.cases import SHAPES

from .runs import default_device

ON_A_CPU = ("flux-512", "compact")  # others take minutes a call
OF_THE_RUN = ("time", "load", "clock", "commit", "dirty", "source")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fluxkern")
    group.addoption("--shape", action="append", choices=SHAPES, help="again for more; all")
    group.addoption("--threads", type=int, help="of torch; as many as there are cores")


def pytest_configure(config: pytest.Config) -> None:
    bench.pin_threads(config.option.threads)
    bench.keep_pages()


def pytest_report_header(config: pytest.Config) -> str:
    return f"threads {torch.get_num_threads()}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is measured at a shape is measured at each."""
    if "shape" not in metafunc.fixturenames:
        return
    asked = metafunc.config.option.shape
    too_large = () if default_device() == "cuda" or asked else set(SHAPES) - {*ON_A_CPU}
    skip = pytest.mark.skip(reason="takes a GPU, or --shape with its name")
    shapes = [pytest.param(s, marks=[skip] * (s in too_large)) for s in asked or SHAPES]
    metafunc.parametrize("shape", shapes, scope="module")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fluxkern"] = {  # two runs are compared without a warning if this is the same
        name: value for name, value in bench.machine().items() if name not in OF_THE_RUN
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info |= {name: bench.machine()[name] for name in OF_THE_RUN if name != "time"}


def clock(samples: list[float]) -> Callable[[], float]:
    """A timer that moves by one sample between every first and second look at it."""
    ticks, now = [], 0.0
    for seconds in samples:
        ticks += [now, now + seconds]
        now += seconds
    return iter(ticks).__next__


@pytest.fixture(scope="session")
def compared() -> dict[str, bench.Comparison | bench.WrongResult]:
    return {}


@pytest.fixture
def compare(compared: dict, benchmark: Any, request: pytest.FixtureRequest) -> Callable:
    """Hands the samples of one provider to pytest-benchmark.

    Its comparison is measured when it is first asked for; a refusal fails all of its benchmarks.
    """
    option = request.config.option

    def find(group: str, measure: Callable[..., bench.Comparison], rounds: int) -> bench.Comparison:
        if group not in compared:
            rounds = 0 if option.benchmark_disable else max(rounds, option.benchmark_min_rounds)
            try:
                compared[group] = measure(rounds=rounds)
            except bench.WrongResult as refusal:
                compared[group] = refusal
        if isinstance(compared[group], bench.WrongResult):
            pytest.fail(str(compared[group]))
        return compared[group]

    def replay(
        group: str,
        provider: str,
        measure: Callable[..., bench.Comparison],
        rounds: int = bench.MIN_ROUNDS,
    ) -> None:
        found, benchmark.group = find(group, measure, rounds), group
        if provider in found.failed:
            pytest.fail(f"{group} by {provider}: {found.failed[provider]}")
        row, left_out = found.row(provider), found.skipped
        if row is None and (provider in left_out or not option.benchmark_disable):
            pytest.skip(f"{provider}: {left_out.get(provider, 'is no part of this comparison')}")
        if row is None:  # it was verified, not timed
            benchmark(lambda: None)
            return
        benchmark.extra_info.update(row.as_dict())
        benchmark._timer = clock(row.seconds)
        benchmark.pedantic(lambda: None, rounds=len(row.seconds))
        benchmark.stats.options["timer"] = row.timer

    return replay
