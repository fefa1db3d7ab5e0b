"""A pytest plugin that hands over each outcome as it comes, and ends at an error of CUDA.

python3 -m pytest -p benchmarks.outcomes ...

After such an error every further call of the process fails: the rest is no test of anything.
"""

import pytest

from . import rows


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    rows.emit(count=report.outcome)
    if report.outcome == "failed":
        reason = why(report)
        rows.emit(test=report.nodeid.partition("::")[2], status="failed", why=reason[:500])
        if "CUDA error" in reason:
            pytest.exit(f"after {report.nodeid}: {reason[:200]}", returncode=3)


def why(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)
