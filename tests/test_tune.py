"""The measured order of backends: written by `tune`, read by the dispatch, said by explain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_gpu import fake_gpu, packed

from fluxkern import ops
from fluxkern.bench import tune
from fluxkern.bench.compare import Comparison, Row
from fluxkern.cases import CASES, SHAPES, Maker
from fluxkern.cli import main
from fluxkern.kernels import _tiles
from fluxkern.ops import _digests, _load, measured

ROOT = Path(__file__).resolve().parents[1]
HERE = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of its own, and a package without tables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "PACKAGE", tmp_path / "package")
    measured.forget()
    yield tmp_path
    measured.forget()


def place(folder: Path, order: dict, **table: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / measured.file_name(measured.device_name(HERE))
    digests = {op: measured.digests(op, ops.BACKENDS) for op in order}
    path.write_text(json.dumps({"device": "this", "order": order, "digest": digests} | table))
    measured.forget()
    return path


def test_a_call_looks_for_no_table(monkeypatch: pytest.MonkeyPatch):
    place(measured.user_folder(), SLOW_KERNEL)
    with monkeypatch.context() as patch:
        for reading in ("user_folder", "read", "_fresh"):
            patch.setattr(measured, reading, lambda *_: pytest.fail("a call reads files"))
        assert chosen(*inputs()) == "reference"


def inputs(tokens: int = 8, dtype: torch.dtype = torch.float32) -> tuple:
    x, y = torch.randn(2, 1, tokens, 64, dtype=dtype)
    return x, y, torch.randn(1, 1, 64, dtype=dtype), 0


def chosen(*args: object) -> str | None:
    return ops.explain("gated_residual", *args)[0].chosen


SLOW_KERNEL = {"gated_residual": {"float32": {"10": {"reference": 1.0, "cpu": 2.0}}}}


def test_without_a_table_the_order_is_that_of_backends():
    reasons = ops.explain("gated_residual", *inputs())[0].reasons
    assert chosen(*inputs()) == next(b for b in ops.BACKENDS if reasons[b] is None)


def test_what_was_measured_fastest_runs():
    place(measured.user_folder(), SLOW_KERNEL)
    assert chosen(*inputs()) == "reference"
    with ops.record() as calls:
        ops.gated_residual(*inputs())
    assert [call.backend for call in calls] == ["reference"]


def test_another_dtype_or_op_is_left_alone():
    place(measured.user_folder(), SLOW_KERNEL)
    assert chosen(*inputs(dtype=torch.bfloat16)) == chosen() != "reference"
    args = inputs()
    assert ops.explain("norm_modulate", args[0], args[2], args[2], 0, 1e-6)[0].times is None


def test_the_nearest_size_counts():
    sizes = {"8": {"reference": 1.0, "cpu": 2.0}, "20": {"cpu": 1.0, "reference": 2.0}}
    place(measured.user_folder(), {"gated_residual": {"float32": sizes}})
    assert chosen(*inputs(2)) == "reference"
    assert chosen(*inputs(2**14)) == "cpu"


def test_explain_says_what_wasmeasured():
    place(measured.user_folder(), SLOW_KERNEL)
    line = str(ops.explain("gated_residual", *inputs())[0])
    assert "measured: reference 1 us, cpu 2 us" in line


def test_a_users_table_comes_before_that_of_the_package(home: Path):
    place(home / "package", SLOW_KERNEL)
    assert chosen(*inputs()) == "reference"
    place(measured.user_folder(), {})
    assert chosen(*inputs()) == "cpu"


@pytest.mark.parametrize("text", ["", "[]", '{"order": 3}', '{"order": {"a": {"b": {"c": {}}}}}'])
def test_a_file_that_is_no_table_is_none_and_is_named(text: str):
    path = place(measured.user_folder(), {})
    path.write_text(text)
    measured.forget()
    assert chosen(*inputs()) == chosen()
    (said,) = measured.problems()
    assert said.startswith(f"{path}: not a table of `fluxkern tune`")


def test_what_was_measured_of_another_kernel_is_ignored_and_said():
    if not measured.digests("gated_residual", ["cpu"]):
        pytest.skip("no compiled kernel has a digest")
    order = SLOW_KERNEL | {"norm_modulate": SLOW_KERNEL["gated_residual"]}
    changed = {op: measured.digests(op, ops.BACKENDS) for op in order}
    changed["gated_residual"]["cpu"] = "that of long ago"
    path = place(measured.user_folder(), order, digest=changed)
    assert chosen(*inputs()) == "cpu"
    assert measured.problems() == (f"{path}: ignored, kernels have changed since: gated_residual",)
    x, _, row, _ = inputs()
    assert ops.explain("norm_modulate", x, row, row, 0, 1e-6)[0].times == {"reference": 1, "cpu": 2}
    place(measured.user_folder(), order, digest={})
    assert "gated_residual, norm_modulate" in measured.problems()[0]


def test_a_kernel_that_is_not_here_makes_no_entry_stale():
    """A package without CUDA objects has the tables of one with them."""
    order = {"gated_residual": {"float32": {"10": {"cuda": 1.0, "reference": 2.0, "cpu": 3.0}}}}
    here = measured.digests("gated_residual", ops.BACKENDS)
    place(measured.user_folder(), order, digest={"gated_residual": here | {"cuda": "elsewhere"}})
    if "cuda" not in here:
        assert measured.problems() == () and chosen(*inputs()) == "reference"


def test_a_digest_is_of_the_kernels_file_and_of_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def digest(**texts: str) -> str:
        (tmp_path / "kernels").mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / f"kernels/{name}.py").write_text(text)
        _digests._of_triton.cache_clear()
        return _digests.of_kernel("joint_twice_backward", "triton")

    monkeypatch.setattr(_digests, "_PACKAGE", tmp_path)
    first = digest(twice="from ._rows import (\n", _rows="from . import _more", _more="", other="")
    assert digest(other="changed") == first
    assert digest(_more="changed") != first
    assert digest(_more="") == first != digest(twice="from ._rows import x\n")
    _digests._of_triton.cache_clear()


def test_every_op_with_a_kernel_of_triton_has_a_digest():
    for op, case in CASES.items():
        if "triton" in case.backends:
            assert measured.digests(op, ["triton"]), op


NOBODY = """
import os, sys
import fluxkern.ops, torch
from fluxkern.ops import measured
if os.geteuid() == 0:
    os.setgid(54321)
    os.setuid(54321)
