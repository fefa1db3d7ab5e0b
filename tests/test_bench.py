"""The timers and what they refuse: a wrong result, another backend, a shared core unmentioned."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxkern import bench, ops, reference
from fluxkern.bench import WrongResult
from fluxkern.cases import CASES, SHAPES, TEST_SIZES, Maker, Sizes

ROOT = Path(__file__).parents[1]
OP = "gated_residual_norm_modulate"
WITH_KERNELS = [op for op, case in CASES.items() if case.backends]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def args_of(op: str, dtype: torch.dtype = torch.float32) -> dict:
    return CASES[op].inputs(Maker(Sizes(), dtype))


def truths_of(op: str, args: dict) -> tuple[bench.Truth, bench.Truth]:
    forward = bench.Truth.of(op, args, None)
    dout = tuple(torch.randn_like(t) for t in forward.own)
    return forward, bench.Truth.of(op, args, dout)


def ours(op: str) -> Callable:
    return partial(getattr(ops, op), backend="reference")


# statistics and timers


def test_a_ratio_is_of_samples_of_the_same_round():
    assert bench.ratio([1, 30, 2], [1, 10, 4]) == 1  # of 1, 3 and 1/2; of the medians 1/2


def test_spread_is_the_interquartile_range():
    assert bench.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == 2


def test_calls_are_timed_in_turn_each_with_what_goes_before():
    seen = []
    calls = {name: partial(seen.append, name) for name in "abc"}
    samples, _ = bench.cpu_times(calls, 7, partial(seen.append, "-"))
    rounds = len(seen) // 6
    assert seen == ["-", "a", "-", "b", "-", "c"] * rounds
    assert rounds >= 7 and {len(s) for s in samples.values()} <= set(range(7, rounds + 1))


def test_a_slowdown_of_a_fifth_is_found():
    calls = {"fast": partial(time.sleep, 0.020), "slow": partial(time.sleep, 0.024)}
    samples, _ = bench.cpu_times(calls, 9, lambda: None)
    assert 1.1 < bench.ratio(samples["slow"], samples["fast"]) < 1.3


SPIN = "import os; os.sched_setaffinity(0, {%d}); print(flush=True)\nwhile True: pass"


def busy() -> None:
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        pass


@pytest.fixture
def shared_core() -> Iterator[None]:
    """Another program runs on the only core of this one."""
    if bench.waited_for_cores() == 0:
        pytest.skip("this system does not say how long a thread has waited for a core")
    before = os.sched_getaffinity(0)
    core = min(before)
    command = [sys.executable, "-c", SPIN % core]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()  # it spins
        os.sched_setaffinity(0, {core})
        yield
        os.sched_setaffinity(0, before)
        other.kill()


def test_samples_of_a_shared_core_are_called_disturbed(
    shared_core: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench.timers, "PATIENCE", 0.0)
    samples, note = bench.cpu_times({"busy": busy}, 7, lambda: None)
    assert len(samples["busy"]) == bench.MIN_ROUNDS
    assert "DISTURBED" in note


def test_emptied_caches_hold_nothing_of_a_working_set():
    x = torch.ones(2**16)
    x_in_cache, x_in_memory = [], []
    empty_caches = bench.emptied_caches("cpu")
    for _ in range(20):
        for samples, before in ((x_in_cache, x.sum), (x_in_memory, empty_caches)):
            before()
            samples.append(bench.timed(x.sum)[0])
    assert min(x_in_memory) > 1.3 * min(x_in_cache)


def test_threads_are_set_and_recorded():
    assert bench.pin_threads(1) == 1
    assert bench.machine()["threads"] == 1
    assert bench.pin_threads() == len(os.sched_getaffinity(0))


# what is refused


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_a_right_result_of_the_named_backend_is_taken(op: str):
    args = args_of(op)
    truths = truths_of(op, args) if CASES[op].moved_backward else [bench.Truth.of(op, args, None)]
    most = 1e-3
    if op.endswith("_fp8"):  # half a step of e4m3 is 16 of 448; what is rounded is off itself
        most = float(truths[0].exact[0].abs().max()) / 28 + 1e-6
    assert 0 <= bench.verify(op, "reference", ours(op), args, *truths) < most


def test_a_product_in_int8_has_no_share_of_a_ceiling_and_its_weight_is_bytes():
    found = bench.measure("linear_int8", "compact", "fp32", rounds=3, only=("eager",))
    assert [row.share for row in found.rows] == [None, None]
    sizes = SHAPES["compact"]
    assert found.rows[0].bytes == 4 * 5 * sizes.stream + 4 * sizes.hidden**2
    assert "linear_int8" in bench.table(found.rows)


PLANTED = {
    "an error": lambda h: h + 1e-3 * h.abs().max(),
    "NaN": lambda h: h.index_fill(-1, torch.tensor([0]), float("nan")),
    "another dtype": lambda h: h.double(),
    "another shape": lambda h: h[:, 1:],
    "nothing but zeros": torch.zeros_like,
    "no gradient": lambda h: h.detach() + 0 * h,
}


@pytest.mark.parametrize("provider", ["reference", "eager"])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_result_is_refused(provider: str, fault: str):
    args = args_of("norm_modulate")
    plain = ours("norm_modulate") if provider == "reference" else reference.norm_modulate
    wrong = lambda **args: PLANTED[fault](plain(**args))  # noqa: E731
    bench.verify("norm_modulate", provider, plain, args, *truths_of("norm_modulate", args))
    with pytest.raises(WrongResult):
        bench.verify("norm_modulate", provider, wrong, args, *truths_of("norm_modulate", args))


def out_of_memory(x: Tensor, y: Tensor, gate: Tensor, txt_len: int) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_provider_that_is_wrong_or_fails_is_not_timed_and_ends_nothing():
    more = {"wrong": lambda x, y, gate, txt_len: x + y, "fails": out_of_memory}
    only = ("eager", *more)
    found = bench.measure("gated_residual", "odd", "fp32", only=only, more=more)
    assert [row.provider for row in found.rows] == ["copy", "eager"]
    assert "result 0 of gated_residual by wrong: max error" in found.failed["wrong"]
    assert found.failed["fails"] == "OutOfMemoryError: CUDA out of memory"


def test_where_nothing_is_right_nothing_is_timed():
    found = bench.measure("gated_residual", "odd", "fp32", only=("f",), more={"f": out_of_memory})
    assert found.rows == [] and list(found.failed) == ["f"]


def test_a_wrong_torch_compile_is_not_timed_and_its_error_is_given(
    monkeypatch: pytest.MonkeyPatch,
):
    right = bench.compare.providers

    def with_a_wrong_one(*args: object) -> tuple[dict, dict]:
        named, skipped = right(*args)
        return named | {"compile": lambda x, y, gate, txt_len: x + y}, skipped

    monkeypatch.setattr(bench.compare, "providers", with_a_wrong_one)
    found = bench.measure("gated_residual", "odd", "fp32", only=("eager", "compile"))
    assert found.row("compile") is None
    assert "max error must be" in found.skipped["compile"]


@pytest.mark.parametrize(
    "provider, run, found",
    [
        ("cpu", ours(OP), f"{OP} on reference"),
        ("eager", ours(OP), f"{OP} on reference"),
        ("reference", getattr(reference, OP), "none of ours"),
    ],
)
def test_a_result_of_another_backend_is_refused(provider: str, run: Callable, found: str):
    args = args_of(OP)
    with pytest.raises(WrongResult, match=f"{OP} by {provider}: {found} ran"):
        bench.verify(OP, provider, run, args, *truths_of(OP, args))


def test_a_backward_of_another_backend_is_refused():
    """The forward alone does not say who computes the gradients."""

    class Mixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, gate, txt_len):
            ctx.save_for_backward(x, y, gate)
            ctx.txt_len = txt_len
            return ops.gated_residual(x, y, gate, txt_len, backend="reference")

        @staticmethod
        def backward(ctx, dx_new):
            x, y, gate = ctx.saved_tensors
            dy, dgate = reference.gated_residual_backward(dx_new, y, gate, ctx.txt_len)
            return dx_new, dy, dgate, None

    args = args_of("gated_residual")
    forward, backward = truths_of("gated_residual", args)
    run = lambda x, y, gate, txt_len: Mixed.apply(x, y, gate, txt_len)  # noqa: E731
    bench.verify("gated_residual", "reference", run, args, forward)
    with pytest.raises(WrongResult, match="by reference: gated_residual on reference ran"):
        bench.verify("gated_residual", "reference", run, args, backward)


def test_a_kernel_alone_is_a_row_of_its_own_and_gives_the_bits_of_the_op():
    found = bench.measure("norm_modulate", "odd", "bf16", rounds=7, only=("eager", "cpu"))
    if "cpu" in found.skipped:
        pytest.skip(found.skipped["cpu"])
    assert [row.provider for row in found.rows] == ["copy", "eager", "cpu", "cpu kernel"]


@pytest.mark.parametrize(
    "wrong", [lambda *args: None, lambda *args: args[-1].zero_()], ids=["unwritten", "zeros"]
)
def test_a_kernel_alone_that_does_not_give_the_bits_of_the_op_is_refused(
    wrong: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench.compare, "private_op", lambda op, backend: wrong)
    with pytest.raises(WrongResult, match="reference kernel alone"):
        bench.kernels_alone("norm_modulate", args_of("norm_modulate"), {"reference": None})


def test_torch_compile_that_cannot_run_is_left_out_with_its_reason():
    def fails(**args: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    found = bench.measure(
        "gated_residual",
        "odd",
        "fp32",
        rounds=0,
        only=("eager", "compile"),
        more={"compile": fails},
    )
    assert found.skipped["compile"] == "RuntimeError: no C++ compiler"
    assert set(found.verified) == {"eager"}


def test_a_backend_of_ours_that_fails_is_not_left_out():
    def fails(**args: object) -> None:
        raise RuntimeError("launch failed")

    found = bench.measure("gated_residual", "odd", "fp32", only=("cpu",), more={"cpu": fails})
    assert found.failed == {"cpu": "RuntimeError: launch failed"} and not found.skipped.get("cpu")


def test_a_direction_without_a_backward_of_ours_is_refused():
    with pytest.raises(ValueError, match="qk_norm_rope_ has no backward of ours"):
        bench.measure("qk_norm_rope_", "odd", "fp32", "backward")


# rows


@pytest.mark.parametrize("direction, passes", [("forward", 4), ("backward", 6)])
def test_bytes_are_those_that_cannot_be_avoided(direction: str, passes: int):
    size, flops = bench.unavoidable(CASES[OP], SHAPES["flux-512"], torch.bfloat16, direction)
    assert (size, flops) == (passes * 1536 * 3072 * 2, 0)


def test_bytes_and_flops_of_both_directions_are_their_sum():
    both, forward, backward = (
        bench.unavoidable(CASES["attention"], SHAPES["compact"], torch.float32, direction)
        for direction in ("forward + backward", "forward", "backward")
    )
    assert both == tuple(a + b for a, b in zip(forward, backward, strict=True))
    assert forward[1] > 0


@pytest.fixture(scope="module")
def compared() -> bench.Comparison:
    only = ("eager", *(name for name in CASES[OP].backends))
    return bench.measure(OP, "compact", "fp32", "forward + backward", rounds=7, only=only)


def test_a_comparison_has_the_copy_eager_and_every_backend_that_runs_here(
    compared: bench.Comparison,
):
    why = bench.reasons(OP, args_of(OP))
    here = [name for name, reason in why.items() if reason is None]
    assert [row.provider for row in compared.rows] == ["copy", "eager", *here]
    assert compared.skipped == {name: reason for name, reason in why.items() if reason}
    assert set(compared.verified) == {"eager", *here}


def test_a_row_says_how_far_from_the_copy_and_how_much_faster_than_eager(
    compared: bench.Comparison,
):
    copy, eager = compared.row("copy"), compared.row("eager")
    size = 10 * SHAPES["compact"].stream * 4
    for row in compared.rows:
        assert row.bytes == size and len(row.seconds) >= 7
        assert row.share == bench.ratio(copy.seconds, row.seconds)
        assert row.times == {"eager": bench.ratio(eager.seconds, row.seconds)}
    assert copy.share == 1 and eager.max_error > 0 and copy.max_error is None


def test_a_row_of_products_is_held_to_the_larger_of_both_ceilings():
    found = bench.measure("linear", "compact", "fp32", rounds=7, only=("eager",))
    rate = bench.matrix_rate("cpu", torch.float32)
    row, copy = found.row("eager"), found.row("copy")
    limit = [max(seconds, row.flops / rate) for seconds in copy.seconds]
    assert row.share == bench.ratio(limit, row.seconds)
    assert row.flops / rate > min(copy.seconds)


def test_rows_are_shown_and_kept(compared: bench.Comparison, tmp_path: Path):
    text = bench.table(compared.rows).splitlines()
    assert len(text) == 2 + len(compared.rows) and OP in text[0]
    assert all(row.provider in line for row, line in zip(compared.rows, text[2:], strict=True))
    bench.write_json(tmp_path / "new" / "rows.json", [row.as_dict() for row in compared.rows])
    kept = json.loads((tmp_path / "new" / "rows.json").read_text())
    eager = compared.row("eager")
    assert kept[1]["median"] == pytest.approx(eager.median, rel=1e-3)
    assert kept[1]["iqr"] == pytest.approx(bench.spread(eager.seconds), rel=1e-3)
    assert kept[1]["rounds"] == len(eager.seconds)


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path):
    file = tmp_path / "rows.json"
    bench.write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        bench.write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


# ceilings, calls, machine


def test_copies_copy_the_bytes_they_are_measured_by():
    ops.explain()
    for name, copy in bench.copies(2**20, "cpu").items():
        names = zip(copy.__code__.co_freevars, copy.__closure__, strict=True)
        held = {name: cell.cell_contents for name, cell in names}
        source, target = held["source"], held["target"]
        source.uniform_()
        copy()
        assert torch.equal(target, source), name
        assert source.nbytes + target.nbytes == 2**20


def test_ceilings_are_measured():
    assert bench.copy_bandwidth("cpu", 2**20, 7) > 1e8
    assert bench.matrix_rate("cpu", torch.float32, 64) > 1e6


def test_a_call_is_measured_by_every_route():
    costs = bench.call_costs("gated_residual", rounds=7, calls=20)
    why = bench.reasons("gated_residual", args_of("gated_residual"))
    expected = [("reference", "public function"), ("reference", "torch op")]
    for name in (name for name, reason in why.items() if reason is None):
        expected += [(name, "public function"), (name, "torch op")]
        expected += [(name, "private op")] * (name != "triton")
    assert [(c.backend, c.route) for c in costs] == expected
    assert all(0 < c.microseconds < 1e5 for c in costs)


def test_the_machine_is_told_with_the_code_that_ran():
    found = json.loads(json.dumps(bench.machine()))
    assert found["versions"]["torch"] == torch.__version__
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert len(found["source"]) == 16
    if found["commit"]:
        head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        said = subprocess.run(head, capture_output=True, text=True, check=True).stdout
        assert said.startswith(found["commit"].removesuffix("-dirty"))


def test_our_code_follows_a_limit_of_torch():
    if not torch.cpu._is_avx2_supported():
        pytest.skip("this processor has no AVX2")
    program = (
        "import json, torch; from fluxkern import bench; bench.limit_isa(); "
        "print(json.dumps([bench.machine(), torch.cpu._is_avx512_bf16_supported()]))"
    )
    limits = dict.fromkeys(bench.LIMITS, "AVX2") | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | limits,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found, multiplies = json.loads(done.stdout)
    assert found["limits"] == limits and not multiplies
    assert found["cpu_capability"]["torch"] == "AVX2"
    assert found["cpu_capability"]["fluxkern"] in (None, "avx2")


# the suite


def test_the_suite_gives_pytest_benchmark_the_interleaved_samples(tmp_path: Path):
    """Its own flags work: the run is saved, and read by its own command."""
    file, saved = tmp_path / "rows.json", f"file://{tmp_path / 'saved'}"
    command = ["-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--shape", "compact"]
    command += ["--threads", "1", "-k", "gated_residual-fp32-forward- and not joint"]
    done = subprocess.run(
        [
            *(sys.executable, *command, "--benchmark-json", str(file)),
            *("--benchmark-autosave", "--benchmark-storage", saved),
        ],
        env={name: v for name, v in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    written = json.loads(file.read_text())
    machine, commit = written["machine_info"]["fluxkern"], written["commit_info"]
    assert machine["threads"] == 1 and {"cpu", "gpu", "cpu_capability"} < machine.keys()
    assert {"torch", "triton"} < machine["versions"].keys()
    assert {"commit", "dirty", "source", "clock", "load"} < commit.keys()
    rows = {row["params"]["provider"]: row for row in written["benchmarks"]}
    assert {"copy", "eager"} <= set(rows)
    size = 3 * SHAPES["compact"].stream * 4
    for row in rows.values():
        about, stats = row["extra_info"], row["stats"]
        assert about["bytes"] == size and stats["rounds"] >= 7
        assert about["median"] == pytest.approx(stats["median"], rel=1e-3)
    assert rows["copy"]["extra_info"]["share"] == 1
    assert rows["eager"]["extra_info"]["times"]["eager"] == 1
    (run,) = (tmp_path / "saved").rglob("0001_*.json")
    assert json.loads(run.read_text())["commit_info"]["source"] == bench.source_hash()
    compare = ["-c", "from pytest_benchmark.cli import main; main()", "--storage", saved]
    done = subprocess.run(
        [sys.executable, *compare, "compare", "0001"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("test_op[") == len(rows), done.stdout


# on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("direction", bench.DIRECTIONS)
def test_every_provider_is_replayed_as_a_graph_on_a_gpu(direction: str):
    found = bench.measure(OP, "compact", "bf16", direction, "cuda", rounds=7)
    assert {row.timer for row in found.rows} == {"CUDA events, cold L2, CUDA graph"}
    assert {"copy", "eager", "compile"} <= {row.provider for row in found.rows}
    assert all(min(row.seconds) > 0 for row in found.rows)


def test_every_shape_of_the_tables_can_be_named():
    assert not set(SHAPES) & set(TEST_SIZES)
