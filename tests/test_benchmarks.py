"""The suites against diffusers and their report: what is refused, clocked and shown."""

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import memory, products, report, suite, whole
from benchmarks.blocks import KINDS, Pair
from benchmarks.pipeline import WHOLES, Pipelines
from benchmarks.whole import BASELINE, COMPILED, INT8, OURS, Provider, Truth
from fluxkern import bench, ops
from fluxkern.cases import Sizes
from fluxkern.cli import main

TINY = Sizes(1, 6, 4, 64, 2, 32, skip=0, spare=0)
WITHOUT_COMPILE = (BASELINE, OURS)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param, TINY)


@pytest.fixture
def slow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear takes 2 ms more, attention 20."""

    def slowed(function: Callable, seconds: float) -> Callable:
        def slow(*args: object, **named: object) -> torch.Tensor:
            time.sleep(seconds)
            return function(*args, **named)

        return slow

    for name, seconds in (("linear", 0.002), ("scaled_dot_product_attention", 0.02)):
        monkeypatch.setattr(F, name, slowed(getattr(F, name), seconds))


# wholes


def test_every_linear_and_the_attention_of_diffusers_block_are_clocked(
    pair: Pair, slow_products: None
):
    linears = sum(isinstance(module, nn.Linear) for module in pair.theirs.modules())
    before = F.linear
    with whole.torch_parts() as seconds:
        pair.inputs.call_theirs(pair.theirs)()
    assert F.linear is before
    assert 0.002 * linears <= seconds["linears"] < 0.002 * linears + 0.2
    assert 0.02 <= seconds["attention"] < 0.2


def test_our_linears_and_attention_are_clocked_by_the_names_of_the_ops(pair: Pair):
    ops.explain()  # finds all backends
    before = {name: dict(found) for name, found in ops._dispatch._registry.items()}
    call = pair.inputs.call_ours(pair.kind, pair.ours)
    with whole.our_parts() as seconds:
        call()
    assert seconds["linears"] > 0 and seconds["attention"] > 0
    assert ops._dispatch._registry == before
    with bench.watched() as ran:
        call()
    kinds = {op: whole.kind_of(op) for op, _ in ran}
    assert {"linears", "attention", None} == set(kinds.values())
    assert {op for op in kinds if "linear" in op or op == "modulation"} == {
        op for op, kind in kinds.items() if kind == "linears"
    }


def test_the_parts_and_the_rest_are_the_whole(pair: Pair):
    eager = pair.inputs.call_theirs(pair.theirs)
    shares, seconds = whole.taken_apart(Provider(eager, 0.0, whole.torch_parts), 3)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert seconds > 0


def resting(seconds: float, products: float = 0.0) -> tuple[torch.Tensor, ...]:
    """A call with a linear of `products` seconds, by the fixture above 2 ms each."""
    time.sleep(seconds)
    for _ in range(round(products / 0.002)):
        F.linear(torch.ones(1, 1), torch.ones(1, 1))
    return (torch.ones(1),)


def test_the_bound_is_the_baseline_with_all_but_its_products_made_free(slow_products: None):
    providers = {
        BASELINE: Provider(partial(resting, 0.05, 0.05), 0.0, whole.torch_parts),
        OURS: Provider(partial(resting, 0.1), 0.0),
    }
    truth = Truth((torch.ones(1),), (torch.zeros(1),))
    found = whole.measure("rest", "one", "fp32", providers, truth, rounds=7)
    theirs, ours = found.row(BASELINE), found.row(OURS)
    assert theirs.of_bound == pytest.approx(0.5, abs=0.1)  # half of it is products
    assert theirs.of_bound == 1 - theirs.parts["rest"]
    assert ours.of_bound == theirs.of_bound * ours.times[BASELINE]
    assert ours.times[BASELINE] == pytest.approx(1, abs=0.2)
    assert theirs.profiled == pytest.approx(1, abs=0.2)


def test_an_error_is_of_what_changed():
    start, right = torch.full((8,), 100.0), torch.full((8,), 101.0)
    assert Truth((right,), (start,)).error((right + 0.01,)) == pytest.approx(0.01, rel=1e-3)


def test_blocks_are_verified_against_diffusers_in_every_dtype(pair: Pair):
    for dtype in ("fp32", "bf16"):
        found = pair.measure(dtype, rounds=0, only=WITHOUT_COMPILE)
        assert found.rows == [] and set(found.verified) == set(WITHOUT_COMPILE)
    assert found.verified[BASELINE] > 1e-3


@pytest.fixture
def wrong_pair(pair: Pair) -> Iterator[Pair]:
    """One number of one weight of ours is wrong; what is not joined is diffusers' own memory."""
    layer = pair.ours.img_attn.qkv if pair.kind == "double" else pair.ours.linear1
    weight = layer.weight.data
    kept = weight[0, 0].item()
    weight[0, 0] += 0.1
    yield pair
    weight[0, 0] = kept