measured.forget()
print(fluxkern.ops.gelu_tanh(torch.ones(2, 3)).sum().item())
print(*measured.problems(), sep="\\n")
"""


@pytest.mark.parametrize("home", ["of another user", "none"])
def test_a_user_who_has_no_home_has_no_table_and_every_op(home: str, tmp_path: Path):
    without = ("HOME", "XDG_CACHE_HOME", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    if home == "of another user":
        folder = tmp_path / "home"
        folder.mkdir(mode=0o700 if os.geteuid() == 0 else 0)
        environment["HOME"] = str(folder)
    elif os.geteuid() != 0:
        pytest.skip("needs root, to become a user without an entry")
    command = [sys.executable, "-c", NOBODY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    value, *problems = done.stdout.splitlines()
    assert float(value) == pytest.approx(5.0472, abs=1e-3)
    assert len(problems) == 1 and problems[0].startswith("no table of the user's own: ")


def test_backends_of_another_version_are_passed_over():
    place(measured.user_folder(), {"gated_residual": {"float32": {"10": {"abacus": 1.0}}}})
    assert chosen(*inputs()) == chosen()


def test_tuning_measures_and_what_it_writes_is_obeyed():
    if _load.load_reason("cpu"):
        pytest.skip("one backend is no choice")
    lines = []
    table = tune.tune(
        ["norm_modulate"],
        ["compact"],
        ["fp32"],
        rounds=3,
        after_each=lambda _, line: lines.append(line),
    )
    assert set(table["order"]) == {"norm_modulate", "norm_modulate_backward"}
    assert len(lines) == 2 and lines[0].startswith("norm_modulate, fp32, compact: ")
    path = tune.write(table)
    assert path.parent == measured.user_folder() and measured.read(path) and not measured.problems()
    sizes = SHAPES["compact"]
    (size, order), *_ = table["order"]["norm_modulate"]["float32"].items()
    assert int(size) == (sizes.stream).bit_length() and set(order) == {"cpu", "reference"}
    assert list(order.values()) == sorted(order.values())
    maker = Maker(sizes, torch.float32)
    args = (maker.tokens(), *maker.vectors()[:2], sizes.txt_len, 1e-6)
    assert ops.explain("norm_modulate", *args)[0].chosen == next(iter(order))


# tiles


def q_on_a_gpu() -> torch.Tensor:
    return packed(1, 4608, 24, 128)[0]


def tiles_of(kernel: str) -> tuple[str, ...]:
    return tuple(map(str, _tiles.candidates(kernel, 90)))


def chosen_tile(kernel: str, q: torch.Tensor) -> str:
    return str(_tiles.chosen(kernel, 90, q, measured.tile(kernel, q)))


def test_a_measured_tile_is_taken_where_it_is_a_candidate():
    default, other, *_ = tiles_of("attention")
    for measured_first, taken in ((other, other), ("512x512 4w 9s", default)):
        sizes = {"24": {measured_first: 1.0, default: 2.0}}
        digest = {"attention": measured.digests("attention", ["triton"])}
        tiles = {"attention": {"bfloat16": sizes}}
        table = {"order": {}, "tiles": tiles, "digest": digest}
        measured.user_folder().mkdir(parents=True, exist_ok=True)
        (measured.user_folder() / "fake-h100.json").write_text(json.dumps(table))
        with fake_gpu():
            measured.forget()
            assert chosen_tile("attention", q_on_a_gpu()) == taken
            other_kernel = "attention_backward_keys"
            assert chosen_tile(other_kernel, q_on_a_gpu()) == tiles_of(other_kernel)[0]
            assert chosen_tile("attention", q_on_a_gpu().float()) == str(_tiles.SMALL)


def test_every_candidate_is_named_apart_and_none_outgrows_its_kernel():
    for kernel, table in _tiles.TABLE.items():
        for architecture, tiles in table.items():
            assert len({str(tile) for tile in tiles}) == len(tiles), (kernel, architecture)
            assert all(tile.TMA <= (architecture >= 90) for tile in tiles)


def test_tuning_tries_every_tile_and_what_it_writes_is_taken(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU the clock alone is replaced."""

    def clock(op: str, shape: str, dtype: str, direction: str, *rest: object) -> Comparison:
        kernel = "attention" if direction == "forward" else "attention_backward_keys"
        tried = measured._tried.get(kernel) or measured._tried["attention_backward_queries"]
        seconds = float(len(tried) * 1000 + sum(map(ord, tried))) * 1e-6
        row = Row(
            *(op, direction, shape, dtype, "cuda", "triton", "", 1, 1), None, [seconds], 1, {}
        )
        return Comparison([row], {}, {})

    monkeypatch.setattr(tune, "measure", clock)
    table, lines = {"device": "fake H100", "order": {}, "tiles": {}, "digest": {}}, []
    with fake_gpu():
        ops.explain()
        rest = (["flux-1024", "compact"], ["fp32", "bf16"], 3, lambda _, line: lines.append(line))
        tune.add_tiles(table, *rest)
        tune.write(table)
        for kernel, by_dtype in table["tiles"].items():
            assert list(by_dtype) == ["bfloat16"]
            (_, found), _ = sorted(by_dtype["bfloat16"].items(), key=lambda item: -int(item[0]))
            assert set(found) == set(tiles_of(kernel)) and list(found.values()) == sorted(
                found.values()
            )
            assert chosen_tile(kernel, q_on_a_gpu()) == next(iter(found))
    choices = [kernel for kernel in _tiles.TABLE if len(tiles_of(kernel)) > 1]
    assert list(table["tiles"]) == choices and len(lines) == 2 * len(choices) > 0
    assert not measured._tried


# the command


@pytest.mark.parametrize(
    "option, value",
    [("--op", "abacus"), ("--shape", "square"), ("--dtype", "fp8"), ("--rounds", "1")],
)
def test_the_command_refuses_what_it_does_not_know(option: str, value: str, capsys):
    assert main(["tune", option, value]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fluxkern: error: {option} must be") and value in said


def test_the_command_writes_a_table_and_says_where(tmp_path: Path, capsys):
    what = ("--op", "gated_residual", "--shape", "compact", "--dtype", "fp32", "--device", "cpu")
    assert main(["tune", *what, "--rounds", "3", "--output", str(tmp_path / "t.json")]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("t.json") and "gated_residual, fp32, compact: " in out
    assert set(measured.read(tmp_path / "t.json")[0]["order"]) == {
        "gated_residual",
        "gated_residual_backward",
    }
