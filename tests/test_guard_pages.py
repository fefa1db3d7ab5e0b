"""CPU kernels touch no memory beside their tensors: guard_pages.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard_pages import SHAPES

from fluxkern.ops import _load

PROGRAM = Path(__file__).with_name("guard_pages.py")
pytestmark = pytest.mark.skipif(_load.load_reason("cpu") is not None, reason="no _C_cpu")


def said(tmp_path: Path, *arguments: object) -> str:
    """What the program says; fails with the case that ended it."""
    file = tmp_path / "said"
    with file.open("w") as output:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    lines = file.read_text().splitlines()
    assert done.returncode == 0, "\n".join(lines[-60:])
    return lines[-1]


def test_every_kernel_is_drawn():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    here = {op for library, op in names if library == "fluxkern_cpu" and op[0] != "_"}
    runs = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {op for op in here if runs(f"fluxkern_cpu::{op}", "CPU")} == set(SHAPES)


def test_a_kernel_that_reaches_one_element_too_far_is_caught(seed: int, tmp_path: Path):
    assert said(tmp_path, "--seed", seed, "--plant") == f"{len(SHAPES)} faults caught"


def test_kernels_stay_between_guard_pages(seed: int, tmp_path: Path):
    cases = said(tmp_path, "--seed", seed, "--seconds", 45)
    assert int(cases.split()[0]) > 100


@pytest.mark.sanitize
def test_kernels_stay_between_guard_pages_for_long(seed: int, tmp_path: Path):
    assert int(said(tmp_path, "--seed", seed + 1, "--seconds", 420).split()[0]) > 1000