def test_a_wrong_block_is_not_timed(wrong_pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "cpu_times", lambda *_: pytest.fail("a wrong result was timed"))
    with pytest.raises(bench.WrongResult, match="block by fluxkern: relative L2 must be at most"):
        wrong_pair.measure("fp32", only=WITHOUT_COMPILE)


def test_a_block_without_its_kernels_is_not_timed(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    if ops.compiled_kernels()["_C_cpu"]:
        pytest.skip("the CPU kernels are not built")
    monkeypatch.setattr(ops._dispatch, "DEFAULT_BACKEND", "reference")
    with pytest.raises(bench.WrongResult, match="ran on reference, not on cpu"):
        pair.measure("fp32", only=WITHOUT_COMPILE)


def test_a_torch_compile_that_fails_is_left_out_with_its_reason(pair: Pair):
    def fails() -> None:
        raise RuntimeError("no C++ compiler\nand more")

    providers = pair.providers("fp32") | {COMPILED: Provider(fails, 1.0)}
    found = whole.measure("block", "tiny", "fp32", providers, pair.truth, rounds=7)
    assert found.skipped == {COMPILED: "RuntimeError: no C++ compiler"}
    assert [row.provider for row in found.rows] == [BASELINE, OURS, INT8]
    assert 1e-3 < found.verified[INT8] < 2e-2
    shown = whole.table(found.rows)
    assert OURS in shown and "attention" in shown
    kept = json.loads(json.dumps([row.as_dict() for row in found.rows]))
    assert kept[1]["rounds"] >= 7 and "seconds" not in kept[1]


def test_loop_and_picture_are_those_of_diffusers():
    pipelines = Pipelines(steps=2)
    for what in WHOLES:
        assert set(pipelines.measure(what, rounds=0, only=WITHOUT_COMPILE).verified) == {
            *WITHOUT_COMPILE
        }
    assert pipelines.levels()["largest"] <= 1


def test_peak_memory_is_of_the_call_and_the_weights(monkeypatch: pytest.MonkeyPatch):
    block = nn.Linear(1024, 1024, bias=False)
    taken = []

    def call() -> None:
        taken.append(torch.ones(2**24).nbytes)

    monkeypatch.setattr(memory, "block_and_call", lambda *_: (block, call))
    found = memory.peak("double", "fp32", OURS, "compact")
    assert found["weights"] == 4 * 1024**2
    assert len(taken) == 2 and 2**25 < found["peak"] < 2**28
    assert found["ratio"] == round(found["peak"] / found["weights"], 3)


# results and report


def test_a_row_is_a_line_of_its_file(tmp_path: Path):
    file, data = tmp_path / "rows.json", {"machine": {"a": 1}, "rows": [{"x": [1]}, {"x": [2]}]}
    bench.write_json(file, data)
    assert json.loads(file.read_text()) == data
    assert [line.strip() for line in file.read_text().splitlines()].count('{"x": [1]},') == 1


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "a-b-c-1-avx512-2-threads"),
        ({"limits": {"ATEN_CPU_CAPABILITY": "avx2"}}, "a-b-c-1-as-avx512-2-threads"),
        ({"gpu": {"name": "NVIDIA H100"}}, "nvidia-h100-2-threads"),
    ],
)
def test_a_machine_has_a_folder(changes: dict, name: str):
    machine = {"cpu": "A(B) C-1", "limits": {}, "gpu": None, "threads": 2}
    machine |= {"cpu_capability": {"torch": "AVX512"}}
    assert suite.place(machine | changes) == name


def test_the_document_is_what_the_committed_results_give():
    assert report.DOC.read_text(encoding="utf-8") == report.text(report.results())


def test_the_document_shows_the_plots_that_are_there_and_no_others():
    shown = set(re.findall(r"\]\(performance/(.+?)\)", report.DOC.read_text(encoding="utf-8")))
    assert shown == {file.name for file in report.PLOTS.glob("*.png")}


def test_without_a_file_there_is_no_figure(tmp_path: Path):
    assert report.text(report.results(tmp_path)) == report.HEAD


