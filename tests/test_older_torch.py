"""The objects against the headers of the older releases of torch that they are declared for."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import older_torch
import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_fluxkern")
BUILT = sorted((ROOT / "fluxkern").glob("_C_*.so"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
LIBRARIES = [
    "cpu_library",
    *(
        pytest.param(name, marks=pytest.mark.skipif(NVCC is None, reason="no nvcc"))
        for name in ("cuda_library", "emulator_library")
    ),
]
pytestmark = pytest.mark.build


def torch_of(release: str):
    return SETUP["torch_of"](older_torch.package(release))


def compiled(unit, torch) -> Path:
    return SETUP["compile_unit"](unit, [torch.version])


def bindings_of(library: str, release: str) -> list:
    """The units that see torch."""
    torch = torch_of(release)
    units = SETUP[library](torch).units
    seen = [unit for unit in units if torch.flags[0] in unit.command]
    assert seen and torch.version.startswith(release)
    return seen


def test_the_declared_range_of_torch_begins_with_the_oldest_headers():
    oldest = ".".join(map(str, SETUP["TORCH_TARGET"]))
    assert older_torch.OLDEST.startswith(f"{oldest}.")
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("release", older_torch.RELEASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_bindings_compile_against(release: str, library: str):
    for unit in bindings_of(library, release):
        assert compiled(unit, torch_of(release)).stat().st_size > 0


NEWER = {
    "a macro of 2.13": "void f() { STABLE_TORCH_ERROR_CODE_CHECK(0); }",
    "a function of 2.11": "auto f() { return &torch_from_blob; }",
    "a header of 2.13": "#include <torch/csrc/stable/generator.h>",
}


@pytest.mark.parametrize("planted", NEWER)
def test_a_planted_use_of_what_is_newer_does_not_compile(planted: str, tmp_path: Path):
    (unit,) = bindings_of("cpu_library", older_torch.OLDEST)
    source = tmp_path / "planted.cpp"
    source.write_text(unit.source.read_text() + NEWER[planted] + "\n")
    folder = f"-I{unit.source.parent}"
    command = [*unit.command, folder, "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert re.search(r"STABLE_TORCH_ERROR_CODE_CHECK|torch_from_blob|generator.h", done.stderr)


def test_headers_of_a_release_say_what_it_has():
    assert "torch_get_mutable_data_ptr" in older_torch.declared("2.10.0")
    assert "torch_from_blob" in older_torch.declared("2.11.0") - older_torch.declared("2.10.0")
    assert "aoti_torch_get_current_cuda_stream" in older_torch.declared("2.10.0")


@pytest.mark.skipif(not BUILT, reason="no object is built: make build")
@pytest.mark.parametrize("library", BUILT, ids=lambda path: path.name)
def test_an_object_asks_for_nothing_that_the_oldest_torch_does_not_have(library: Path):
    assert older_torch.asked_for(library), "an object that registers ops asks torch for something"
    assert older_torch.not_in(older_torch.OLDEST, library) == set()


@pytest.mark.parametrize(
    "symbol", ["torch_from_blob", "PyLong_FromLong", "_ZN2at5emptyEv", "torch_get_const_data_ptr"]
)
def test_a_symbol_that_the_oldest_torch_does_not_have_is_found(symbol: str, tmp_path: Path):
    code = f'extern "C" void {symbol}(); void planted() {{ {symbol}(); }}'
    library = tmp_path / "planted.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=code, text=True, check=True)
    assert older_torch.asked_for(library) == {symbol}
    known = symbol == "torch_get_const_data_ptr"  # the check lets through what it should
    assert older_torch.not_in(older_torch.OLDEST, library) == (set() if known else {symbol})
