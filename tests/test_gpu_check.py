"""`benchmarks.gpu_check` without a GPU: what it survives, what it keeps, what it would run."""

import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_table, jobs
from benchmarks.jobs import CUT, FAILED, PASSED, SKIPPED, Job, Jobs, Row
from fluxkern.cases import CASES
from fluxkern.ops import measured

ROOT = Path(__file__).parents[1]
FILES, FOLDERS = 8, 2  # at most, below --out


def check(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *args]
    environment = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path):
    done = check("--out", str(tmp_path / "out"))
    assert done.returncode == 3
    assert done.stdout.startswith("no GPU")
    assert not (tmp_path / "out").exists()


# jobs


def ran(*given: Job, seconds: float = 60, side_by_side: int = 1) -> list[Row]:
    rows: list[Row] = []
    Jobs(rows.append, io.BytesIO()).run("p", given, time.monotonic() + seconds, side_by_side)
    return rows


def program(text: str, *items: str, limit: float = 60) -> Job:
    text = f"import os, sys, time\nfrom benchmarks.rows import begin, emit\n{text}"
    return Job("job", (sys.executable, "-c", text), items, limit)


def statuses(rows: list[Row]) -> list[tuple[str | None, str]]:
    return [(row.get("item"), row["status"]) for row in rows if "status" in row]


EACH = "for item in sys.argv[1:]:\n    begin(item)\n    emit(figure=item)\n"


@pytest.mark.parametrize(
    ("fault", "why"),
    {
        "os.abort()": "exit status 134, signal 6",
        "os.kill(os.getpid(), 9)": "exit status 137, signal 9",
        "raise ValueError('no')": "exit status 1",
        "time.sleep(1000)": "stopped after 4 s",
    }.items(),
)
def test_an_item_that_crashes_or_hangs_is_lost_alone(fault: str, why: str):
    job = program(f"{EACH}    if item == 'b': {fault}", "a", "b", "c", "d", limit=4)
    rows = ran(job)
    assert [row["figure"] for row in rows if "figure" in row] == ["a", "b", "c", "d"]
    lost, last = [row for row in rows if "status" in row]
    assert (lost["item"], lost["status"], lost["why"]) == ("b", FAILED, why)
    assert last["status"] == PASSED


def test_a_job_that_fails_before_its_first_item_is_not_tried_again():
    (row,) = ran(program("print('no such thing'); sys.exit(3)", "a", "b"))
    assert (row["status"], row["why"], row["said"]) == (FAILED, "exit status 3", ["no such thing"])


def test_a_row_that_failed_fails_its_job_and_a_skip_says_why():
    assert statuses(ran(program("emit(status='failed', why='wrong')")))[-1][1] == FAILED
    (row,) = ran(program("emit(skip='not here')"))
    assert (row["status"], row["why"]) == (SKIPPED, "not here")


def test_outcomes_are_counted():
    (row,) = ran(program("for _ in range(3): emit(count='passed')"))
    assert row["passed"] == 3


def test_what_is_not_done_in_time_is_cut_off_and_said():
    start = time.monotonic()
    rows = ran(program("emit(figure=1); time.sleep(1000)"), program(""), seconds=3)
    assert time.monotonic() - start < 15
    assert [row.get("status") for row in rows] == [None, CUT, CUT]
    assert rows[0]["figure"] == 1 and rows[-1]["why"] == "no time was left"


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


BROOD = """
import subprocess
for own_session in (False, True):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=own_session)
    emit(pid=child.pid)
"""


def test_a_stopped_job_leaves_no_process_of_any_session():
    rows = ran(program(BROOD + "time.sleep(1000)"), seconds=4)
    assert not any(alive(row["pid"]) for row in rows if "pid" in row)


def test_a_job_that_ends_leaves_none_either():
    rows = ran(program(BROOD))
    found = [row["pid"] for row in rows if "pid" in row]
    assert len(found) == 2 and not any(map(alive, found))


DRIVER = """
import io, json, sys, time
from benchmarks.jobs import Job, Jobs
job = Job("job", (sys.executable, "-c", sys.argv[1]))
until = time.monotonic() + 99
Jobs(lambda row: print(json.dumps(row), flush=True), io.BytesIO()).run("p", [job], until)
"""


