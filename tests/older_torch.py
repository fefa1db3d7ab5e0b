"""Headers of older releases of torch, and which of its C functions they declare."""

import functools
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / "build" / "torch-headers"
OLDEST, RELEASES = "2.10.0", ("2.10.0", "2.11.0")
SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
# of all packages of a release the smallest, 80 MB; include/torch is the same in each
SMALLEST = ("--platform", "macosx_11_0_arm64", "--python-version", "3.12")


@functools.cache
def package(release: str) -> Path:
    """A folder torch/ with version.py and include/ of a release, from pip where it is not kept."""
    kept = CACHE / release
    if not kept.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unpack(download(release, Path(folder)), Path(folder) / "package")
            if not kept.is_dir():
                (Path(folder) / "package").rename(kept)
    return kept / "torch"


def download(release: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", *SMALLEST, f"torch=={release}"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"no headers of torch {release}: pip download: {why}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = [n for n in packed.namelist() if n.startswith("torch/include/")]
        packed.extractall(folder, [*names, "torch/version.py"])


@functools.cache
def declared(release: str) -> frozenset[str]:
    """The C functions that the headers of a release declare for those who target it."""
    major, minor = map(int, release.split(".")[:2])
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    include = package(release) / "include"
    command = ("g++", "-E", "-P", "-x", "c++", "-DUSE_CUDA", target, "-I", str(include), "-")
    text = "\n".join(f"#include <{shim}>" for shim in SHIMS)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", done.stdout))


def asked_for(library: Path) -> set[str]:
    """Its undefined symbols that are not of the C or C++ runtime."""
    command = ["nm", "--dynamic", "--undefined-only", "--format=posix"]
    symbols = subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout
    rows = (line.split()[:2] for line in symbols.splitlines())
    return {name for name, kind in rows if "@" not in name and kind == "U"}


def not_in(release: str, library: Path) -> set[str]:
    """What a library asks of torch that the release does not have."""
    return asked_for(library) - declared(release)
