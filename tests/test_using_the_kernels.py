"""docs/using-the-kernels.md: the code on the page, run as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/using-the-kernels.md").read_text()
BLOCKS = dict(re.findall(r"^```(\w+(?: [\w.]+)?)\n(.+?)^```$", PAGE, re.M | re.S))
OFFLINE = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"asks the network: {event} {args}")
sys.addaudithook(refuse)
"""


def run(*command: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "FLUXKERN": str(ROOT), "PYTHONPATH": str(path), "PATH": tools}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def said(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shell(name: str, **where: Path) -> subprocess.CompletedProcess:
    return run("bash", "-euc", BLOCKS[f"sh {name}"], **where)


def write(folder: Path, name: str) -> None:
    (folder / name).write_text(BLOCKS[f"cpp {name}"])


def test_the_page_has_these_blocks_and_no_other():
    names = {"python", "cpp main.cpp", "sh cpu", "cpp main.cu", "sh cuda", "sh hub", "python hub"}
    assert set(BLOCKS) == names
    assert PAGE.count("\n```") == 2 * len(names)


@pytest.mark.build
def test_the_python_example_compiles_and_has_the_gradients_of_plain_pytorch(tmp_path: Path):
    said(run(sys.executable, "-c", BLOCKS["python"], cwd=tmp_path))


@pytest.mark.build
def test_a_cpp_program_links_the_cpu_kernels_without_torch(tmp_path: Path):
    write(tmp_path, "main.cpp")
    assert said(shell("cpu", cwd=tmp_path)).startswith("largest error: ")
    needed = said(run("readelf", "-d", "on_cpu", cwd=tmp_path))
    assert "libstdc++" in needed and "torch" not in needed and "python" not in needed


@pytest.mark.build
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_a_cuda_program_links_the_cuda_kernels_without_torch(tmp_path: Path):
    """Without a GPU it compiles, links, starts and ends with CUDA's own error."""
    write(tmp_path, "main.cu")
    done = shell("cuda", cwd=tmp_path)
    assert "torch" not in said(run("readelf", "-d", "on_gpu", cwd=tmp_path))
    if torch.cuda.is_available():
        assert said(done) == "right\n"
    else:
        assert done.returncode == 2 and "CUDA" in done.stdout, done.stdout + done.stderr


def test_the_hub_example_replaces_the_layers_of_a_diffusers_model_offline(tmp_path: Path):
    assert said(shell("hub", cwd=tmp_path)) == "build/hub\n"
    program = OFFLINE + BLOCKS["python hub"] + "assert 'fluxkern' not in sys.modules\n"
    printed = said(run(sys.executable, "-c", program, cwd=tmp_path, path=tmp_path))
    expected = "triton" if torch.cuda.is_available() else "reference"
    assert re.match(r"torch\.Size\(\[2, 7, 64\]\) norm_modulate +" + expected, printed)