def test_a_check_that_is_killed_leaves_no_process():
    inner = program(BROOD + "emit(pid=os.getpid())\ntime.sleep(1000)").command[2]
    command = [sys.executable, "-c", DRIVER, inner]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        pids = [json.loads(driver.stdout.readline())["pid"] for _ in range(3)]
        assert all(map(alive, pids))
        driver.kill()
    end = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, pids))


# faults planted in an op

PLANTED = """
import sys
if "benchmarks.op_rows" in sys.orig_argv:
    import os, time, torch
    from fluxkern import ops

    def crash(*args): os.abort()
    def hang(*args): time.sleep(1000)
    def out_of_memory(*args): raise torch.OutOfMemoryError("CUDA out of memory")
    def wrong(x, *args): return torch.zeros_like(x)

    faults = {"norm_modulate": crash, "gelu_tanh": hang, "gated_residual": out_of_memory}
    for op, fault in {**faults, "modulation": wrong}.items():
        ops.register(op, ops.Backend("cpu", fault))
"""


def test_a_planted_fault_costs_its_op_alone(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    about = gpu_check.Check(True, tmp_path, "", ())
    items = ("norm_modulate", "gelu_tanh", "gated_residual", "qk_norm_rope")
    path = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    job = Job("ops", about.op_rows("--rounds", 0), items, limit=60, environment=path)
    rows = ran(replace(job, limit=45), seconds=400)
    ends = [(r["item"], r["status"], r["why"]) for r in rows if "status" in r and "op" not in r]
    assert ends[:2] == [
        ("norm_modulate", FAILED, "exit status 134, signal 6"),
        ("gelu_tanh", FAILED, "stopped after 45 s"),
    ]
    of = {(r["op"], r["provider"]): r for r in rows if "provider" in r and "status" in r}
    assert of["gated_residual", "cpu"]["why"] == "OutOfMemoryError: CUDA out of memory"
    assert of["gated_residual", "eager"]["status"] == PASSED
    assert of["qk_norm_rope", "eager"]["status"] == PASSED
    assert "norm_modulate" not in {op for op, _ in of}


def test_a_planted_wrong_result_is_a_row_that_says_so(tmp_path: Path):
    text = PLANTED.replace('"modulation": wrong', '"gelu_tanh": wrong')
    (tmp_path / "sitecustomize.py").write_text(text)
    about = gpu_check.Check(True, tmp_path, "", ())
    command, path = about.op_rows("--rounds", 0), {"PYTHONPATH": str(tmp_path)}
    rows = ran(Job("ops", command, ("gelu_tanh",), environment=path), seconds=200)
    of = {row["provider"]: row for row in rows if "provider" in row and "status" in row}
    assert of["cpu"]["status"] == FAILED and "gelu_tanh by cpu: max error must" in of["cpu"]["why"]
    assert of["eager"]["status"] == PASSED and rows[-1]["status"] == FAILED


# what it would run


def on_a_gpu(tmp_path: Path) -> gpu_check.Check:
    on_gpu = tuple(op for op, c in CASES.items() if {"cuda", "triton"} & set(c.backends))
    return gpu_check.Check(False, tmp_path, "9.0", on_gpu)


def all_jobs(about: gpu_check.Check) -> Iterator[tuple[str, Job]]:
    for name, part in gpu_check.PARTS.items():
        for job in part.jobs(about):
            yield name, job


def test_every_command_is_one_that_its_program_takes(tmp_path: Path):
    parsers = {"op_rows": "parsed", "loop": "parsed", "step": "parsed", "blocks": "parsed"}
    taken = 0
    for about in (on_a_gpu(tmp_path), gpu_check.Check(True, tmp_path, "", gpu_check.DRY_OPS)):
        for _, job in all_jobs(about):
            words = [*job.command, *job.items]
            name = next((n for n in parsers if f"benchmarks.{n}" in words), None)
            if name:
                program = importlib.import_module(f"benchmarks.{name}")
                arguments = words[words.index(f"benchmarks.{name}") + 1 :]
                program.parsed(arguments)
                taken += 1
    assert taken > 30


def test_every_op_of_a_gpu_is_in_the_smoke_the_timings_and_the_contract(tmp_path: Path):
    about = on_a_gpu(tmp_path)
    assert {op for job in gpu_check.smoke(about) for op in job.items} == set(about.ops)
    assert {op for job in gpu_check.ops(about) for op in job.items} == set(about.ops)
    differentiable = {op for op in about.ops if CASES[op].moved_backward is not None}
    assert {op for job in gpu_check.backward(about) for op in job.items} == differentiable
    chosen = [job.command[-1] for job in gpu_check.contract(about)]
    assert all(f"([{op}-cuda or [{op}-triton) and not emulator" in chosen for op in about.ops)


def test_ours_come_first_and_the_moments_are_in_order():
    moments = [part.until for part in gpu_check.PARTS.values()]
    assert moments == sorted(moments) and moments[-1] < gpu_check.PLAN
    assert list(gpu_check.PARTS)[:3] == ["build", "smoke", "first"]


def test_the_build_is_of_the_cuda_object_alone_for_this_gpu(tmp_path: Path):
    (job,) = gpu_check.build(on_a_gpu(tmp_path))
    assert job.environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert job.environment["FLUXKERN_BUILD"] in ("cuda", "cuda-alone")


def test_the_checkout_can_be_carried():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 48e6


def test_a_site_is_where_a_part_finds_a_package(tmp_path: Path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wheel_of_a_peer.py").write_text("")
    text = (
        "import importlib.util, subprocess, sys; from pathlib import Path; "
        "from benchmarks.gpu_check import add_sites; add_sites([Path(sys.argv[1])]); "
        "assert importlib.util.find_spec('wheel_of_a_peer'); "
        "subprocess.run([sys.executable, '-c', 'import wheel_of_a_peer'], check=True)"
    )
    subprocess.run([sys.executable, "-c", text, str(tmp_path / "site")], cwd=ROOT, check=True)


# what is kept of it

MACHINE = {
    "gpu": {"name": "NVIDIA H200"},
    "source": "abc",
    "commit": "c",
    "versions": {"torch": "2"},
}


def summary(tmp_path: Path) -> gpu_check.Summary:
    return gpu_check.Summary(gpu_check.Check(False, tmp_path, "9.0", ()), MACHINE, [])


def test_a_measured_table_is_made_of_the_rows_and_read_by_the_ops(tmp_path: Path):
    found = summary(tmp_path)
    about = {"part": "ops", "job": "norms", "dtype": "bfloat16", "size": 24}
    times = {"triton": 1.0, "cuda": 2.0}
    digest = measured.digests("gelu_tanh", times)
    found.add(about | {"order": "gelu_tanh", "times": times, "digest": digest})
    tables, digests = measured.read(tmp_path / "measured/nvidia-h200.json")
    assert tables["order"]["gelu_tanh"]["bfloat16"] == {24: times}
    assert digests == {"gelu_tanh": digest}
    assert measured._fresh(tmp_path / "measured/nvidia-h200.json")["order"]


def test_an_earlier_call_is_resumed_where_it_stopped(tmp_path: Path):
    found = summary(tmp_path)
    for job, status in (("a", PASSED), ("b", FAILED), ("b", PASSED), ("c", CUT)):
        found.add({"part": "ops", "job": job, "figure": 1})
        found.add({"part": "ops", "job": job, "status": status})
    found.add({"part": "build", "job": "build", "status": PASSED})
    file = tmp_path / "summary.json"
    warmer = MACHINE | {"gpu": MACHINE["gpu"] | {"clocks_and_power_limit": ["1980 MHz"]}}
    assert {row["job"] for row in gpu_check.kept(file, warmer)} == {"a"}
    with pytest.raises(SystemExit, match="--resume must be of source def on NVIDIA H200, got abc"):
        gpu_check.kept(file, MACHINE | {"source": "def"})
    with pytest.raises(SystemExit, match="on None, got abc, NVIDIA H200"):
        gpu_check.kept(file, MACHINE | {"gpu": None})


def test_the_figures_are_those_that_were_promised_and_say_whether_they_are_kept():
    def row(op: str, provider: str, median: float, **more: object) -> dict:
        about = {"op": op, "direction": "forward", "dtype": "bf16", "provider": provider}
        return about | {"median": median, "share": 0.5, "times": {"compile": 1.3}} | more

    rows = [
        row("norm_modulate", "triton", 15e-6, share=0.95),
        row("norm_modulate", "cuda", 16e-6, share=0.89),
        row("attention", "cuda-wgmma", 450e-6),
        row("norm_modulate", "triton", 30e-6, direction="backward", share=0.7),
        row("attention", "triton", 500e-6), row("attention", "cuda", 900e-6),
        row("attention", "cudnn", 400e-6), row("attention", "flash", 700e-6),
        row("rope_attention", "cudnn", 430e-6), row("rope_attention", "triton", 560e-6),
        {"what": "step in the loop, modulation ahead, sustained", "ms": 117.0},
        {"what": "step", "provider": "fluxkern", "times": {"diffusers compiled": 1.02}},
    ]  # fmt: skip
    assert list(map(str, gpu_table.figures(rows))) == [
        "yes norm_modulate, share of the copy: 0.95, at least 0.9",
        "yes norm_modulate, times Inductor's: 1.3, at least 1.1",
        "NO  norm_modulate backward, share of the copy: 0.7, at least 0.8",
        "yes own attention over cudnn: 0.8889, at least 0.7",
        "yes norm + RoPE + attention (cudnn) over cudnn alone: 0.9302, at least 0.92",
        "yes 57-block step, ms: 117, at most 118",
        "NO  57-block step, times diffusers compiled: 1.02, at least 1.05",
    ]


def test_the_table_is_short_whatever_was_found():
    row = {"part": "p", "job": "j", "what": "w", "ms": 1.0, "least": 1.0, "most": 2.0, "samples": 3}
    data = {
        "dry_run": True,
        "measured_on": "x",
        "machine": MACHINE,
        "parts": {},
        "rows": [row] * 200,
    }
    lines = gpu_table.table(data).splitlines()
    assert len(lines) == gpu_table.LINES - 1 == 99 and "lines more: summary.json" in lines[-1]
    assert max(map(len, lines)) <= gpu_table.WIDTH


# the dry run


def assert_small(out: Path) -> None:
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) <= FILES and max(len(file.parts) for file in files) <= FOLDERS, files
    assert all(file.name.lstrip(".").startswith("dry-run-") for file in files), files


@pytest.mark.build
def test_a_dry_run_passes_every_part_within_its_budget(tmp_path: Path):
    start = time.monotonic()
    done = check("--out", str(tmp_path), "--dry-run")
    assert time.monotonic() - start < gpu_check.PLAN, done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "dry-run-summary.json").read_text())
    assert found["dry_run"] and found["machine"]["gpu"] is None
    assert found["measured_on"] == "the CPU, in a dry run"
    assert set(found["parts"].values()) <= {PASSED, SKIPPED}
    table = (tmp_path / "dry-run-table.txt").read_text()
    assert table.startswith("DRY RUN, NO GPU") and table in done.stdout
    assert len(table.splitlines()) < gpu_table.LINES
    assert_small(tmp_path)


