"""The suites against diffusers and their report: what is refused, clocked and shown."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import memory, products, profile, report, suite, whole
from benchmarks.blocks import DIRECTIONS, KINDS, Pair
from benchmarks.pipeline import WHOLES, Pipelines
from benchmarks.runs import Report, options
from benchmarks.whole import BASELINE, COMPILED, EAGER, INT8, OURS, TORCHAO, Provider, Truth
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
        start = time.perf_counter()
        pair.inputs.call_theirs(pair.theirs)()
        all_of_it = time.perf_counter() - start
    assert F.linear is before
    assert 0.002 * linears <= seconds["linears"] <= all_of_it - 0.02
    assert 0.02 <= seconds["attention"] <= all_of_it - 0.002 * linears


def test_our_linears_and_attention_are_clocked_by_the_names_of_the_ops(pair: Pair):
    call = pair.inputs.call_ours(pair.kind, pair.ours)
    with whole.our_parts() as seconds:
        call()
    assert seconds["linears"] > 0 and seconds["attention"] > 0
    with bench.watched() as ran:
        call()
    kinds = {op: profile.kind_of(f"fluxkern::{op}") for op, _ in ran}
    assert {"linears", "attention"} < set(kinds.values())
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blocks_are_verified_against_diffusers_in_every_dtype(pair: Pair, direction: str):
    for dtype in ("fp32", "bf16"):
        found = pair.measure(dtype, direction, rounds=0, only=WITHOUT_COMPILE)
        assert found.rows == [] and set(found.verified) == set(WITHOUT_COMPILE)
    assert found.verified[BASELINE] > 1e-3


def test_gradients_of_a_block_are_those_of_its_streams_and_vec(pair: Pair):
    inputs, tiny = pair.inputs, 1e-3
    with_more = replace(inputs, vec=inputs.vec + tiny)
    out, moved = (of.call_theirs(pair.theirs)() for of in (inputs, with_more))
    grown = sum(
        ((m - o) * d).sum() for m, o, d in zip(moved, out, pair.truth().start[:2], strict=True)
    )
    *_, dvec = pair.inputs.call_ours(pair.kind, pair.ours, "forward + backward")()
    assert float(grown / tiny) == pytest.approx(float(dvec.sum()), rel=0.1)


@pytest.fixture
def wrong_pair(pair: Pair) -> Iterator[Pair]:
    """One number of one weight of ours is wrong; what is not joined is diffusers' own memory."""
    layer = pair.ours.img_attn.qkv if pair.kind == "double" else pair.ours.linear1
    weight = layer.weight.data
    kept = weight[0, 0].item()
    weight[0, 0] += 0.1
    yield pair
    weight[0, 0] = kept


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_block_is_not_timed(
    wrong_pair: Pair, direction: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "cpu_times", lambda *_: pytest.fail("a wrong result was timed"))
    found = wrong_pair.measure("fp32", direction, rounds=0, only=WITHOUT_COMPILE)
    assert "by fluxkern: relative L2 must be at most" in found.failed[whole.OURS]


def test_a_block_without_its_kernels_is_not_timed(pair: Pair, use_backend: Callable):
    if ops.compiled_kernels()["_C_cpu"]:
        pytest.skip("the CPU kernels are not built")
    use_backend("reference")
    found = pair.measure("fp32", rounds=0, only=WITHOUT_COMPILE)
    assert "ran on reference, not on cpu" in found.failed[whole.OURS]


def ones(call: Callable[[], object]) -> Provider:
    """Runs something, and gives what is right."""
    return Provider(lambda: (call(), torch.ones(1))[1:], 0.0)


ONES = Truth((torch.ones(1),), (torch.zeros(1),))


def test_what_should_run_our_ops_must_run_some():
    silent = {"diffusers accelerated": replace(ones(lambda: None), ours=True)}
    found = whole.measure("rest", "one", "fp32", silent, ONES)
    assert found.rows == [] and "none of our ops ran" in found.failed["diffusers accelerated"]


