"""A GPU or a driver that cannot run the CUDA object: a reason, and the next backend runs.

csrc/bindings/probe.cu is compiled with a runtime that answers as the real one does on such a
machine, and asked in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxkern.ops import _load, _probe

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = """
#include <cstdlib>
#define __global__
enum cudaError_t { cudaSuccess, cudaErrorOther };
struct cudaFuncAttributes {};
inline const char* asked(const char* name) { return std::getenv(name); }
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = std::atoi(asked("DRIVER"));
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
inline bool fine() { return asked("ERROR")[0] == 0; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
    return fine() ? cudaSuccess : cudaErrorOther;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : asked("ERROR");
}
"""
# A GPU whose tensors are on the CPU: the emulator has the kernels, the probe of the fake runtime
# answers for _C_cuda.
MACHINE = """
import contextlib, os, sys, torch
from pathlib import Path
from fluxkern.ops import _load, _probe, compiled_kernels, explain, gated_residual

asked = []
real = _probe._asked
_probe._asked = lambda file: asked.append(file.name) or real(Path(sys.argv[1]))
assert _load.load_reason("cuda-emulator") is None
_load.OBJECTS["cuda"] = _load.Object("_C_cuda", "fluxkern_cuda_emulator", "cpu")
_load.load_reason = lambda name: None if name == "cuda" else "left out"
_load.no_cuda = lambda: None
_load.architectures = lambda: tuple(os.environ["BUILT"].split())
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.current_device = lambda: -1  # as of the tensors
torch.cuda.get_device_capability = lambda index=None: tuple(map(int, sys.argv[2].split(".")))
"""
TOO_OLD, NO_CODE = "cudaErrorInsufficientDriver", "cudaErrorNoKernelImageForDevice"
MACHINES = {  # capability, built for, version of the driver, error of the runtime, reason
    "a T4": (
        "7.5",
        "8.0 9.0a",
        13000,
        NO_CODE,
        "built for 8.0 9.0a, not for compute capability 7.5",
    ),
    "an A100 with code for Hopper": (
        *("8.0", "9.0a", 13000, NO_CODE),
        "built for 9.0a, not for compute capability 8.0",
    ),
    "a GPU after those of the build": (
        *("11.0", "8.0 9.0a+PTX", 13000, NO_CODE),
        "built for 8.0 9.0a+PTX, not for compute capability 11.0",
    ),
    "an old driver": ("9.0", "9.0a", 12040, TOO_OLD, "takes a driver of CUDA 13.0, got 12.4"),
    "no driver": ("9.0", "9.0a", 0, TOO_OLD, "takes a driver of CUDA 13.0, got none"),
    "PTX too new": (
        *("12.1", "12.0+PTX", 13000, "cudaErrorUnsupportedPtxVersion"),
        "does not run here (cudaErrorUnsupportedPtxVersion)",
    ),
}


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    library = folder / "probe.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{folder}"]
    source = ROOT / "csrc/bindings/probe.cu"
    subprocess.run([*command, "-x", "c++", source, "-o", library], check=True)
    return library


def run(probe: Path, capability: str, built: str, driver: int, error: str, program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MACHINE + program, str(probe), capability],
        env=os.environ | {"BUILT": built, "DRIVER": str(driver), "ERROR": error},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


RUN = """
x = torch.randn(1, 4, 8)
for _ in range(2):
    torch.testing.assert_close(gated_residual(x, x, torch.ones(1, 1, 8)), 2 * x)
(choice,) = explain("gated_residual", x, x, torch.ones(1, 1, 8), 0)
shown = compiled_kernels()["_C_cuda"]
print(len(asked), choice.chosen, choice.reasons["cuda"], shown, sep=";")
"""
needs_emulator = pytest.mark.skipif(
    _load.load_reason("cuda-emulator") is not None, reason="no emulator: make build-emulator"
)


@needs_emulator
@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_that_cannot_run_the_object_says_so_and_goes_on(machine: str, probe: Path):
    *asked, reason = MACHINES[machine]
    times, chosen, why, shown = run(probe, *asked, RUN).split(";")
    assert (times, chosen) == ("1", "reference")
    assert why == shown and why.startswith("_C_cuda.so ") and reason in why


@needs_emulator
def test_a_machine_that_runs_the_object_runs_it(probe: Path):
    said = run(probe, "9.0", "9.0a+PTX", 13000, "", RUN)
    assert said == "1;cuda;None;None"


@needs_emulator
def test_named_it_raises_with_the_reason(probe: Path):
    program = """
x = torch.randn(1, 4, 8)
try:
    gated_residual(x, x, torch.ones(1, 1, 8), backend="cuda")
except NotImplementedError as error:
    print(error)
"""
    said = run(probe, "7.5", "9.0a", 13000, NO_CODE, program)
    assert "cuda: _C_cuda.so was built for 9.0a, not for compute capability 7.5" in said


@pytest.mark.parametrize(
    ("name", "built", "found"),
    [
        ("9.0a", ("8.0", "9.0a"), True),
        ("9.0a", ("9.0a+PTX",), True),
        ("9.0a", ("9.0", "10.0"), False),
        ("9.0a", (), False),
    ],
)
def test_code_for_an_architecture_is_there_with_ptx_and_without(name, built, found):
    assert _probe.has_architecture(name, built) is found
