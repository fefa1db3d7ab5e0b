"""The ops and the Triton kernels as a kernel of the Hugging Face `kernels` package.

    python -m hub [folder]    into build/hub, anew, or a folder that is not there yet

    build.toml, CARD.md         hub/'s
    torch-ext/fluxkern/         hub/'s layers, and of fluxkern/: ops/, kernels/, reference.py
    build/torch-<backend>/      the same, a namespace of its own for the ops, and metadata.json

`build/` is what the hub serves and `kernels.get_local_kernel(folder)` loads; the rest is what
kernel-builder takes. Only files of this checkout go in, and nothing is downloaded.
"""

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
PARTS = ("ops", "kernels", "reference.py")
NAMESPACE = "_ops.py"  # kernel-builder writes one of its own


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def files_of(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def content_hash(files: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(list(files.items())).encode()).hexdigest()[:12]


def digest(files: dict[str, bytes]) -> dict[str, object]:
    hashes = {name: hashlib.sha256(content).digest() for name, content in files.items()}
    encoded = {name: base64.b64encode(value).decode() for name, value in hashes.items()}
    return {"algorithm": "sha256", "files": encoded}


def write_variant(source: Path, target: Path, general: dict, backend: str) -> None:
    """One build: its id, which ends in the hash of its content, names its module and its ops."""
    copy(source, target)
    name = f"_{general['name']}_{backend}_{content_hash(files_of(source))}"
    ours = (ROOT / "fluxkern" / NAMESPACE).read_text()
    (target / NAMESPACE).write_text(ours.replace("fluxkern", name))
    metadata = {
        "id": name,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": digest(files_of(target)),
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def generate(folder: Path) -> None:
    """Writes the layout into a new folder; FileExistsError if it is there."""
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]
    folder.mkdir(parents=True)
    for name in ("build.toml", "CARD.md", "torch-ext"):
        copy(HUB / name, folder / name)
    package = folder / "torch-ext" / general["name"]
    for part in PARTS:
        copy(ROOT / "fluxkern" / part, package / part)
    for backend in general["backends"]:
        write_variant(package, folder / "build" / f"torch-{backend}", general, backend)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hub", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    if folder is None:
        folder = Path("build/hub")
        shutil.rmtree(folder, ignore_errors=True)
    generate(folder)
    print(folder)


if __name__ == "__main__":
    main()