@pytest.mark.build
def test_a_check_that_is_killed_at_any_moment_keeps_what_it_has(tmp_path: Path):
    drawn = random.Random(0)
    for i in range(20):
        out = tmp_path / str(i)
        options = ["--out", str(out), "--dry-run", "--budget", "60", "--only", "first", "ops"]
        command = [sys.executable, "-m", "benchmarks.gpu_check", *options]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(drawn.uniform(1, 25))
        before = rows_of(out)
        run.send_signal(signal.SIGKILL)
        run.wait()
        after = rows_of(out)
        assert after[: len(before)] == before
        assert_small(out) if out.exists() else None
    assert any(rows_of(tmp_path / str(i)) for i in range(20))
    assert no_child_runs()


def rows_of(out: Path) -> list[Row]:
    file = out / "dry-run-summary.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def no_child_runs() -> bool:
    """Soon: the guards are told by the kernel."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if readable(p)]
        if not any(str(jobs.GUARD[-1]).encode() in line for line in lines):
            return True
        time.sleep(0.2)
    return False


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_a_cuda_error_ends_the_process_of_its_test_alone(tmp_path: Path):
    (tmp_path / "test_crash.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_absent(): pytest.skip('no reason')\n"
        "def test_error(): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_after(): pass\n"
    )
    plain = ("-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path))
    job = Job("t", (sys.executable, "-m", "pytest", "-p", "benchmarks.outcomes", *plain))
    *failures, end = ran(job)
    assert [row["test"] for row in failures] == ["test_wrong", "test_error"]
    assert "1 == 2" in failures[0]["why"] and "illegal memory" in failures[1]["why"]
    assert (end["passed"], end["failed"], end["skipped"]) == (1, 2, 1)
    assert (end["status"], end["why"]) == (FAILED, "exit status 3")
