"""Machine code of the CUDA kernels, of every architecture, against tests/budgets.json."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from machine_code import ARCHS, SHARED_PER_BLOCK, object_rows, violations

pytestmark = pytest.mark.build
ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_fluxkern")
BUDGETS = json.loads((ROOT / "tests/budgets.json").read_text())["cuda"]
NUMBERS = re.compile(r"L[ib](\d+)E")


def kernel_of(function: str) -> str:
    """norm_modulate_kernel<1> of the mangled name: 1 and 2 vectors a thread, 0 single elements;
    attention_kernel<128, 64>: D and keys of a tile."""
    name, arguments = re.search(r"\d([a-z_]+(?:_fp8)?_kernel)I(\S*?)Ev", function).groups()
    numbers = NUMBERS.findall(arguments)
    if name == "sum_partials_kernel" or not numbers:
        return name
    return f"{name}<{', '.join(numbers)}>"


@pytest.fixture(scope="module")
def compiled() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a .cu, compiled as setup.py does."""
    try:
        torch = SETUP["find_torch"]()
        library = SETUP["cuda_library"](torch)
    except SETUP["CannotBuild"] as reason:
        pytest.skip(str(reason))
    versions = [str(library.about["compiler"]), torch.version]
    units = {unit.source: unit for unit in library.units}
    return lambda source: object_rows(SETUP["compile_unit"](units[source], versions))


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_cuda_kernels_keep_their_budgets(source: Path, compiled: Callable):
    rows = compiled(source)
    assert {row["arch"] for row in rows} >= set(ARCHS)
    found = []
    for row in rows:
        name = kernel_of(row["kernel"])
        found += violations({**row, "kernel": name}, BUDGETS[name])
        assert row["shared"] <= SHARED_PER_BLOCK.get(row["arch"], SHARED_PER_BLOCK[89])
    assert found == []
