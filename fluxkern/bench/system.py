"""What a figure depends on besides the code, and which code it is."""

import hashlib
import os
import platform
import re
import statistics
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import ops
from .timers import last_level_cache

ROOT = Path(__file__).parents[2]
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def said_by(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def commit() -> str | None:
    """Of this checkout, with -dirty where the code that runs differs from it."""
    if not (ROOT / ".git").exists():
        return None
    code = ("fluxkern", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")
    changed = said_by("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    head = said_by("git", "rev-parse", "--short=12", "HEAD")
    return f"{head}-dirty" if head and changed else head


def source_hash() -> str:
    """Of the code that runs, also where there is no git."""
    digest = hashlib.sha256()
    for folder, pattern in (("fluxkern", "*.py"), ("csrc", "*")):
        for file in sorted((ROOT / folder).rglob(pattern)):
            if file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
    said = said_by("nvidia-smi", query, "--format=csv,noheader", "--id=0") or ""
    driver, *clocks = [part.strip() for part in said.split(",")]
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "last_level_cache": found.L2_cache_size,
        "driver": driver or None,
        "clocks_and_power_limit": clocks,
        "cuda": torch.version.cuda,
    }


def clock() -> dict[str, Any]:
    """Governor and present frequency of the cores, as far as the system tells."""
    file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    info = Path("/proc/cpuinfo")
    found = re.findall(r"^cpu MHz\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    return {
        "governor": file.read_text().strip() if file.exists() else None,
        "mhz": round(statistics.median(map(float, found))) if found else None,
    }


def isa() -> str | None:
    """The instruction set of our CPU kernels; None where they are not built."""
    ops.explain()
    found = getattr(torch.ops.fluxkern_cpu, "_isa", None)
    return found() if found else None


def limit_isa() -> None:
    """Our CPU code takes no more than torch may by ATEN_CPU_CAPABILITY.

    What asks torch for bf16 arithmetic is then told what a processor with AVX2 alone answers.
    """
    ops.explain()
    limit, set_isa = os.environ.get(LIMITS[0]), getattr(torch.ops.fluxkern_cpu, "_set_isa", None)
    if limit in ("avx2", "avx512") and set_isa is not None:
        set_isa(limit)
    if limit == "avx2":
        torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code, and which code it is."""
    head = commit()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cpu_capability": {"torch": torch.backends.cpu.get_cpu_capability(), "fluxkern": isa()},
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "clock": clock(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "load": os.getloadavg()[0],
        "gpu": gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "diffusers")},
        "commit": head,
        "dirty": head is not None and head.endswith("-dirty"),
        "source": source_hash(),
    }
