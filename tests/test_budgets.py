"""Machine code of the kernels against tests/budgets.json, and the checks against planted faults."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machine_code import ARCHS, SHARED_PER_BLOCK, instructions, violations

HERE = Path(__file__).parent
BUDGETS = json.loads((HERE / "budgets.json").read_text())
TRITON = BUDGETS["triton"]


def machine_code(cache: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of tests/machine_code.py, in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "machine_code.py"), "--json", *options],
        env=environment | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="session")
def rows(cache: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["kernel"], row["arch"]): row for row in machine_code(cache)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", TRITON)
def test_kernel_keeps_its_budget(kernel: str, arch: int, rows: dict):
    row = rows[kernel, arch]
    assert violations(row, TRITON[kernel]) == []
    assert row["shared"] <= SHARED_PER_BLOCK[arch]


def test_every_kernel_has_a_budget_and_every_budget_a_kernel(rows: dict):
    assert {kernel for kernel, _ in rows} == set(TRITON)


@pytest.mark.parametrize("backend", BUDGETS)
def test_every_budget_says_why(backend: str):
    for kernel, entry in BUDGETS[backend].items():
        assert len(entry.get("why", "")) > 20 and "\n" not in entry["why"], kernel


@pytest.mark.build
def test_every_tile_that_may_be_chosen_runs_without_spills_on_tensor_cores(cache: Path):
    rows = machine_code(cache, "--tiles")
    assert len(rows) > 20
    for row in rows:
        name = row["kernel"] + f" in {row['op']}" * (row["op"] == "rope_attention")
        budget = TRITON[name] | TRITON[name].get(f"sm_{row['arch']}", {})
        kept = {key: budget[key] for key in ("tensor_cores", "narrow_loads") if key in budget}
        kept |= {"shared": SHARED_PER_BLOCK[row["arch"]], "tma": int("tma" in row["tile"])}
        assert violations(row, kept) == [], row["tile"]


# the checker


def test_a_planted_spill_and_planted_scalar_loads_are_refused(cache: Path):
    spilling, scalar = machine_code(cache, "--planted")
    found = violations(spilling, TRITON[spilling["kernel"]])
    assert any("spills must be <= 0" in sentence for sentence in found)
    found = violations(scalar, TRITON[scalar["kernel"]])
    assert any("narrow_loads must be <= 0" in sentence for sentence in found)


def test_instructions_are_read_by_width_and_kind():
    sass = """
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/              @!P0 LDG.E.U16 R4, [R2.64] ;
        /*0030*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0040*/              @!PT LDS.128 R4, [R2] ;
        /*0050*/                   STL [R1], R3 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/             @!UP0 UTMALDG.4D [UR8], [UR6] ;
        /*1000*/                   LDG.E R9, [R2.64] ;
        /*1010*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
    """
    read = instructions(sass)
    assert (read["loads"], read["narrow_loads"]) == (2, 2)
    assert (read["stores"], read["narrow_stores"]) == (0, 1)
    assert (read["spills"], read["tma"], read["tensor_cores"]) == (1, 1, ["HGMMA"])


def test_a_limit_of_one_architecture_replaces_the_general_one():
    row = {"kernel": "k", "arch": 90, "registers": 60, "spills": 0, "stack": 0, "loads": 3}
    row |= {"narrow_loads": 0, "narrow_stores": 0, "tensor_cores": []}
    assert violations(row, {"registers": 60, "loads": 3}) == []
    assert violations(row, {"registers": 60, "sm_90": {"registers": 50}}) == [
        "k on sm_90: registers must be <= 50, got 60"
    ]
    assert violations(row, {"loads": 4}) == ["k on sm_90: loads must be >= 4, got 3"]
