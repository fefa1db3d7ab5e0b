"""The programs of csrc/emulator/sanitize with another source of their kernel."""

import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_of_fluxkern")


def source_without(op: str, code: str, which: int = 0, instead: str = "") -> str:
    """The kernel's source without the code, at the which-th of its places."""
    parts = (ROOT / f"csrc/cuda/{op}.cu").read_text().split(code)
    assert len(parts) > which + 1
    return code.join(parts[: which + 1]) + instead + code.join(parts[which + 1 :])


def planted_programs(op: str, folder: Path) -> Callable:
    """Runs csrc/emulator/sanitize/<op>.cpp with the source of the kernel that it is given."""
    try:
        headers = SETUP["cuda_headers"]()
    except SETUP["CannotBuild"] as reason:
        pytest.skip(str(reason))
    objects: dict[str, list[Path]] = {}
    includes = ["-Icsrc/emulator", "-Icsrc/cuda", "-isystem", str(headers)]
    flags = ["-std=c++20", "-O1", "-g", "-Wno-unknown-pragmas", "-DFLUXKERN_EMULATOR", *includes]

    def compiled(source: Path, more: list[str]) -> Path:
        output = folder / f"{len(list(folder.iterdir()))}.o"
        command = ["g++", *flags, *more, "-x", "c++", "-c", str(source), "-o", str(output)]
        subprocess.run(command, check=True, cwd=ROOT)
        return output

    def run(kernel: str, sanitizer: str = "") -> subprocess.CompletedProcess:
        more = [f"-fsanitize={sanitizer}"] if sanitizer else []
        if sanitizer not in objects:
            emulator = ROOT / "csrc/emulator"
            around = [emulator / f"sanitize/{op}.cpp", *emulator.glob("*.cpp")]
            objects[sanitizer] = [compiled(source, more) for source in around]
        (folder / "planted.cu").write_text(kernel)
        planted = compiled(folder / "planted.cu", more)
        subprocess.run(
            ["g++", *more, planted, *objects[sanitizer], "-o", folder / "run"], check=True
        )
        return subprocess.run(
            ["setarch", "--addr-no-randomize", folder / "run"],
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run