def test_the_reference_must_be_what_ran_where_it_is_timed():
    x = torch.ones(1, 2, 4)

    def on(backend: str) -> Provider:
        return ones(lambda: ops.gelu_tanh(x, backend=backend))

    refused = {"none of our ops": ones(lambda: None)}
    if not ops.compiled_kernels()["_C_cpu"]:
        refused["gelu_tanh on cpu"] = on("cpu")
    for said, provider in refused.items():
        found = whole.measure("rest", "one", "fp32", {EAGER: provider}, ONES, rounds=0)
        assert f"must run, got {said}" in found.failed[EAGER]
    found = whole.measure("rest", "one", "fp32", {EAGER: on("reference")}, ONES, rounds=0)
    assert found.verified == {EAGER: 0.0}
    found = whole.measure("rest", "one", "fp32", {BASELINE: on("reference")}, ONES, rounds=0)
    assert "diffusers must run none of our ops, got gelu" in found.failed[BASELINE]


def test_a_backward_of_ours_has_its_kernel_too():
    assert whole.kernels_of("gelu_tanh_backward", "cpu") == {"cpu"}
    assert "cuda-wgmma" not in whole.kernels_of("attention", "cpu")


@pytest.mark.parametrize("op", ["attention", "attention_backward", "rope_attention"])
def test_a_second_kernel_and_those_of_others_are_kernels_of_a_gpu(op: str):
    assert whole.kernels_of(op, "cuda") >= {"cuda", "triton", "cuda-wgmma"}
    assert whole.kernels_of("norm_modulate", "cuda") == {"cuda", "triton"}
    assert whole.kernels_of("linear_backward", "cpu") == set()  # torch's
    assert {"triton", "cudnn"} < whole.kernels_of("attention", "cuda")


@pytest.mark.parametrize("installed", ["broken", "inaccurate"])
def test_a_torchao_that_fails_or_is_wrong_is_one_row_less(
    pair: Pair, installed: str, monkeypatch: pytest.MonkeyPatch
):
    def quantized(block: nn.Module) -> nn.Module:
        if installed == "broken":
            raise ImportError("no torchao")
        for weight in block.parameters():
            weight.data *= 1.1
        return block

    versions = bench.peers.installed() | {"torchao": "9.9"}
    monkeypatch.setattr(bench.peers, "installed", lambda: versions)
    monkeypatch.setattr(bench.peers, "torchao_int8", quantized)
    found = pair.measure("fp32", rounds=0, only=(*WITHOUT_COMPILE, TORCHAO))
    assert set(found.verified) == {*WITHOUT_COMPILE}
    if installed == "broken":
        assert found.failed == {TORCHAO: "ImportError: no torchao"} and not found.skipped
    else:
        assert "must be at most 0.02, got " in found.skipped[TORCHAO] and not found.failed
    monkeypatch.setattr(bench.peers, "torchao_int8", lambda _: pytest.fail("nobody asked for it"))
    assert set(pair.measure("fp32", rounds=0, only=(BASELINE,)).verified) == {BASELINE}


def test_a_torch_compile_that_fails_is_left_out_with_its_reason(pair: Pair):
    def fails() -> None:
        raise RuntimeError("no C++ compiler\nand more")

    providers = pair.providers("fp32") | {COMPILED: Provider(fails, 1.0)}
    found = whole.measure("block", "tiny", "fp32", providers, pair.truth(), rounds=7)
    assert found.skipped == {COMPILED: "RuntimeError: no C++ compiler"}
    assert not found.failed
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
    about = {"op": "gated_residual", "direction": "forward", "dtype": "fp32", "shape": "flux-512"}
    found = {"median": median, "share": share, "times": {"eager": 2e-3 / median}}
    return about | ROW | found | {"provider": provider}


def planted() -> report.Results:
    parts = {"linears": 0.7, "attention": 0.1, "rest": 0.2}
    common = {
        "machine": MACHINE,
        "refused": [],
        "skipped": {},
        "seconds": 61,
        "peers": {"xformers": None},
    }
    rows = [op_row("copy", 1e-3, 1.0), op_row("eager", 2e-3, 0.5), op_row("cpu", 1.25e-3, 0.8)]
    ceilings = {"copy GB/s": 17.5}
    return {
        "ops": common | {"rows": rows, "ceilings": ceilings},
        "blocks": common
        | {
            "memory": [],
            "rows": [whole_row(BASELINE, 2.0, 1.0, parts), whole_row(OURS, 1.6, 1.25, parts)],
        },
    }


