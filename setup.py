"""Builds fluxkern: its Python, and the kernels of csrc/ as shared libraries without a Python ABI.

    python setup.py build_ext --inplace   fluxkern/_C_cpu.so, _C_cuda.so, _build_info.json
    python setup.py build_emulator        fluxkern/_C_cuda_emulator.so: the CUDA sources on a CPU

FLUXKERN_BUILD says what is built: cpu, cuda (and cpu), cuda-alone, none, or auto, which builds what
this machine can and warns of what failed. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, FORCE_CUDA,
MAX_JOBS and NVCC_THREADS mean what they mean to torch's own extensions. torch's CUDAExtension is
not used: it refuses to compile under a torch for CPUs.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "objects"  # named by what went into them, so one that is there is current
CHOICES = {
    "auto": ("_C_cpu", "_C_cuda"),
    "cpu": ("_C_cpu",),
    "cuda": ("_C_cpu", "_C_cuda"),
    "cuda-alone": ("_C_cuda",),
    "none": (),
}
TORCH_TARGET = (2, 10)  # the oldest torch that loads the objects
ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-value", "-Wno-maybe-uninitialized"]  # gcc's immintrin
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


class CannotBuild(Exception):
    """The reason, in one line, why an object is not there."""


class LeftOut(CannotBuild):
    """The reason why nobody asked for it."""


class Unit(NamedTuple):
    """One call of a compiler."""

    source: Path
    variant: str  # instruction set or architectures
    command: list[str]  # without -o and the source


class Library(NamedTuple):
    name: str
    units: list[Unit]
    link: list[str]  # without -o, the objects and torch
    about: dict[str, object]  # for _build_info.json


class Torch(NamedTuple):
    version: str
    cuda: str | None
    flags: list[str]  # to compile
    libraries: list[str]  # to link


# what there is to build with


def said_by(*command: str) -> str:
    """What a command prints; nothing when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not run: {error.strerror}") from error
    return done.stdout + done.stderr if done.returncode == 0 else ""


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild("no torch to compile against (pip install --no-build-isolation)")
    return torch_of(Path(spec.submodule_search_locations[0]))


def torch_of(home: Path) -> Torch:
    """The torch whose package lies in `home`; its version and headers are enough to compile."""
    about = runpy.run_path(str(home / "version.py"))
    version = str(about["__version__"])
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH_TARGET:
        raise CannotBuild(f"torch {version} is older than {'.'.join(map(str, TORCH_TARGET))}")
    if not (home / "include/torch/csrc/stable/library.h").is_file():
        raise CannotBuild(f"torch {version} has come without its headers")
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    paths = ["-isystem", str(home / "include"), f"-ffile-prefix-map={home}=torch"]
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu"]
    return Torch(version, about.get("cuda"), [target, *paths], libraries)


def find_compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise CannotBuild(f"no C++ compiler: {command[0]} not found")
    return command


def own_flags() -> list[str]:
    """CXXFLAGS, as sanitizers need them at the compiler and at the linker."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if found := shutil.which(place):
            return found
    raise CannotBuild(f"no CUDA compiler: {' and '.join(places)} not found")


def version_of(*compiler: str) -> str:
    lines = said_by(*compiler, "--version").strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown")


def whole_number(variable: str, default: int) -> int:
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"{variable} must be a whole number of at least 1, got {value!r}")
    return int(value)


def architectures(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or those of ours that this nvcc knows."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        return named
    known = set(said_by(nvcc, "--list-gpu-code").split())
    return [a for a in ARCHITECTURES.split() if "sm_" + re.sub(r"\D", "", a) in known]


def gencode(architecture: str) -> list[str]:
    """9.0a -> its machine code; 12.0+PTX -> and the PTX that later GPUs compile."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
    if match is None:
        raise CannotBuild(
            f"TORCH_CUDA_ARCH_LIST holds {architecture!r}, not one such as 8.0, 9.0a or 12.0+PTX"
        )
    number = match[1] + match[2]
    codes = ["sm"] + ["compute"] * bool(match[3])
    return [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]


# what there is to build


def cpu_library(torch: Torch) -> Library:
    """Every kernel once for each instruction set; the right one is chosen when it is called."""
    compiler = find_compiler()
    command = [*compiler, *COMMON, *own_flags(), "-c"]
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS if x86 else {"baseline": []}
    kernels = [
        path for folder in ("cpu", "bench") for path in (ROOT / "csrc" / folder).glob("*.cpp")
    ]
    units = [
        Unit(source, name, [*command, *flags, f"-DFLUXKERN_ISA={name}"])
        for source in sorted(kernels)
        for name, flags in sets.items()
    ]
    units.append(Unit(ROOT / "csrc/bindings/cpu.cpp", "baseline", [*command, *torch.flags]))
    flags = [*COMMON, *own_flags()]
    about = {"compiler": version_of(*compiler), "flags": flags, "instruction_sets": sets}
    return Library("_C_cpu", units, [*compiler, *own_flags(), "-shared"], about)