ROW = {"timer": "host clock; DISTURBED by other programs", "iqr": 0.001, "rounds": 7}
MACHINE = {
    "time": "2026-01-02T03:04:05+00:00",
    **{"cpu": "CPU", "threads": 2, "gpu": None, "load": 0.5, "commit": "abcdef123456"},
    "limits": {"ATEN_CPU_CAPABILITY": "avx2"},
    "cpu_capability": {"torch": "AVX2", "fluxkern": "avx2"},
    "versions": {"torch": "2.0", "diffusers": "0.1"},
}


def whole_row(provider: str, median: float, times: float, parts: dict | None) -> dict:
    about = {"what": "double block", "size": "tiny", "dtype": "fp32", "provider": provider}
    found = {"median": median, "times": {BASELINE: times}, "parts": parts, "error": 1e-6}
    return about | ROW | found | {"of_bound": 0.8 * times, "profiled": 1.0}


def op_row(provider: str, median: float, share: float) -> dict:
    about = {"op": "gated_residual", "direction": "forward", "dtype": "fp32"}
    found = {"median": median, "share": share, "times": {"eager": 2e-3 / median}}
    return about | ROW | found | {"provider": provider}


def planted() -> report.Results:
    parts = {"linears": 0.7, "attention": 0.1, "rest": 0.2}
    common = {"machine": MACHINE, "refused": [], "seconds": 61}
    rows = [op_row("copy", 1e-3, 1.0), op_row("eager", 2e-3, 0.5), op_row("cpu", 1.25e-3, 0.8)]
    ceilings = {"copy GB/s": 17.5}
    return {
        "ops": common | {"rows": rows, "shape": "flux-512", "ceilings": ceilings},
        "blocks": common
        | {
            "memory": [],
            "rows": [whole_row(BASELINE, 2.0, 1.0, parts), whole_row(OURS, 1.6, 1.25, parts)],
        },
    }


def test_a_result_is_shown_with_its_machine_commit_and_disturbance():
    shown = report.text({"here": planted()})
    block = "| double block, tiny † | fp32 | fluxkern | 1600 | 1 | 7 | 1.25 |  | 100% | 1e-06 |"
    assert block in shown
    assert "| `gated_residual` † | forward | fp32 | 2000 |  | cpu | 1250 | 1.60 |  | 80% |" in shown
    assert (
        "| 2026-01-02 | `abcdef123456` | 61 | 0.5 |" in shown
        and "ATEN_CPU_CAPABILITY=avx2" in shown
    )
    assert "17.5" in shown and report.DISTURBED in shown


def test_every_plot_that_is_named_is_drawn(tmp_path: Path):
    from benchmarks.plots import draw

    draw("here", planted(), tmp_path)
    drawn = {file.name: file.read_bytes()[:4] for file in tmp_path.iterdir()}
    assert drawn == dict.fromkeys(report.plots_of("here", planted()), b"\x89PNG")


# the command


def test_the_command_hands_its_options_to_the_suites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran = []

    def run(command: list[str], cwd: Path):
        ran.append((suite.parsed(command[3:]), command[2], cwd))
        return type("Done", (), {"returncode": 3})

    monkeypatch.setattr("fluxkern.cli.subprocess.run", run)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--suite", "ops", "--json", "o.json", "--threads", "1"]) == 1
    (args, module, cwd) = ran[0]
    assert (module, cwd) == ("benchmarks.suite", bench.ROOT)
    assert (args.suite, args.json, args.threads) == (["ops"], tmp_path / "o.json", 1)
    assert not args.report and args.plots is None


def test_options_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture):
    assert main(["bench", "--json", "all.json"]) == 2
    assert main(["bench", "--threads", "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "--json FILE needs one --suite" in said[0] and "--threads" in said[1]


# products


def small_products() -> Iterator[tuple]:
    yield from products.linear(5, 32, 48)
    yield from products.attention(3)
    yield from products.gelu(4, 40)


def test_products_are_held_to_fp64_and_timed_in_turn():
    for what, dtype, calls, truth in small_products():
        rows = products.measure(what, dtype, calls, truth, bench.MIN_ROUNDS).rows
        assert [row.provider for row in rows] == [*calls] and calls.keys() >= {"fluxkern"}
        assert all(set(row.times) == calls.keys() - {row.provider} for row in rows)


def test_a_product_that_is_wrong_is_not_timed():
    what, dtype, calls, truth = next(products.linear(5, 32, 48))
    with pytest.raises(bench.WrongResult, match="by fluxkern: relative L2 must be"):
        products.measure(what, dtype, {"fluxkern": calls["fluxkern"]}, 1.1 * truth, 3)
