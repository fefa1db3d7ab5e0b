"""Digests of the kernels' sources: whether what was measured is of the kernel that is here.

Triton's are of the file in fluxkern/kernels and of what it imports there; those of compiled kernels
setup.py wrote when it compiled them.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_OBJECTS = {"cpu": "_C_cpu", "cuda": "_C_cuda", "cuda-wgmma": "_C_cuda"}


@cache
def build_info() -> dict:
    """What setup.py wrote of the build: per object what it was built with, or why it was not."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def of_kernel(op: str, backend: str) -> str | None:
    """Of the kernel that a backend of ours has for an op, or of the one with such a name; None
    where there is no source of ours."""
    known = _of_triton() if backend == "triton" else _of_object(_OBJECTS.get(backend))
    return next((known[name] for name in _names(op, backend) if name in known), None)


def _names(op: str, backend: str) -> list[str]:
    """Of the files where a kernel may be, the likeliest first."""
    name = re.sub(r"_backward.*", "", op).removeprefix("joint_").rstrip("_")
    if backend == "cuda-wgmma":
        return ["attention_wgmma"]
    return [name, "attention"] if "attention" in name else [name]


def _of_object(name: str | None) -> dict[str, str]:
    return build_info().get(name, {}).get("sources", {})


@cache
def _of_triton() -> dict[str, str]:
    folder = _PACKAGE / "kernels"
    texts = {path.stem: path.read_bytes() for path in folder.glob("*.py")}
    found = {}
    for name in texts:
        digest = hashlib.sha256()
        for needed in sorted(_with_imports(name, texts)):
            digest.update(needed.encode() + b"\0" + texts[needed])
        found[name] = digest.hexdigest()[:16]
    return found


def _with_imports(name: str, texts: dict[str, bytes]) -> set[str]:
    seen, waiting = set(), {name}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        lines = re.findall(rb"^from \.(\w*) import (.*)$", texts[name], re.M)
        words = {word.decode() for line in lines for word in re.findall(rb"\w+", b" ".join(line))}
        waiting |= (words & texts.keys()) - seen
    return seen