def cuda_library(torch: Torch) -> Library:
    nvcc = find_nvcc()
    archs = architectures(nvcc)
    host = ["-ccbin", find_compiler()[-1]] if os.environ.get("CXX") else []
    flags = ["-std=c++20", "-O3", f"--threads={whole_number('NVCC_THREADS', 1)}"]
    command = [nvcc, *host, *flags, "-Xcompiler=-fPIC,-fvisibility=hidden", "-c"]
    gencodes = [flag for arch in archs for flag in gencode(arch)]
    binding = [*command, "-DUSE_CUDA", *(through_nvcc(flag) for flag in torch.flags)]
    units = [
        Unit(source, "+".join(archs), [*command, *gencodes])
        for source in [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "csrc/bindings/probe.cu"]
    ]
    units.append(Unit(ROOT / "csrc/bindings/cuda.cpp", "host", binding))
    about = {"compiler": version_of(nvcc), "flags": flags, "architectures": archs}
    link = [nvcc, *host, "-shared", "--cudart=static", "--no-device-link"]
    return Library("_C_cuda", units, link, about)


def through_nvcc(flag: str) -> str:
    return f"-Xcompiler={flag}" if flag.startswith("-f") else flag


def cuda_headers() -> Path:
    try:
        top = re.search(r"^#\$ TOP=(.+)$", said_by(find_nvcc(), "--dryrun", "-c", "x.cu"), re.M)
    except CannotBuild:
        top = None
    home = top[1] if top else os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    headers = Path(home).resolve() / "include"
    if not (headers / "cuda_runtime_api.h").is_file():
        raise CannotBuild(f"no headers of CUDA in {headers}")
    return headers


def emulator_library(torch: Torch) -> Library:
    """The CUDA sources as csrc/emulator runs them on a CPU, for tests."""
    compiler = find_compiler()
    include = ["-Icsrc/emulator", "-isystem", str(cuda_headers())]
    command = [*compiler, *COMMON, "-O2", *own_flags(), "-DFLUXKERN_EMULATOR", *include]
    command += ["-Wno-unknown-pragmas", "-Wno-psabi", "-c"]
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/emulator").glob("*.cpp")]
    units = [Unit(source, "emulator", [*command, "-x", "c++"]) for source in sorted(sources)]
    binding = ROOT / "csrc/bindings/cuda.cpp"
    units.append(Unit(binding, "emulator", [*command, *torch.flags]))
    about = {"compiler": version_of(*compiler), "flags": [*COMMON, *own_flags()]}
    return Library("_C_cuda_emulator", units, [*compiler, *own_flags(), "-shared"], about)


LIBRARIES = {"_C_cpu": cpu_library, "_C_cuda": cuda_library}


# building it


