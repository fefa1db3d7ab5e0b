"""`fluxkern bench --compare`: what it calls a change, and what only the machine."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import changes, report
from benchmarks.whole import OURS
from fluxkern import bench
from fluxkern.cli import main

COMMITTED = max(report.RESULTS.iterdir(), key=lambda folder: len(list(folder.iterdir())))


def test_a_result_compared_with_itself_has_not_changed(capfd: pytest.CaptureFixture):
    assert main(["bench", "--compare", str(COMMITTED), str(COMMITTED)]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert "0 slower, 0 faster" in last and "moved by 0.0%" in last


def change(provider: str, *moved: float, beside: bool = False) -> changes.Change:
    return changes.Change("op", provider, 1.0, moved, 0.02, beside)


@pytest.mark.parametrize(
    "moved, drift, verdict",
    [
        ((1.2,), 0.0, "SLOWER"),
        ((1.2, 1.3), 0.0, "SLOWER"),
        ((0.8, 0.7), 0.0, "faster"),
        ((1.01, 1.01), 0.0, "no change"),  # within its spread
        ((1.2, 1.0), 0.0, "no change"),  # of two ratios only one moved
        ((1.2, 0.9), 0.0, "no change"),
        ((1.2, 1.2), 0.25, "cannot tell"),  # untouched code moved as far
    ],
)
def test_a_change_is_larger_than_the_spread_and_than_the_machine(
    moved: tuple[float, ...], drift: float, verdict: str
):
    assert change(OURS, *moved).verdict(drift) == verdict


def test_where_there_are_several_baselines_they_judge_the_machine():
    steady, not_steady = (change(OURS, 1.2, other, beside=True) for other in (1.25, 1.6))
    assert steady.verdict(0.25) == "SLOWER"
    assert not_steady.verdict(0.0) == "cannot tell"


def test_a_machine_that_is_slower_as_a_whole_changes_nothing():
    old = changes.read(COMMITTED / "ops.json")
    new = json.loads(json.dumps(old))
    for row in new["ops"]["rows"]:
        for name in ("median", "iqr", "least"):
            row[name] *= 1.5
    ours = [c for c in changes.between(old, new) if c.ours]
    assert ours and all(c.moved and set(c.moved) == {1.0} for c in ours)


def test_the_machine_is_judged_by_code_that_is_not_ours():
    others = [change("eager", 1 + i / 100) for i in range(11)]
    assert changes.drift([*others, change(OURS, 2.0)]) == pytest.approx(0.086, abs=0.002)
    assert changes.drift([change(OURS, 2.0)]) == 0.0


def test_too_few_others_do_not_judge_the_machine():
    others = [change("eager", 1.5) for _ in range(changes.CONTROLS)]
    assert changes.drift(others) == pytest.approx(math.log(1.5))
    assert changes.drift(others[1:]) == 0.0
    assert f"not judged: {changes.CONTROLS - 1} that" in changes.table(others[1:])
    assert "not judged" not in changes.table(others)


def test_a_fifth_is_found_in_the_committed_results_or_it_cannot_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Ours made a fifth slower: no row in between, and both happen."""
    old = changes.read(COMMITTED)
    new = json.loads(json.dumps(old))
    for row in (row for data in new.values() for row in data["rows"]):
        if row["provider"].startswith(changes.OURS):
            for name in ("median", "iqr", "least"):
                row[name] *= 1.201
            row["times"] = {n: t / 1.201 for n, t in row["times"].items()}
            if row.get("share"):
                row["share"] /= 1.201
    found = list(changes.between(old, new))
    assert changes.drift(found) == 0
    verdicts = {c: c.verdict(0.0) for c in found if c.ours}
    for c, verdict in verdicts.items():
        assert verdict == ("SLOWER" if c.spread < 0.2 else "cannot tell"), c
    assert len(verdicts) > 50 and set(verdicts.values()) == {"SLOWER", "cannot tell"}
    assert {c.verdict(0.0) for c in found if not c.ours} <= {"no change", "cannot tell"}
    bench.write_json(tmp_path / "new.json", {"suites": new})
    assert changes.compare(COMMITTED, tmp_path / "new.json") == 1
    counts = [[*verdicts.values()].count(name) for name in ("SLOWER", "cannot tell")]
    said = "of ours: {} slower, 0 faster, 0 no change, {} cannot be told".format(*counts)
    assert said in capsys.readouterr().out


def test_code_in_our_hands_is_ours_whatever_its_name():
    names = ("cpu kernel", "cuda-wgmma", "fluxkern int8", "diffusers accelerated")
    assert all(change(name, 1).ours for name in names)
    assert not any(change(name, 1).ours for name in ("diffusers", "cudnn", "copy", "eager"))


@pytest.mark.parametrize("name, other", [("threads", 1000), ("versions", {"torch": "0.1"})])
def test_results_of_two_machines_are_not_compared(tmp_path: Path, name: str, other: object):
    old = changes.read(COMMITTED)
    new = json.loads(json.dumps(old))
    for data in new.values():
        data["machine"][name] = other
    bench.write_json(tmp_path / "new.json", {"suites": new})
    with pytest.raises(ValueError, match=f"must be of one machine, got {name}"):
        changes.compare(COMMITTED, tmp_path / "new.json")