def planted_suites() -> report.Results:
    """Of step, quality and scaling."""
    common = {"machine": MACHINE, "refused": [], "skipped": {}, "seconds": 61}
    parts = {"linears": 0.7, "attention": 0.1, "rest": 0.2}
    rows = [whole_row(BASELINE, 2.0, 1.0, parts), whole_row(OURS, 1.6, 1.25, parts)]
    shares = {"diffusers": {"linears": 1.0}, OURS: {"linears": 0.75, "attention": 0.25}}
    kinds = [{"what": "step", "size": "tiny", "dtype": "fp32", "shares": shares}]
    counts = {"config": "dev", "size": 1024, "TFLOP": 74.38, "GB": 68.2, "least GB": 57.3}
    times = {"what": "picture", "size": "tiny", "provider": OURS, "times": {"fp32": 1.5}} | ROW
    mode = {"blocks": {"double 0": 1e-3}, "steps": [1e-2, 2e-3], "psnr": [50.0], "ssim": [0.99]}
    grown = [
        {"what": f"tokens, {n}", "axis": "tokens", "count": n, "size": "tiny", "median": n * 1e-3}
        | {"kinds": {"attention": n * 1e-4, "rest": n * 9e-4}, "peak": n * 1000, "provider": OURS}
        | ROW
        for n in (256, 512)
    ]
    powers = {"tokens": {"time": 1.25, "attention": 1.98, "rest": 1.0, "memory": 1.0}}
    return {
        "step": common | {"rows": rows, "kinds": kinds, "counts": [counts | {"why": "because"}]},
        "quality": common
        | {"modes": {"int8": mode}, "rows": [times | {"dtype": d, "median": 0.2} for d in MODES]},
        "scaling": common | {"exponents": powers, "rows": grown},
    }


MODES = ("fp32", "int8")


def test_step_quality_and_scaling_are_shown_in_figures():
    shown = report.text({"here": planted_suites()})
    for line in (
        "| linears | 100% | 75% |",
        "| attention |  | 25% |",
        "A step of dev at 1024 px has 74.38 TFLOP in its products and moves 68.2 GB in bf16,",
        "| int8 | 1.0e-03 to 1.0e-03 | 1.0e-02 | 2.0e-03 | 50.0 | 50.0 | 0.9900 | 200 † | 1.50 |",
        "| tokens | 1.25 | 1.98 | 1.00 | 1.00 |",
        "| tokens, 512 † | 512.0 | 1.0 | 51.2 | 460.8 | 0.5 |",
    ):
        assert line in shown


def test_a_result_is_shown_with_its_machine_commit_and_disturbance():
    shown = report.text({"here": planted()})
    block = "| double block, tiny † | fp32 | fluxkern | 1600 | 1 | 7 | 1.25 |  | 100% | 1e-06 |"
    assert block in shown
    assert "| `gated_residual` † | forward | fp32 | 2000 |  | cpu | 1250 | 1.60 |  | 80% |" in shown
    assert (
        "| 2026-01-02 | `abcdef123456` | 61 | 0.5 |" in shown
        and "ATEN_CPU_CAPABILITY=avx2" in shown
    )
    assert "Peers on that machine: xformers absent." in shown
    assert "17.5" in shown and report.DISTURBED in shown


def test_what_was_not_timed_is_told_row_by_row_but_not_what_this_machine_lacks(tmp_path: Path):
    file = tmp_path / "here" / "ops.json"
    found = Report("ops", options("ops", None, 3).parse_args(["--json", str(file)]))
    for row in ("a", "b"):
        skipped = {"compile": f"{row} is wrong", "triton": "no CUDA device"}
        found.add(row, lambda skipped=skipped: bench.Comparison([], {}, skipped), str)
    kept = report.read(file)["skipped"]
    why = {"a by compile": "a is wrong", "b by compile": "b is wrong"}
    assert kept == why | {"triton": "no CUDA device"}
    results = planted()
    results["ops"] |= {"skipped": kept}
    shown = report.text({"here": results})
    assert all(f"Not timed: {what}: {said}" in shown for what, said in why.items())
    assert "no CUDA device" not in shown


