"""A pytest plugin that writes each outcome as it comes, so that a crash loses none before it.

python3 -m pytest -p benchmarks.outcomes --outcomes FILE ...
"""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="a file, one JSON object a line is added to it")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Writer(config.option.outcomes))


class _Writer:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            line = {
                "test": report.nodeid.partition("::")[2],
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "why": why(report),
            }
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def why(report: pytest.TestReport) -> str | None:
    """The reason of a skip, the last line of a failure."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        return str(crash.message if crash else report.longrepr)[:2000]
    return None
