"""`benchmarks.gpu_check` without a GPU: its dry run, what it refuses and what it survives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PARTS = ("build", "contract", "sanitizer", "ops", "picture")


def check(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *args],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def read(out: Path, part: str) -> dict:
    return json.loads((out / f"dry-run-{part}.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    done = check("--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert done.stdout.startswith("no GPU")
    assert not (tmp_path / "out").exists()


# the dry run


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("dry")
    return out, check("--out", str(out), "--dry-run", "--budget", "900")


def test_a_dry_run_passes_every_part(dry: tuple[Path, subprocess.CompletedProcess]):
    out, done = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert {read(out, part)["status"] for part in PARTS} == {"passed"}


def test_nothing_of_a_dry_run_can_be_taken_for_a_gpu(
    dry: tuple[Path, subprocess.CompletedProcess],
):
    out, done = dry
    names = [file.name for file in out.iterdir()]
    assert len(names) == 8 and all(name.startswith("dry-run-") for name in names), names
    for part in PARTS:
        found = read(out, part)
        assert found["dry_run"] and found["machine"]["gpu"] is None
        assert found["measured_on"] == "the CPU, in a dry run"
    table = (out / "dry-run-table.txt").read_text()
    assert table.startswith("DRY RUN, NO GPU") and table in done.stdout
    assert len(table.splitlines()) < 60


def test_a_dry_run_builds_aside_and_says_what(dry: tuple[Path, subprocess.CompletedProcess]):
    assert read(dry[0], "build")["build_info"]["_C_cpu"]["built"]


def test_a_dry_run_runs_the_contract_per_backend(dry: tuple[Path, subprocess.CompletedProcess]):
    backends = read(dry[0], "contract")["backends"]
    assert set(backends) == {"cpu", "reference"}
    for found in backends.values():
        assert (found["passed"], found["failed"]) == (2, 0)  # forward and backward


def test_a_dry_run_times_the_op_against_its_baselines(
    dry: tuple[Path, subprocess.CompletedProcess],
):
    rows = {row["provider"]: row for row in read(dry[0], "ops")["ops"]["rows"]}
    assert {"copy", "eager", "compile", "cpu"} <= set(rows)
    assert all(row["device"] == "cpu" and row["rounds"] >= 3 for row in rows.values())
    assert set(rows["cpu"]["times"]) == {"eager", "compile"}


def test_a_dry_run_draws_a_picture_for_the_judge(dry: tuple[Path, subprocess.CompletedProcess]):
    found = read(dry[0], "picture")
    assert set(found["judge"]) == {"shape", "colour", "size", "position", "background"}
    assert 0 <= found["levels_from_reference"] <= 8
    assert (dry[0] / "dry-run-picture.png").stat().st_size > 1000


# failures


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path):
    parts = ["--only", "build", "sanitizer"]
    done = check("--out", str(tmp_path), "--dry-run", *parts, CXX="no-such-compiler")
    assert done.returncode == 1
    assert read(tmp_path, "build")["status"] == "failed"
    assert "no-such-compiler not found" in read(tmp_path, "build")["said"][-1]
    assert read(tmp_path, "sanitizer")["status"] == "passed"


def test_a_part_is_stopped_when_its_time_is_up_and_runs_again_on_resume(tmp_path: Path):
    args = ["--out", str(tmp_path), "--dry-run", "--only", "sanitizer"]
    assert check(*args, "--budget", "0.5").returncode == 1
    assert read(tmp_path, "sanitizer")["tools"]["none"]["out_of_time"] == 0
    assert check(*args, "--resume").returncode == 0
    passed = read(tmp_path, "sanitizer")
    assert passed["status"] == "passed"
    assert check(*args, "--resume").returncode == 0
    assert read(tmp_path, "sanitizer") == passed


def test_outcomes_before_a_crash_are_kept(tmp_path: Path):
    (tmp_path / "test_crash.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_absent(): pytest.skip('no reason')\n"
        "def test_crash(): os._exit(9)\n"
        "def test_after(): pass\n"
    )
    file = tmp_path / "outcomes.jsonl"
    command = ["-m", "pytest", "-p", "benchmarks.outcomes", "-p", "no:cacheprovider"]
    command += ["--outcomes", str(file), str(tmp_path), "-c", os.devnull]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True)
    assert done.returncode == 9
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["test"], line["outcome"]) for line in lines] == [
        ("test_right", "passed"),
        ("test_wrong", "failed"),
        ("test_absent", "skipped"),
    ]
    assert "1 == 2" in lines[1]["why"] and lines[2]["why"] == "no reason"
