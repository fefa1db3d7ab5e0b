"""The build: what it makes, what it says of what it leaves out, what the objects ask of torch."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import older_torch
import pytest
import setuptools
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_fluxkern")
SETTINGS = ("FLUXKERN_BUILD", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "NVCC_THREADS")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


# a project as small as can be under the real setup.py

TWICE = """
#include "twice.h"
#define NAME_OF(set) twice_##set
#define NAME(set) NAME_OF(set)
float NAME(FLUXKERN_ISA)(float x) { return FACTOR * x; }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fluxkern").mkdir()
    shutil.copy(ROOT / "fluxkern/__init__.py", tmp_path / "fluxkern")
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/twice.h").write_text("#define FACTOR 2\n")
    (tmp_path / "csrc/cpu/twice.cpp").write_text(TWICE)
    (tmp_path / "csrc/bindings").mkdir()
    (tmp_path / "csrc/bindings/cpu.cpp").write_text("float bound() { return 1; }\n")
    return tmp_path


def build(project: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(
        sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=project, **environment
    )


def info(project: Path) -> dict:
    return json.loads((project / "fluxkern/_build_info.json").read_text())


def reason(project: Path, name: str = "_C_cpu") -> str:
    assert not (project / "fluxkern" / f"{name}.so").exists()
    assert info(project)[name]["built"] is False
    return info(project)[name]["reason"]


def test_cpu_builds_each_kernel_once_an_instruction_set(project: Path):
    done = build(project, FLUXKERN_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    entry = info(project)["_C_cpu"]
    assert entry["built"] and entry["torch"] == torch.__version__
    assert info(project)["torch_target"] == "2.10"
    assert done.stdout.count("csrc/cpu/twice.cpp") == len(entry["instruction_sets"])
    assert reason(project, "_C_cuda") == "FLUXKERN_BUILD=cpu"


def test_nothing_is_compiled_again_when_nothing_changed(project: Path):
    assert build(project, FLUXKERN_BUILD="cpu").stdout
    before = (project / "fluxkern/_C_cpu.so").stat().st_mtime_ns
    assert build(project, FLUXKERN_BUILD="cpu").stdout == ""
    assert (project / "fluxkern/_C_cpu.so").stat().st_mtime_ns == before


def test_a_changed_header_recompiles_what_includes_it_and_nothing_else(project: Path):
    build(project, FLUXKERN_BUILD="cpu")
    before = (project / "fluxkern/_C_cpu.so").read_bytes()
    (project / "csrc/cpu/twice.h").write_text("#define FACTOR 3\n")
    said = build(project, FLUXKERN_BUILD="cpu").stdout
    assert "csrc/cpu/twice.cpp" in said and "csrc/bindings/cpu.cpp" not in said
    assert (project / "fluxkern/_C_cpu.so").read_bytes() != before


def test_none_takes_away_what_an_earlier_build_left(project: Path):
    build(project, FLUXKERN_BUILD="cpu")
    done = build(project, FLUXKERN_BUILD="none")
    assert done.returncode == 0 and done.stdout == ""
    assert reason(project) == "FLUXKERN_BUILD=none"


def test_an_unknown_choice_is_refused_by_name(project: Path):
    done = build(project, FLUXKERN_BUILD="gpu")
    assert done.returncode != 0
    assert (
        "FLUXKERN_BUILD must be one of auto, cpu, cuda, cuda-alone, none, got 'gpu'" in done.stderr
    )
    assert not (project / "fluxkern/_build_info.json").exists()


@pytest.mark.parametrize("variable", ["MAX_JOBS", "NVCC_THREADS"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_of_jobs_is_a_whole_number(variable: str, value: str, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"{variable} must be a whole number.*got '{value}'"):
        SETUP["whole_number"](variable, 1)


BROKEN = {
    "no such compiler": (
        {"CXX": "no-such-compiler"},
        "no C++ compiler: no-such-compiler not found",
    ),
    "a compiler that fails": ({"CXX": "false"}, "false failed on csrc/cpu/twice.cpp"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_auto_goes_without_what_fails_and_says_why_once(broken: str, project: Path):
    environment, why = BROKEN[broken]
    done = build(project, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING") == 1 and why in done.stdout
    assert why in reason(project)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_named_choice_that_fails_is_an_error(broken: str, project: Path):
    build(project, FLUXKERN_BUILD="cpu")
    environment, why = BROKEN[broken]
    done = build(project, FLUXKERN_BUILD="cpu", **environment)
    assert done.returncode != 0 and why in done.stderr
    assert why in reason(project)


def test_a_compiler_error_is_shown_whole(project: Path):
    (project / "csrc/cpu/twice.cpp").write_text("int x = nonsense;\nint y = more;\n")
    done = build(project, FLUXKERN_BUILD="cpu")
    assert done.returncode != 0 and "nonsense" in done.stderr
    assert "nonsense" in done.stdout and "more" in done.stdout


def test_without_torch_the_package_is_pure_python(project: Path, tmp_path_factory):
    only = tmp_path_factory.mktemp("only")
    for name in ("setuptools", "_distutils_hack"):
        (only / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    command = (sys.executable, "-S", "setup.py", "--quiet", "build_ext", "--inplace")
    done = run(*command, cwd=project, PYTHONPATH=str(only), FLUXKERN_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "no torch to compile against" in reason(project)
    assert run(*command, cwd=project, PYTHONPATH=str(only), FLUXKERN_BUILD="cpu").returncode != 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_auto_builds_no_cuda_under_a_torch_for_cpus(project: Path):
    assert build(project).returncode == 0
    assert "is for CPUs" in reason(project, "_C_cuda")


def test_cuda_needs_the_nvcc_of_cuda_home(project: Path):
    done = build(project, FLUXKERN_BUILD="cuda", CUDA_HOME="/no/such/cuda")
    assert done.returncode != 0 and "/no/such/cuda/bin/nvcc not found" in done.stderr
    assert (project / "fluxkern/_C_cpu.so").exists()


def test_cuda_alone_builds_no_cpu_kernels(project: Path):
    done = build(project, FLUXKERN_BUILD="cuda-alone", CUDA_HOME="/no/such/cuda")
    assert done.returncode != 0 and "/no/such/cuda/bin/nvcc not found" in done.stderr
    assert "csrc/cpu" not in done.stdout
    assert reason(project) == "FLUXKERN_BUILD=cuda-alone"


@pytest.mark.parametrize(
    ("architecture", "codes"),
    {
        "8.0": ["sm_80"],
        "9.0a": ["sm_90a"],
        "10.0f": ["sm_100f"],
        "12.0+PTX": ["sm_120", "compute_120"],
    }.items(),
)
def test_an_architecture_is_written_as_torch_writes_it(architecture: str, codes: list[str]):
    flags = SETUP["gencode"](architecture)
    assert [flag.partition(",code=")[2] for flag in flags] == codes
    assert {flag.partition(",")[0] for flag in flags} == {
        f"-gencode=arch=compute_{codes[0].removeprefix('sm_')}"
    }


@pytest.mark.parametrize("architecture", ["sm_90", "9", "9.0b", "90", "8.0-PTX"])
def test_what_is_no_architecture_is_refused_by_name(architecture: str):
    with pytest.raises(SETUP["CannotBuild"], match=f"TORCH_CUDA_ARCH_LIST holds '{architecture}'"):
        SETUP["gencode"](architecture)


# what an object asks of its surroundings


def said(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / "fluxkern/_C_cpu.so").exists(), reason="no _C_cpu: make build")
def test_code_of_one_instruction_set_is_never_the_copy_kept_for_another():
    """A weak function is one that the linker may take from the avx512 object for all callers."""
    torch_found = SETUP["find_torch"]()
    library = SETUP["cpu_library"](torch_found)
    versions = [library.about["compiler"], torch_found.version]
    kernels = [unit for unit in library.units if unit.source.parent.name == "cpu"]
    assert {unit.variant for unit in kernels} == set(library.about["instruction_sets"])
    for unit in kernels:
        symbols = said("nm", SETUP["compile_unit"](unit, versions))
        assert not re.findall(r" W (\w+)", symbols), f"{unit.source.name} ({unit.variant})"


# the wheel, with every object for every architecture

NVCC = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    chosen = "cuda" if NVCC else "cpu"
    done = run(*pip, "--wheel-dir", folder, ROOT, cwd=ROOT, FLUXKERN_BUILD=chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(wheel.parent / "unpacked")
    return wheel.parent / "unpacked" / "fluxkern"


@pytest.mark.build
def test_one_wheel_serves_every_python_of_this_platform(wheel: Path, unpacked: Path):
    assert re.fullmatch(r"fluxkern-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    objects = {"_C_cpu.so", "_C_cuda.so"} if NVCC else {"_C_cpu.so"}
    assert {path.name for path in unpacked.glob("*.so")} == objects
    for name in objects:
        assert older_torch.not_in(older_torch.OLDEST, unpacked / name) == set()


def cuda_code(library: Path, kind: str) -> set[str]:
    tool = Path(metadata.distribution("triton").locate_file("triton/backends/nvidia/bin/cuobjdump"))
    return set(re.findall(r"\.(sm_\w+)\.", said(tool, f"--list-{kind}", library)))


@needs_nvcc
@pytest.mark.build
def test_the_cuda_object_holds_every_architecture(unpacked: Path):
    named = SETUP["ARCHITECTURES"].replace("+PTX", "").replace(".", "").split()
    assert cuda_code(unpacked / "_C_cuda.so", "elf") == {f"sm_{number}" for number in named}
    assert cuda_code(unpacked / "_C_cuda.so", "ptx") == {f"sm_{named[-1]}"}


@needs_nvcc
@pytest.mark.build
def test_the_cuda_object_needs_no_library_of_cuda(unpacked: Path):
    dynamic = said("readelf", "--dynamic", unpacked / "_C_cuda.so")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not any("cuda" in name for name in needed)


WITHOUT_DRIVER = """
import torch
from fluxkern import ops
from fluxkern.cases import CASES, Maker, Sizes
from fluxkern.ops import _load
from fluxkern.testing import copied, in_schema_order, torch_op

assert _load.load_reason("cuda") is None
private = torch.ops.fluxkern_cuda
of_cuda = [op for op, case in CASES.items() if "cuda" in case.backends and op != "linear"]
for op in of_cuda:  # linear is torch's
    args = CASES[op].inputs(Maker(Sizes(), torch.float32))
    *given, _ = in_schema_order(op, copied(args), None)
    out = torch_op(op)(*given, "reference")
    out = () if out is None else out if isinstance(out, tuple) else (out,)
    try:
        getattr(private, op)(*given, *out)
        raise SystemExit(f"{op} took tensors on a CPU")
    except NotImplementedError as refusal:
        assert f"'fluxkern_cuda::{op}' with arguments from the 'CPU' backend" in str(refusal)
    try:
        getattr(ops, op)(**args, backend="cuda")
        raise SystemExit(f"{op} ran on cuda")
    except NotImplementedError as refusal:
        said = str(refusal)
        assert f"{op} cannot run on cuda (" in said and "cuda: no CUDA device;" in said, said
defined = torch._C._dispatch_get_all_op_names()
backwards = [f"fluxkern_cuda::{op}_backward" for op in of_cuda]
runs = torch._C._dispatch_has_kernel_for_dispatch_key
print(len(of_cuda), sum(name in defined and runs(name, "CUDA") for name in backwards))
"""


@needs_nvcc
@pytest.mark.build
def test_the_cuda_object_loads_without_a_driver_and_refuses_tensors_on_a_cpu(unpacked: Path):
    no_gpu = {"PYTHONPATH": str(unpacked.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, "-c", WITHOUT_DRIVER, cwd=unpacked.parent, **no_gpu)
    assert done.returncode == 0, done.stderr
    ops, backwards = map(int, done.stdout.split())
    assert ops >= 14 and backwards >= 7


def with_requirements(name: str) -> set[str]:
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, metadata.requires(name) or [])
            waiting += [r.name for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def lend(python: Path, names: set[str]) -> None:
    """Makes distributions of this environment importable in another."""
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    for distribution in map(metadata.distribution, names):
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(distribution.locate_file(top)).resolve())


@pytest.fixture(scope="module")
def beside_torch(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with torch, what torch requires, and the wheel by pip."""
    folder = tmp_path_factory.mktemp("environment")
    said(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    lend(python, with_requirements("torch"))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    done = run(*pip, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


INSTALLED = """
import fluxkern, torch
from fluxkern.ops import gated_residual
x, y, gate = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randn(2, 1, 7)
torch.testing.assert_close(gated_residual(x, y, gate, backend="cpu"), x + gate * y)
print(fluxkern.__file__)
"""


@pytest.mark.build
def test_the_wheel_runs_its_kernels_beside_torch_alone(beside_torch: Path):
    done = run(beside_torch, "-c", INSTALLED, cwd=beside_torch.parent)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(beside_torch.parent.parent)


@pytest.mark.build
def test_the_installed_command_says_what_runs(beside_torch: Path):
    lend(beside_torch, with_requirements("fluxkern") - {"fluxkern"})
    done = run(beside_torch.with_name("fluxkern"), "env", cwd=beside_torch.parent)
    assert done.returncode == 0, done.stderr
    assert re.search(r"gated_residual .*\bcpu\b", done.stdout), done.stdout
