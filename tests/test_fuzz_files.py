"""Damaged files are refused in one line or read as others read them."""

import random
import subprocess
import sys
from pathlib import Path

import fuzz_files
import pytest
from fuzz_files import LOADS, Target, run, run_case

HERE = Path(__file__).parent


def fuzzed(*options: object) -> None:
    command = [sys.executable, HERE / "fuzz_files.py", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_damaged_files_are_refused_or_read_as_others_read_them(seed):
    fuzzed("--loads", 600, "--pipelines", 40, "--seed", seed)


@pytest.mark.sanitize
def test_many_damaged_files_are_refused_or_read_as_others_read_them(seed):
    fuzzed("--seed", seed)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Of one file, damaged in its first byte."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "file").write_bytes(b"abc")
    monkeypatch.setattr(fuzz_files, "CORPUS", [tmp_path / "corpus"])
    return tmp_path


def refuse(message: str):
    def load(path: Path) -> None:
        raise ValueError(message)

    return load


def leave(path: Path) -> None:
    path.with_name("left").write_text("")
    raise ValueError("refused")


@pytest.mark.parametrize(
    ("load", "same", "outcome"),
    [
        (refuse("no"), True, "refused"),
        (refuse("two\nlines"), True, "several lines"),
        (lambda path: {}["x"], True, "traceback"),
        (lambda path: bytearray(10**12), True, "memory"),
        (lambda path: sys.exit(), True, "traceback"),
        (leave, True, "left"),
        (Path.name, True, "traceback"),
        (Path.exists, True, "read"),
        (Path.exists, False, "another meaning"),
    ],
)
def test_the_judge_sees_each_fault(corpus, load, same, outcome):
    (corpus / "place").mkdir()
    target = Target(lambda path: None, load, lambda loaded, path: same)
    assert run_case(1, 0, "file", target, corpus / "place")[0] == outcome


def test_a_process_that_ends_is_counted_and_the_next_cases_run(corpus):
    def load(path: Path) -> None:
        if not (corpus / "ended").exists():
            (corpus / "ended").touch()
            fuzz_files.os.abort()
        raise ValueError("refused")

    target = Target(lambda path: None, load, lambda loaded, path: True)
    assert run(4, 0, {"file": target}, corpus) == {"ended": 1, "refused": 3}


@pytest.mark.parametrize("name", LOADS)
def test_a_changed_number_in_a_file_is_another_meaning_to_who_compares(name, tmp_path):
    target = LOADS[name]
    target.write(tmp_path / name)
    model = target.load(tmp_path / name)
    assert target.same(model, tmp_path / name)
    bias = next(t for t in model.state_dict().values() if t.ndim == 1)
    bias[0] += 1
    assert not target.same(model, tmp_path / name)


def test_damage_changes_a_file_and_never_the_corpus(tmp_path):
    for name in ("bfl.safetensors", "vae"):
        LOADS[name].write(tmp_path / name)
        before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
        for number in range(60):
            copy = tmp_path.with_name(f"{tmp_path.name}-copy") / name
            copy.parent.mkdir()
            fuzz_files.link_or_copy(tmp_path / name, copy)
            fuzz_files.damage(copy, random.Random(number))
            fuzz_files.shutil.rmtree(copy.parent)
        assert {p: p.read_bytes() for p in before} == before
