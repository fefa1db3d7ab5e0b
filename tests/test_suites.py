"""The suites beyond ops and blocks at small sizes: step, quality, scaling, profile, the driver."""

import gzip
import importlib.machinery
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import blocks, profile, quality, scaling, step, suite
from benchmarks import ops as benchmarks_ops
from benchmarks.whole import BASELINE, OURS
from fluxkern import bench, cli
from fluxkern.ops import _backends


@pytest.fixture(scope="module")
def model() -> step.Model:
    return step.Model("compact", 64, "bf16", "cpu")


def test_a_step_is_held_to_the_same_weights_in_fp32(model: step.Model):
    only = ("eager", OURS, BASELINE)
    found = model.measure("step", rounds=0, only=only)
    assert set(found.verified) == set(only)
    assert 1e-4 < found.verified[OURS] < 5e-2


def test_the_weights_are_as_before_when_the_right_result_is_known(model: step.Model):
    before = model.step()[0]
    exact = model.exact("step")[0]
    assert exact.dtype == torch.float32 and not torch.equal(exact, before.float())
    assert {p.dtype for p in model.flux.parameters()} == {torch.bfloat16}
    assert torch.equal(model.step()[0], before)


def test_a_step_without_diffusers_says_so_and_a_broken_one_is_an_error(
    model: step.Model, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    with monkeypatch.context() as here:
        here.setattr(importlib.util, "find_spec", lambda n: None if n == "diffusers" else found(n))
        measured = model.measure("step", rounds=0, only=("eager", OURS))
    assert measured.skipped == {BASELINE: "it is not installed"}
    broken = types.ModuleType("diffusers")  # there, without what we import
    broken.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers", broken)
    with pytest.raises(ImportError):
        model.measure("step", rounds=0, only=("eager", OURS))


def test_one_provider_alone_is_timed(model: step.Model):
    (row,) = model.measure("step", rounds=3, only=(OURS,)).rows
    assert row.provider == OURS and row.of_bound is None and row.times == {}


def test_nothing_is_kept_of_the_kinds_of_a_step_that_was_not_timed(tmp_path: Path):
    file = tmp_path / "step.json"
    asked = ["--rounds", "0", "--size", "64", "--dtype", "bf16", "--only", "eager", OURS]
    assert step.main([*asked, "--json", str(file), "--threads", "1"]) == 0
    assert json.loads(file.read_text())["kinds"] == []


def test_a_wrong_step_is_refused(model: step.Model, plant: Callable):
    """Our model's kernel of the attention is wrong, its reference is right."""
    cpu = _backends.find("attention", "cpu")
    if isinstance(cpu, str):
        pytest.skip(cpu)
    plant("attention", replace(cpu, run=lambda *args: -3 * cpu.run(*args)))
    found = model.measure("step", rounds=0, only=("eager", OURS))
    assert "step by fluxkern: relative L2 must be at most" in found.failed[OURS]


def test_the_time_of_a_call_goes_to_the_kinds_of_its_operators():
    x, y = torch.ones(256, 256), torch.ones(1, 2, 64, 32)

    def call() -> None:
        torch.nn.functional.linear(x, x)
        torch.nn.functional.scaled_dot_product_attention(y, y, y)
        time.sleep(0.05)

    shares = profile.shares(call, "cpu")
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["linears"] > 0 and shares["attention"] > 0
    assert shares[profile.REST] > 0.5


def test_peak_memory_is_what_is_held_at_once():
    def call() -> None:
        for _ in range(3):
            torch.ones(2**18)  # a megabyte each, one after another

    assert 2**20 <= profile.peak_memory(call, "cpu") < 2**21


def test_a_profile_is_a_trace_with_the_names_of_the_ops(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    file = tmp_path / "new" / "out.json.gz"
    before = torch.get_num_threads()
    assert profile.write(file, 1) == 0
    torch.set_num_threads(before)
    with gzip.open(file) as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert {"fluxkern::rope_attention", "fluxkern::modulation", "fluxkern::linear_"} <= names
    said = capsys.readouterr().out
    for row in (
        "ms, profiled",
        "kernels",
        "GB moved, x the least",
        "peak MB",
        "linears",
        "attention",
    ):
        assert row in said


def test_an_exponent_is_the_slope_of_the_large_values():
    counts = [1, 2, 4, 8, 16]
    assert scaling.exponent(counts, [5.0 + c * c for c in counts]) < 2
    assert scaling.exponent(counts, [float(c * c) for c in counts]) == pytest.approx(2)
    bent = [100.0, *(float(c) for c in counts[1:])]
    assert scaling.exponent(counts, bent) == pytest.approx(1)


def test_time_and_memory_of_a_step_are_measured_against_its_tokens(model: step.Model):
    small = step.Model("compact", 64, "fp32", "cpu")
    rows = scaling.measure("tokens", small, [16, 32, 64], rounds=3).rows
    found = [row.as_dict() for row in rows]
    assert [row["count"] for row in found] == [80, 96, 128]
    assert found[0]["peak"] < found[1]["peak"]
    for row in rows:
        assert sum(row.kinds.values()) == pytest.approx(statistics.median(row.seconds))
    assert all(0 < row.error <= step.FP32_LIMIT for row in rows)
    assert set(scaling.exponents(found)["tokens"]) == {"time", "attention", "rest", "memory"}
    assert scaling.exponents(found[:2]) == {}  # a line goes through any two


@pytest.fixture
def wrong_attention(plant: Callable) -> None:
    """Our model's kernel of the attention is wrong, its reference is right."""
    for op in ("attention", "rope_attention"):
        cpu = _backends.find(op, "cpu")
        if isinstance(cpu, str):
            pytest.skip(cpu)
        plant(op, replace(cpu, run=lambda *args, cpu=cpu: -3 * cpu.run(*args), write=None))


@pytest.mark.parametrize("axis", ["tokens", "batch", "steps"])
def test_what_grows_is_not_timed_when_it_is_wrong(
    axis: str, wrong_attention: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "cpu_times", lambda *_: pytest.fail("a wrong result was timed"))
    small = step.Model("compact", 64, "fp32", "cpu")
    monkeypatch.setitem(scaling.BASE, "cpu", 16)
    with pytest.raises(bench.WrongResult, match=f"{axis}, 2 by fluxkern: relative L2 must be"):
        scaling.measure(axis, small, [2], rounds=3)


def test_modes_are_held_to_the_reference_before_they_are_timed(
    monkeypatch: pytest.MonkeyPatch, use_backend: Callable
):
    monkeypatch.setattr(quality, "STEPS", 2)
    modes = {name: quality.Mode(name) for name in ("fp32", "bf16")}
    errors = quality.timed(modes, 0).verified
    assert 0 < errors["fp32"] < 1e-5 < errors["bf16"] < 3e-2
    use_backend("reference")
    with pytest.raises(bench.WrongResult, match="ran on reference, not on cpu"):
        quality.timed(modes, 0)


def test_a_wrong_mode_is_not_timed(wrong_attention: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "STEPS", 2)
    with pytest.raises(bench.WrongResult, match="loop by fp32: relative L2 must be at most"):
        quality.timed({"fp32": quality.Mode("fp32")}, 0)


def test_a_suite_that_a_signal_ends_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ended = {"products": 0, "quality": -9}
    monkeypatch.setattr(suite, "run", lambda name, *_: ended[name])
    assert suite.measured([*ended], tmp_path, 1, []) == 9


def test_a_mode_is_as_far_from_fp32_as_its_dtype():
    right, half = quality.Mode("fp32"), quality.Mode("bf16")
    exact, found = right.blocks(), half.blocks()
    assert list(exact) == [*(f"double {i}" for i in range(2)), *(f"single {i}" for i in range(4))]
    off = [quality.error(found[name], exact[name]) for name in exact]
    assert all(1e-4 < error < 3e-2 for error in off)


def test_psnr_and_ssim_know_equal_and_other_pictures():
    picture = torch.rand(1, 3, 32, 32)
    other = (picture + 0.1).clamp(max=1.1)
    assert quality.psnr(other, picture) == pytest.approx(20, abs=0.1)
    assert quality.psnr(picture, picture) == 120
    assert quality.ssim(picture, picture) == pytest.approx(1)
    assert quality.ssim(torch.rand(1, 3, 32, 32), picture) < 0.5


# the driver


def test_the_command_knows_the_suites():
    assert cli.BENCH_SUITES == tuple(suite.SUITES)
    for name in suite.SUITES:
        assert (bench.ROOT / "benchmarks" / f"{name}.py").is_file()


def test_a_shape_goes_to_the_suites_that_take_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = {}
    monkeypatch.setattr(suite, "run", lambda name, file, given, _: asked.update({name: given}) or 0)
    for device, given in (("cpu", {"ops", "blocks"}), ("cuda", {"ops", "blocks", "step"})):
        monkeypatch.setattr(suite, "default_device", lambda device=device: device)
        args = suite.parsed(["--shape", "flux-2048-batch-4", "compact", "--threads", "1"])
        assert suite.run_suites(args, tmp_path, "here", 1) == 0
        assert set(asked) == set(suite.MEASURE[device])
        for name, options in asked.items():
            assert ("flux-2048-batch-4" in options) == (name in given)
            if name in given:
                module = {"ops": benchmarks_ops, "blocks": blocks, "step": step}[name]
                assert module.parsed(options).shape == ["flux-2048-batch-4", "compact"]
        asked.clear()


@pytest.mark.parametrize(
    "shape, found",
    [
        ("flux-512", ("dev", 512, 1)),
        ("flux-2048-batch-4", ("dev", 2048, 4)),
        ("compact", ("compact", 128, 2)),
    ],
)
def test_a_shape_of_a_step_is_a_model_its_pixels_and_a_batch(shape: str, found: tuple):
    assert step.of_shape(shape) == found


def test_the_gradients_of_a_step_are_held_to_fp32(model: step.Model):
    found = model.measure("gradients", rounds=0, only=("eager", OURS, BASELINE))
    assert set(found.verified) == {"eager", OURS, BASELINE}
    assert 1e-4 < found.verified[OURS] < 5e-2
    assert {p.dtype for p in model.flux.parameters()} == {torch.bfloat16}


def test_what_is_compared_must_be_of_a_suite(tmp_path: Path):
    bench.write_json(tmp_path / "loop.json", {"suite": "diffusers_loop", "rows": []})
    with pytest.raises(ValueError, match="must hold one of ops, .*, got diffusers_loop"):
        suite.suites_of(suite.parsed(["--compare", str(tmp_path / "loop.json")]))


def test_all_suites_go_into_one_file_under_one_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(suite, "SUITES", {"products": 3, "quality": 1})
    monkeypatch.setattr(suite, "MEASURE", {suite.default_device(): ("products", "quality")})
    shown = []

    def run(name: str, file: Path, arguments: list[str], progress: suite.Progress) -> int:
        data = {"suite": name, "planned": 4, "verified": ["a", "b"], "refused": [], "rows": []}
        bench.write_json(file, data)
        progress.show(name, file)
        shown.append((progress.bar.n, progress.bar.total))
        progress.done(name)
        return 0

    monkeypatch.setattr(suite, "run", run)
    file = tmp_path / "all.json"
    assert suite.main(["--json", str(file), "--threads", "1"]) == 0
    assert list(json.loads(file.read_text())["suites"]) == ["products", "quality"]
    assert shown == [(2, 4), (3, 4)]
    said = capsys.readouterr().out
    assert said.count("source ") == 1 and "peers: comfy-kitchen" in said


def test_the_suites_that_are_compared_are_those_of_the_old_result(tmp_path: Path):
    data = {"suites": {"ops": {"rows": []}, "quality": {"rows": []}}}
    bench.write_json(tmp_path / "old.json", data)
    args = suite.parsed(["--compare", str(tmp_path / "old.json")])
    assert suite.suites_of(args) == ["ops", "quality"]
    assert suite.suites_of(suite.parsed(["--suite", "ops", "--compare", "x"])) == ["ops"]