def test_a_result_of_uncommitted_code_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, ending in (("ops", ""), ("blocks", "-dirty")):
        data = planted()[name]
        data = data | {"machine": data["machine"] | {"commit": f"abcdef{ending}"}}
        bench.write_json(tmp_path / "here" / f"{name}.json", data)
    assert list(report.results(tmp_path)["here"]) == ["ops"]
    said = capsys.readouterr().out
    assert said.count("left out") == 1 and "blocks.json is of abcdef-dirty" in said


def test_a_share_that_is_not_known_is_not_shown(tmp_path: Path):
    from benchmarks.plots import draw

    results = planted()
    unknown = [row | {"op": "linear_int8", "share": None} for row in results["ops"]["rows"]]
    results["ops"] |= {"rows": results["ops"]["rows"] + unknown}
    row = "| `linear_int8` † | forward | fp32 | 2000 |  | cpu | 1250 | 1.60 |  |  |  |"
    assert row in report.text({"here": results})
    draw("here", results, tmp_path)
    assert (tmp_path / "here-roofline.png").exists()


def test_each_shape_of_the_ops_has_its_table_and_its_panels(tmp_path: Path):
    from benchmarks.plots import draw, panels

    results = planted()
    rows = results["ops"]["rows"]
    larger = [row | {"shape": "flux-2048-batch-4", "median": 9 * row["median"]} for row in rows]
    results["ops"] |= {"rows": rows + larger}
    tables = report.text({"here": results}).split("Shape `")[1:]
    assert [t.partition("`")[0] for t in tables] == ["flux-512", "flux-2048-batch-4"]
    assert "| cpu | 1250 |" in tables[0] and "| cpu | 11250 |" in tables[1]
    assert [title for title, _ in panels(rows + larger)] == [
        f"forward, fp32, {shape}" for shape in ("flux-2048-batch-4", "flux-512")
    ]
    draw("here", results, tmp_path)
    assert len([*tmp_path.iterdir()]) == len(report.plots_of("here", results))


def test_the_drop_in_is_shown_from_its_files(tmp_path: Path):
    loop = {"what": "diffusers' loop", "size": "64 px", "dtype": "fp32"} | ROW
    loop |= {"times": {BASELINE: 1.2}, "of_bound": 0.6, "error": 1e-7, "median": 0.2}
    errors = {"original": 0.01, "accelerated": 0.009, "ratio": 0.9}
    rows = {
        "loop": [loop | {"provider": "diffusers accelerated"}],
        "accuracy": [{"pipeline": "FluxPipeline", "models": errors, "latents": errors}],
    }
    for name, found in rows.items():
        data = planted()["ops"] | {"rows": found}
        bench.write_json(tmp_path / "here" / "diffusers" / f"{name}.json", data)
    shown = report.text(report.results(tmp_path))
    assert "| diffusers' loop, 64 px † | fp32 | diffusers accelerated | 200 |" in shown
    assert "| FluxPipeline | 0.01 | 0.009 | 0.9 | 0.01 | 0.009 | 0.9 |" in shown
    assert "`diffusers/loop.json`" in shown


def test_every_plot_that_is_named_is_drawn(tmp_path: Path):
    from benchmarks.plots import draw

    results = planted() | planted_suites()
    draw("here", results, tmp_path)
    drawn = {file.name: file.read_bytes()[:4] for file in tmp_path.iterdir()}
    assert drawn == dict.fromkeys(report.plots_of("here", results), b"\x89PNG")
    assert len(drawn) == len(report.PLOTTED)


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
    asked = [
        "--suite",
        "ops",
        "--shape",
        "compact",
        "--json",
        "o.json",
        "--threads",
        "1",
        "--compare",
        "old",
        "new",
    ]
    assert main(["bench", *asked, "--profile", "p.json.gz"]) == 1
    (args, module, cwd) = ran[0]
    assert (module, cwd) == ("benchmarks.suite", bench.ROOT)
    assert (args.suite, args.json, args.threads) == (["ops"], tmp_path / "o.json", 1)
    assert args.shape == ["compact"]
    assert args.compare == [tmp_path / "old", tmp_path / "new"]
    assert args.profile == tmp_path / "p.json.gz"
    assert not args.report and args.plots is None


def test_options_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture):
    assert main(["bench", "--compare", "a", "b", "c"]) == 2
    assert main(["bench", "--threads", "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "--compare must be one file or two, got 3" in said[0] and "--threads" in said[1]


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