def with_headers(unit: Unit) -> Iterator[Path]:
    """The source and every file of ours that it includes."""
    seen, waiting = set(), [unit.source]
    ours = [ROOT / flag[2:] for flag in unit.command if flag.startswith("-Icsrc")]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        for name in re.findall(r'^\s*#\s*include\s+["<](.+?)[">]', path.read_text(), re.M):
            places = [(folder / name).resolve() for folder in (path.parent, *ours)]
            waiting += [place for place in places if place.is_file()]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def run_compiler(command: list[str], output: Path, what: str) -> None:
    """Runs it with `-o output`, which is there whole or not at all."""
    part = output.with_name(f"{output.name}.{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, cwd=ROOT)
    said = done.stdout + done.stderr
    print(f"{what}\n{said}" if said else what, flush=True)
    if done.returncode:
        part.unlink(missing_ok=True)
        first = next((line for line in said.splitlines() if "error" in line), said.strip()[:200])
        raise CannotBuild(f"{Path(command[0]).name} failed on {what}: {first}")
    part.replace(output)


def compile_unit(unit: Unit, versions: list[str]) -> Path:
    sources = [(path.name, path.read_text()) for path in with_headers(unit)]
    key = digest(unit.command, versions, sources)
    output = CACHE / f"{unit.source.stem}.{key}.o"
    if not output.exists():
        source = unit.source.relative_to(ROOT)
        run_compiler([*unit.command, str(source)], output, f"{source} ({unit.variant})")
    return output


def compile_library(library: Library, torch: Torch) -> Path:
    versions = [str(library.about["compiler"]), torch.version]
    with ThreadPoolExecutor(whole_number("MAX_JOBS", len(os.sched_getaffinity(0)))) as pool:
        objects = list(pool.map(lambda unit: compile_unit(unit, versions), library.units))
    command = [*library.link, *map(str, objects), *torch.libraries]
    output = CACHE / f"{library.name}.{digest(command, versions)}.so"
    if not output.exists():
        run_compiler(command, output, f"{library.name}.so")
    return output


def write(target: Path, content: bytes) -> None:
    """The file is the old or the new one; a process that has the old one open keeps it."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(target)


def place(built: Path, target: Path) -> None:
    content = built.read_bytes()
    if not target.exists() or target.read_bytes() != content:
        write(target, content)


def choice() -> str:
    chosen = os.environ.get("FLUXKERN_BUILD") or "auto"
    if chosen not in CHOICES:
        raise SystemExit(f"FLUXKERN_BUILD must be one of {', '.join(CHOICES)}, got {chosen!r}")
    return chosen


def source_digests(library: Library) -> dict[str, str]:
    """Kernel -> digest of its source and of our headers in it: what a measurement is of."""
    kernels = [unit for unit in library.units if unit.source.parent.name in ("cpu", "cuda")]
    read = {unit.source.stem: [path.read_text() for path in with_headers(unit)] for unit in kernels}
    return {name: digest(sorted(texts)) for name, texts in read.items()}


def build_object(name: str, chosen: str, target: Path) -> dict[str, object]:
    """Builds one object; returns its entry in _build_info.json."""
    if name not in CHOICES[chosen]:
        raise LeftOut(f"FLUXKERN_BUILD={chosen}")
    torch = find_torch()
    forced = os.environ.get("TORCH_CUDA_ARCH_LIST") or os.environ.get("FORCE_CUDA") == "1"
    if name == "_C_cuda" and chosen == "auto" and not torch.cuda and not forced:
        raise LeftOut(f"torch {torch.version} is for CPUs (FLUXKERN_BUILD=cuda builds it anyway)")
    library = LIBRARIES[name](torch)
    place(compile_library(library, torch), target)
    sources = source_digests(library)
    return {"built": True, "torch": torch.version, **library.about, "sources": sources}


def build_objects(package: Path, chosen: str) -> tuple[dict[str, dict], list[str]]:
    """Builds what was chosen, takes away what an earlier build left; the entries and failures."""
    entries, failed = {}, []
    for name in LIBRARIES:
        target = package / f"{name}.so"
        try:
            entries[name] = build_object(name, chosen, target)
        except CannotBuild as reason:
            if not isinstance(reason, LeftOut):
                failed.append(f"{name}: {reason}")
            entries[name] = {"built": False, "reason": str(reason)}
            target.unlink(missing_ok=True)
    return entries, failed


def commit() -> str | None:
    """The commit that csrc is of, with -dirty when files differ; None outside a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    return said_by("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty").strip()


def build(package: Path) -> None:
    chosen = choice()
    package.mkdir(parents=True, exist_ok=True)
    entries, failed = build_objects(package, chosen)
    info = {
        "build": chosen,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "torch_target": ".".join(map(str, TORCH_TARGET)),
        **entries,
    }
    write(package / "_build_info.json", (json.dumps(info, indent=2) + "\n").encode())
    if failed and chosen != "auto":
        raise SystemExit(f"error: FLUXKERN_BUILD={chosen}: {'; '.join(failed)}")
    if failed:
        print(f"WARNING: fluxkern goes without compiled kernels: {'; '.join(failed)}", flush=True)


class BuildKernels(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        build(ROOT / "fluxkern" if in_place else Path(self.build_lib) / "fluxkern")

    def get_source_files(self) -> list[str]:
        files = (ROOT / "csrc").rglob("*")
        return [str(path.relative_to(ROOT)) for path in files if path.is_file()]

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fluxkern"
        names = [f"{name}.so" for name in LIBRARIES] + ["_build_info.json"]
        return [str(package / name) for name in names if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildEmulator(Command):
    description = "build _C_cuda_emulator.so, the CUDA sources run by a CPU (tests only)"
    user_options = [("build-lib=", "b", "folder of the package it goes to (default: in place)")]

    def initialize_options(self) -> None:
        self.build_lib = str(ROOT)

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        try:
            torch = find_torch()
            library = emulator_library(torch)
            built = compile_library(library, torch)
        except CannotBuild as error:
            raise SystemExit(f"error: _C_cuda_emulator: {error}") from error
        place(built, Path(self.build_lib) / "fluxkern" / f"{library.name}.so")


class OneWheel(bdist_wheel):
    """One wheel for every Python: the objects ask for no Python symbol."""

    def run(self) -> None:
        if not self.skip_build:  # what an earlier build left would go in
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        outputs = self.get_finalized_command("build_ext").get_outputs()
        built = any(name.endswith(".so") for name in outputs)
        return "py3", "none", super().get_tag()[2] if built else "any"


class WithKernels(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if __name__ == "__main__":
    setup(
        distclass=WithKernels,
        cmdclass={
            "build_ext": BuildKernels,
            "build_emulator": BuildEmulator,
            "bdist_wheel": OneWheel,
        },
    )
