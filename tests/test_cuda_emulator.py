"""The layer that runs CUDA sources on a CPU, and that it catches bugs planted in them."""

import os
import runpy
import subprocess
from pathlib import Path
from tempfile import mkdtemp

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_fluxkern")

# Sums of rows by the primitives of csrc/cuda/common.cuh, two warps a block, a block a row; and bugs
# that the first argument chooses.
PROGRAM = """
#include "common.cuh"
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace fluxkern;
using namespace fluxkern::cuda;

struct Storage { float slots[1][WARP]; };

__global__ void row_sums_kernel(const float* x, float* out, int C, int bug) {
    const Share<float, 1> share = {C};
    const Vec v = share.load(x + int64_t(blockIdx.x) * C, 0);
    float sum[1] = {};
    for (int i = 0; i < WIDTH; ++i) sum[0] += v[i];
    if (bug == 1 && threadIdx.x != 5) __syncthreads();
    if (bug == 2 && threadIdx.x == 63) return;
    if (bug == 3 && threadIdx.x % 2) __syncwarp();
    if (bug == 4) __syncwarp(1);
    if (bug == 5) shared<Storage[2]>()[1].slots[0][0] = 1;
    block_sum(sum, shared<Storage>().slots);
    out[(bug == 6 ? 0 : blockIdx.x * blockDim.x) + threadIdx.x] = sum[0];
}

int main(int, char** arguments) {
    const int rows = 3, C = 504, threads = 64;
    const std::vector<float> x(rows * C, 1.0f);
    std::vector<float> out(rows * threads, -1.0f);
    const cudaError_t error =
        launch(Context{nullptr, 1}, row_sums_kernel, rows, threads, sizeof(Storage), x.data(),
               out.data(), C, std::atoi(arguments[1]));
    if (error != cudaSuccess) {
        std::printf("%s", cudaGetErrorString(error));
        return 3;
    }
    for (const float sum : out) {
        if (sum != C) {
            std::printf("sum %g", sum);
            return 2;
        }
    }
}
"""
BARRIER = ("    __syncthreads();\n", "")
GUARD = (
    "return has(tile, 0) ? load_packed(row + column(tile, 0)) : Packed<Element>{};",
    "return load_packed(row + column(tile, 0));",
)
ASAN, TSAN = "address,undefined", "thread"


@pytest.fixture(scope="module")
def include() -> list[str]:
    try:
        return ["-I", str(ROOT / "csrc/emulator"), "-isystem", str(SETUP["cuda_headers"]())]
    except SETUP["CannotBuild"] as reason:
        pytest.skip(str(reason))


def compiled(source: Path, include: list[str], sanitizer: str | None, output: Path) -> Path:
    flags = ["-std=c++20", "-O0", "-g", "-Wno-unknown-pragmas", "-DFLUXKERN_EMULATOR", *include]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    command = ["g++", *flags, "-x", "c++", str(source), "-c", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def build(include: list[str], tmp_path_factory: pytest.TempPathFactory):
    """The program for a sanitizer, with an edit of common.cuh; each is built once."""
    folder, built = tmp_path_factory.mktemp("cuda_emulator"), {}

    def once(key: tuple, make) -> Path:
        if key not in built:
            built[key] = make(Path(mkdtemp(dir=folder)))
        return built[key]

    def build(sanitizer: str | None = None, edit: tuple[str, str] = ("", "")) -> Path:
        def layer(output: Path) -> Path:
            source = ROOT / "csrc/emulator/device.cpp"
            return compiled(source, include, sanitizer, output / "device.o")

        def program(output: Path) -> Path:
            common = (ROOT / "csrc/cuda/common.cuh").read_text()
            assert not edit[0] or common.count(edit[0]) == 1
            common = common.replace(*edit) if edit[0] else common
            (output / "common.cuh").write_text(common.replace('"kernels.h"', '"cuda/kernels.h"'))
            (output / "row_sums.cu").write_text(PROGRAM)
            places = [*include, "-I", str(ROOT / "csrc")]
            kernel = compiled(output / "row_sums.cu", places, sanitizer, output / "row_sums.o")
            link = [f"-fsanitize={sanitizer}"] if sanitizer else []
            objects = [kernel, once((sanitizer, "layer"), layer)]
            subprocess.run(["g++", *link, *objects, "-o", output / "row_sums"], check=True)
            return output / "row_sums"

        return once((sanitizer, edit), program)

    return build


def run(program: Path, bug: int = 0, reverse: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["setarch", "--addr-no-randomize", program, str(bug)],
        env={**os.environ, "FLUXKERN_EMULATOR_REVERSE": str(int(reverse))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_a_kernel_gives_its_sums_in_either_order(build, reverse: bool):
    done = run(build(), reverse=reverse)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("sanitizer", [ASAN, TSAN])
def test_a_right_kernel_is_clean_under_a_sanitizer(build, sanitizer: str):
    done = run(build(sanitizer))
    assert (done.returncode, done.stdout) == (0, "")


def test_a_read_out_of_bounds_is_caught(build):
    done = run(build(ASAN, GUARD))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stdout and "load_packed" in done.stdout, done.stdout


def test_shared_memory_is_as_large_as_the_launch_says(build):
    done = run(build(ASAN), bug=5)
    assert "heap-buffer-overflow" in done.stdout and "row_sums.cu" in done.stdout, done.stdout


def test_a_removed_barrier_gives_a_wrong_sum(build):
    done = run(build(None, BARRIER))
    assert done.returncode == 2 and "nan" in done.stdout  # what shared memory starts as


def test_a_removed_barrier_is_a_race(build):
    done = run(build(TSAN, BARRIER))
    assert "data race" in done.stdout and "block_sum" in done.stdout, done.stdout


def test_blocks_that_write_the_same_element_are_a_race(build):
    done = run(build(TSAN), bug=6)
    assert "data race" in done.stdout and "row_sums_kernel" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("bug", "told"),
    [
        (1, "thread 5 waits in a shuffle"),
        (2, "thread 32 waits in a shuffle"),
        (3, "thread 1 waits in __syncwarp"),
        (4, "thread 1 waits in __syncwarp"),
    ],
)
def test_a_divergent_barrier_is_an_error_and_no_hang(build, bug: int, told: str):
    done = run(build(), bug)
    assert done.returncode == 3
    assert done.stdout.startswith("divergent barrier: thread 0") and told in done.stdout


def test_every_cuda_source_has_a_program_for_the_sanitizers():
    programs = {path.stem for path in (ROOT / "csrc/emulator/sanitize").glob("*.cpp")}
    assert programs == {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
