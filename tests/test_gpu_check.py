"""`benchmarks.gpu_check` without a GPU: its dry run, what it refuses and what it survives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check

ROOT = Path(__file__).parents[1]
PARTS = ("build", "contract", "model", "sanitizer", "ops", "step", "picture")
LONGER = ("blocks", "schnell", "scaling")


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
    return out, check("--out", str(out), "--dry-run", "--budget", "1200", "--only", *PARTS)


def test_a_dry_run_passes_every_part(dry: tuple[Path, subprocess.CompletedProcess]):
    out, done = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert {read(out, part)["status"] for part in PARTS} == {"passed"}


def test_nothing_of_a_dry_run_can_be_taken_for_a_gpu(
    dry: tuple[Path, subprocess.CompletedProcess],
):
    out, done = dry
    names = [file.name for file in out.iterdir()]
    assert len(names) == len(PARTS) + 3 and all(name.startswith("dry-run-") for name in names), (
        names
    )
    for part in PARTS:
        found = read(out, part)
        assert found["dry_run"] and found["machine"]["gpu"] is None
        assert found["measured_on"] == "the CPU, in a dry run"
    table = (out / "dry-run-table.txt").read_text()
    assert table.startswith("DRY RUN, NO GPU") and table in done.stdout
    assert len(table.splitlines()) < 100


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
    rows = {row["provider"]: row for row in read(dry[0], "ops")["suite"]["rows"]}
    assert {"copy", "eager", "compile", "cpu"} <= set(rows)
    assert all(row["device"] == "cpu" and row["rounds"] >= 3 for row in rows.values())
    assert set(rows["cpu"]["times"]) == {"eager", "compile"}


def test_a_dry_run_holds_a_step_to_fp32(dry: tuple[Path, subprocess.CompletedProcess]):
    found = read(dry[0], "step")["suite"]
    assert {row["provider"] for row in found["rows"]} == {"eager", "fluxkern"}
    assert all(row["error"] < 1e-5 for row in found["rows"])
    assert found["kinds"][0]["peak"]["fluxkern"] > 0
    table = (dry[0] / "dry-run-table.txt").read_text()
    assert "step, compact, 128 px" in table and " peak 0.0" in table


def test_a_dry_run_tests_graphs_and_providers(dry: tuple[Path, subprocess.CompletedProcess]):
    found = read(dry[0], "model")
    assert (found["passed"], found["failed"]) == (2, 0)


def test_the_figures_are_those_that_were_promised_and_say_whether_they_are_kept():
    def row(op: str, provider: str, median: float, **more: object) -> dict:
        about = {"op": op, "direction": "forward", "dtype": "bf16", "provider": provider}
        return about | {"median": median, "share": 0.5, "times": {"compile": 1.3}} | more

    rows = [
        row("norm_modulate", "triton", 15e-6, share=0.95),
        row("norm_modulate", "cuda", 16e-6, share=0.89),
        row("attention", "cuda-wgmma", 450e-6),
        row("norm_modulate", "triton", 30e-6, direction="backward", share=0.7),
        row("norm_modulate", "triton", 1e-6, dtype="fp32"),
        row("attention", "triton", 500e-6), row("attention", "cuda", 900e-6),
        row("attention", "cudnn", 400e-6), row("attention", "flash", 700e-6),
        row("rope_attention", "cudnn", 430e-6), row("rope_attention", "triton", 560e-6),
    ]  # fmt: skip
    assert gpu_check.figures({"part": "ops", "suite": {"rows": rows}}) == [
        "yes norm_modulate, share of the copy: 0.95, at least 0.9",
        "yes norm_modulate, times Inductor's: 1.3, at least 1.1",
        "NO  norm_modulate backward, share of the copy: 0.7, at least 0.8",
        "yes own attention over cudnn: 0.8889, at least 0.7",
        "yes norm + RoPE + attention (cudnn) over cudnn alone: 0.9302, at least 0.92",
    ]
    times = {"eager": 1.6, "diffusers compiled": 1.02}
    steps = [{"provider": "fluxkern", "median": 0.117, "times": times}]
    assert gpu_check.figures({"part": "step", "suite": {"rows": steps}}) == [
        "yes 57-block step, ms: 117, at most 118",
        "NO  57-block step, times diffusers compiled: 1.02, at least 1.05",
    ]
    assert gpu_check.figures({"part": "picture"} | {"suite": {"rows": []}}) == []


@pytest.mark.build
def test_a_dry_run_passes_the_longer_parts(tmp_path: Path):
    done = check("--out", str(tmp_path), "--dry-run", "--only", *LONGER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {read(tmp_path, part)["status"] for part in LONGER} == {"passed"}
    assert set(read(tmp_path, "scaling")["suite"]["exponents"]) == {"tokens", "batch", "steps"}


def test_a_site_is_where_a_part_finds_a_package(tmp_path: Path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wheel_of_a_peer.py").write_text("")
    program = (
        "import importlib.util, subprocess, sys; from pathlib import Path; "
        "from benchmarks.gpu_check import add_sites; add_sites([Path(sys.argv[1])]); "
        "assert importlib.util.find_spec('wheel_of_a_peer'); "
        "subprocess.run([sys.executable, '-c', 'import wheel_of_a_peer'], check=True)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True)


def test_every_part_has_a_place_in_the_order_of_importance():
    assert list(gpu_check.PARTS) == [*PARTS[:5], "blocks", "step", *LONGER[1:], "picture"]
    assert set(gpu_check.DETAILS) == set(gpu_check.PARTS)


def test_a_long_table_is_cut(tmp_path: Path):
    row = {"what": "w", "size": "s", "dtype": "bf16", "provider": "p", "median": 1.0}
    row |= {"times": {"eager": 2.0}, "error": 0.1}
    suite = {"rows": [row] * 200, "refused": [], "verified": [], "peers": {}}
    machine = {"cpu": "c", "versions": {"torch": "2"}, "commit": "", "source": ""}
    found = {"part": "step", "status": "passed", "seconds": 1, "machine": machine, "suite": suite}
    table = gpu_check.final_table([found], dry_run=True).splitlines()
    assert len(table) == gpu_check.LINES - 1 == 99
    assert "lines more, see the parts' files" in table[-1] and "2.00 x eager" in table[2]


def test_a_dry_run_draws_a_picture_for_the_judge(dry: tuple[Path, subprocess.CompletedProcess]):
    found = read(dry[0], "picture")
    assert set(found["judge"]) >= {"shape", "colour", "size", "position", "background"}
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
