"""What has become slower or faster between two results, and what is only the machine.

    python3 -m benchmarks.suite --compare OLD NEW        # files or folders

What was timed in the same rounds as a baseline (copy, eager, torch.compile, diffusers) is compared
by the ratio to it, in which a machine that is slower as a whole cancels; where there are several,
by the ratio that moved least, and all must have moved the same way. What has no baseline is
compared by its time, of which the fastest round must have moved with the median.

It has changed when it moved by more than the spread, the larger of two: the interquartile ranges of
both runs together, not divided by the square root of the rounds, which share clocks, pages and
neighbours and so are not independent; and what this machine does to code that nobody touched. That
is how far a row's baselines moved against each other where there are several; else how far all that
is not ours moved. Where the spread is a fifth or more a change of a fifth cannot be told.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("op", "what", "size", "direction", "shape", "dtype", "device")  # of what was measured
MACHINE = ("cpu", "cpu_capability", "limits", "threads", "versions")  # not the code
OURS = ("fluxkern", "cpu", "triton", "cuda", "diffusers accelerated")
CONTROLS, QUANTILE = 5, 0.9  # how many others it takes, and how many of them are within the spread
TOLD = math.log(1.2)  # the change that a comparison is for

ORDER = ("no change", "cannot tell", "faster", "SLOWER")

Suites = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """One provider in both results."""

    what: str
    provider: str
    old: float  # seconds
    moved: tuple[float, ...]  # new over old, each way it was measured
    spread: float  # relative, of both runs
    beside: bool = False  # `moved` are ratios to several of the same rounds

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def least(self) -> float:
        """The ratio that moved least, 1 where they moved both ways."""
        one_way = min(self.moved) > 1 or max(self.moved) < 1
        return min(self.moved, key=lambda ratio: abs(math.log(ratio))) if one_way else 1.0

    def verdict(self, drift: float) -> str:
        """Against the larger of its own spread and that of the machine."""
        limit = self.limit(drift)
        if abs(math.log(self.least)) <= limit:
            return "no change" if limit < TOLD else "cannot tell"
        return "SLOWER" if self.least > 1 else "faster"

    def limit(self, drift: float) -> float:
        """Of the logarithm of a ratio."""
        apart = math.log(max(self.moved) / min(self.moved))
        return max(math.log1p(self.spread), apart if self.beside else drift)


def read(path: Path) -> Suites:
    """Suites of a file of one or of several, or of a machine's folder."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: Suites = {}
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        found |= data["suites"] if "suites" in data else {data["suite"]: data}
    if not found:
        raise ValueError(f"{path} must hold results, got none")
    return found


def rows(suites: Suites) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By suite, what was measured, and who did it."""
    return {
        (suite, ", ".join(str(row[n]) for n in NAMES if n in row), row["provider"]): row
        for suite, data in suites.items()
        for row in data["rows"]
        if row.get("median")
    }


def other_machine(old: Suites, new: Suites) -> str | None:
    """What of the machine differs, which no code could have changed."""
    for suite in old.keys() & new.keys():
        before, after = (found[suite]["machine"] for found in (old, new))
        gpus = [m["gpu"] and f"{m['gpu']['name']}, {m['gpu']['driver']}" for m in (before, after)]
        if gpus[0] != gpus[1]:
            return f"gpu {gpus[0]} and {gpus[1]}"
        for name in MACHINE:
            if before[name] != after[name]:
                return f"{name} {before[name]} and {after[name]}"
    return None


def against_baselines(row: dict[str, Any]) -> dict[str, float]:
    """How many times faster it was than what ran in the same rounds."""
    found = {n: times for n, times in row["times"].items() if n != row["provider"]}
    ceiling = row.get("share") if row["provider"] != "copy" else None
    return found | ({"ceiling": ceiling} if ceiling else {})


def between(old: Suites, new: Suites) -> Iterator[Change]:
    before, after = rows(old), rows(new)
    for key in (key for key in after if key in before):
        a, b = before[key], after[key]
        was, is_now = against_baselines(a), against_baselines(b)
        ratios = tuple(was[n] / is_now[n] for n in was if n in is_now)
        yield Change(
            *key[1:],
            old=a["median"],
            moved=ratios or tuple(b[n] / a[n] for n in ("median", "least")),
            spread=math.hypot(a["iqr"] / a["median"], b["iqr"] / b["median"]),
            beside=len(ratios) > 1,
        )


def drift(changes: list[Change]) -> float:
    """A logarithm: nine of ten of those whose code is not ours, if enough, were within it."""
    others = [abs(math.log(change.least)) for change in changes if not change.ours]
    return float(np.quantile(others, QUANTILE)) if len(others) >= CONTROLS else 0.0


def table(changes: list[Change]) -> str:
    """A line a row, what changed last, where it is read."""
    limit = drift(changes)
    found = sorted(changes, key=lambda c: ORDER.index(c.verdict(limit)))
    wide = max((len(c.what) for c in found), default=0)
    lines = [f"{'':{wide}} {'by':20} {'old, ms':>10} {'change':>8} {'spread':>8}"]
    for c in found:
        lines.append(
            f"{c.what:{wide}} {c.provider:20} {c.old * 1e3:10.3f} {c.least - 1:+8.1%}"
            f" {math.expm1(c.limit(limit)):8.1%} {c.verdict(limit)}"
        )
    verdicts = [c.verdict(limit) for c in changes if c.ours]
    others = sum(not c.ours for c in changes)
    machine = f"what is not ours moved by {math.expm1(limit):.1%}"
    if others < CONTROLS:
        machine = f"the machine is not judged: {others} that are not ours, it takes {CONTROLS}"
    lines.append(
        f"of ours: {verdicts.count('SLOWER')} slower, {verdicts.count('faster')} faster,"
        f" {verdicts.count('no change')} no change, {verdicts.count('cannot tell')} cannot be told;"
        f" {machine}"
    )
    return "\n".join(lines)


def compare(old: Path, new: Path) -> int:
    """Prints the table; 1 where something of ours is slower.

    Raises:
        ValueError: two machines, or nothing that both have measured.
    """
    before, after = read(old), read(new)
    if differs := other_machine(before, after):
        raise ValueError(f"results must be of one machine, got {differs}")
    changes = list(between(before, after))
    if not changes:
        raise ValueError(f"{old} and {new} must share a row, got none")
    print(table(changes))
    limit = drift(changes)
    return int(any(c.ours and c.verdict(limit) == "SLOWER" for c in changes))
