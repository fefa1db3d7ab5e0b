"""One seed for a whole run, drawn at its start unless `--seed` gives it; one thread by default."""

import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it; child processes inherit it

import coverage_table
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is made

from fluxkern import ops  # noqa: E402  after the environment is as kernels read it
from fluxkern.ops import Backend, _backends, measured  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited from a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)
logging.getLogger("torch.__trace").propagate = False  # pytest would format every record: 8x slower


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, help="seed of all random test inputs; drawn when not given"
    )


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its own option
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**32)
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(config.option.seed)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With xdist a file runs in one process, and a backend of the contract in one."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            of_contract = item.path.stem == "test_contract" and hasattr(item, "callspec")
            backend = item.callspec.params.get("backend", "") if of_contract else ""
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {backend}"))


@pytest.hookimpl(tryfirst=True)  # before the end is reported
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        for name in ("recorded", "promised"):
            cells = getattr(coverage_table, name)(config)
            config.workeroutput[name] = [list(cell) for cell in sorted(cells)]
    elif coverage_table.empty(config) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name in ("recorded", "promised"):
        for cell in getattr(node, "workeroutput", {}).get(name, ()):
            getattr(coverage_table, name)(node.config).add(tuple(cell))


def _replay(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (again with --seed {config.option.seed})"


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [_replay(config), f"torch {torch.__version__}, threads: {torch.get_num_threads()}"]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if coverage_table.recorded(config):
        terminalreporter.section("coverage: forward | backward, all = every dtype both ways")
        for line in coverage_table.lines(config):
            terminalreporter.write_line(line)
    for cell in coverage_table.empty(config):
        terminalreporter.write_line(f"empty cell: {' '.join(cell)}", red=True)
    if exitstatus:  # a quiet run has no header
        terminalreporter.write_line(_replay(config))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.option.seed


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _own_tables() -> Iterator[None]:
    """Set up before what a test changes, so torn down after it: no table outlives a test."""
    yield
    if any(measured._tables.values()) or measured.problems():
        measured.forget()


@pytest.fixture
def use_backend() -> Iterator[Callable[[str | None], None]]:
    """Makes a backend that of all ops until the test ends."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(ops.use_backend(name))


@pytest.fixture
def plant() -> Iterator[Callable[[str, Backend], None]]:
    """Puts a backend in the place of an op's own until the test ends."""
    planted: list[tuple[str, str, Backend | str | None]] = []

    def plant(op: str, backend: Backend) -> None:
        planted.append((op, backend.name, _backends._registry[op].get(backend.name)))
        ops.register(op, backend)

    yield plant
    for op, name, before in reversed(planted):
        del _backends._registry[op][name]
        if before is not None:
            _backends._registry[op][name] = before
    _backends._changed()
