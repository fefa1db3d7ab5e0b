"""The kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The CUDA sources run as csrc/emulator/sanitize has it, a program an op. The CPU kernels run the
contract in a package whose objects are instrumented; Python and torch are not, so the sanitizer's
runtime is preloaded, and for ThreadSanitizer threads that it sees (parallel_for.cpp) take the place
of OpenMP.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sanitize
ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_fluxkern")
SANITIZERS = ("address,undefined", "thread")
OPS = sorted(path.stem for path in (ROOT / "csrc/emulator/sanitize").glob("*.cpp"))
KERNELS = sorted(path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp"))
OPTIONS = {
    # leaks are Python's own; new memory holds NaN, so that scratch is written before it is read
    "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=268435456:malloc_fill_byte=255",
    "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
}
FIXED_ADDRESSES = ("setarch", "--addr-no-randomize")  # ThreadSanitizer's shadow takes most of them
every_sanitizer = pytest.mark.parametrize("sanitizer", SANITIZERS)


def flags(sanitizer: str) -> list[str]:
    return ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **OPTIONS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def compile_with(*arguments: object, cwd: Path = ROOT) -> None:
    done = run("g++", "-std=c++20", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout


# the CUDA sources


@pytest.fixture(scope="module")
def cuda_headers() -> Path:
    try:
        return SETUP["cuda_headers"]()
    except SETUP["CannotBuild"] as reason:
        pytest.skip(str(reason))


@every_sanitizer
@pytest.mark.parametrize("op", OPS)
def test_a_cuda_kernel_is_clean(op: str, sanitizer: str, cuda_headers: Path, tmp_path: Path):
    layer = (ROOT / "csrc/emulator").glob("*.cpp")
    sources = (f"csrc/emulator/sanitize/{op}.cpp", f"csrc/cuda/{op}.cu", *layer)
    includes = ("-Icsrc/emulator", "-isystem", cuda_headers)
    program = tmp_path / op
    compile_with(
        *flags(sanitizer),
        "-Wno-unknown-pragmas",
        "-DFLUXKERN_EMULATOR",
        *includes,
        "-x",
        "c++",
        *sources,
        "-o",
        program,
    )
    done = run(*FIXED_ADDRESSES, program)
    assert done.returncode == 0, done.stdout[:10000]


# the CPU kernels


def instrumented(source: Path, folder: Path, sanitizer: str) -> Path:
    """A folder to run Python in, whose fluxkern is `source`'s with instrumented kernels."""
    ignored = shutil.ignore_patterns("weights", "*.so", "__pycache__")
    shutil.copytree(ROOT / "fluxkern", folder / "fluxkern", ignore=ignored)
    build = (sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder)
    done = run(*build, cwd=source, CXXFLAGS=" ".join(flags(sanitizer)), FLUXKERN_BUILD="cpu")
    assert done.returncode == 0, done.stdout
    return folder


def preloaded(folder: Path, sanitizer: str, overlap: int = 0) -> str:
    names = {"address,undefined": ("asan", "ubsan"), "thread": ("tsan",)}[sanitizer]
    files = [run("g++", f"-print-file-name=lib{name}.so").stdout.strip() for name in names]
    if sanitizer == "thread":
        threads = folder / f"parallel_for_{overlap}.so"
        compile_with(
            *flags(sanitizer),
            f"-DOVERLAP={overlap}",
            "-shared",
            "-fPIC",
            "tests/parallel_for.cpp",
            "-o",
            threads,
        )
        files.append(str(threads))
    return " ".join(files)


def contract(folder: Path, preload: str, ops: list[str], tests: str) -> subprocess.CompletedProcess:
    chosen = f"cpu and ({' or '.join(ops)}) and ({tests})"
    # a sanitizer ends the process, and with it what pytest has captured
    pytest_on = (sys.executable, "-m", "pytest", "-q", "-x", "--capture=no", "-pno:cacheprovider")
    files = ("-c", ROOT / "pyproject.toml", ROOT / "tests/test_contract.py", "-k", chosen)
    return run(*FIXED_ADDRESSES, *pytest_on, *files, cwd=folder, LD_PRELOAD=preload)


@pytest.fixture(scope="module", params=SANITIZERS)
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("instrumented")
    return instrumented(ROOT, folder, request.param), request.param


def test_the_cpu_kernels_are_clean(clean: tuple[Path, str]):
    folder, sanitizer = clean
    done = contract(folder, preloaded(folder, sanitizer), KERNELS, "accurate or taken or asked")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-10000:]


def test_threads_that_write_the_same_row_are_caught(clean: tuple[Path, str]):
    folder, sanitizer = clean
    if sanitizer != "thread":
        pytest.skip("threads are ThreadSanitizer's")
    done = contract(folder, preloaded(folder, sanitizer, 1), ["gated_residual"], "forward_is_acc")
    assert done.returncode != 0 and "WARNING: ThreadSanitizer: data race" in done.stdout


def test_a_cpu_kernel_that_reads_past_its_row_is_caught(tmp_path: Path):
    source = tmp_path / "source"
    for name in ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    (source / "build").symlink_to(ROOT / "build")  # what is not planted is compiled already
    (source / "fluxkern").mkdir()
    shutil.copy(ROOT / "fluxkern/__init__.py", source / "fluxkern")
    kernel = source / "csrc/cpu/gated_residual.cpp"
    right, wrong = "load(y_row + i, part)", "load(y_row + i + 64, part)"
    assert right in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(right, wrong))
    folder = instrumented(source, tmp_path / "package", "address,undefined")
    preload = preloaded(folder, "address,undefined")
    done = contract(folder, preload, ["gated_residual"], "forward_is_accurate")
    assert "ERROR: AddressSanitizer" in done.stdout, done.stdout[-10000:]
    assert "csrc/cpu/gated_residual.cpp" in done.stdout
