"""Files: those that others wrote are read with care, ours appear whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_LIMIT = 2**20  # bytes; the index of a full-size FLUX.1 has an eighth of it
SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")


def check_link(path: Path) -> None:
    """Refuses a link that leads out of its folder, but for a hub cache's to its own blobs.

    Args:
        path: a file or where one may be.
    Raises:
        ValueError: it leads out.
    """
    folder = Path(os.path.realpath(path.parent))
    roots = [folder]
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots.append(parent.parent / "blobs")
    if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
        raise ValueError(f"{path}: leads out of its folder")


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file of at most 1 MiB.

    Args:
        path: the file; it may not link out of its folder.
    Returns:
        the object, unchecked.
    Raises:
        ValueError: not there, not readable, too large, no JSON, or no object.
    """
    path = Path(path)
    check_link(path)
    if not path.is_file():
        raise ValueError(f"{path.parent}: has no {path.name}")
    try:
        with open(path, "rb") as file:
            text = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path}: larger than {JSON_LIMIT} bytes")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON") from None
    if type(data) is not dict:
        raise ValueError(f"{path}: not a JSON object")
    return data


def read_weight_map(index: Path) -> dict[str, str]:
    """Reads which file of its folder holds which tensor from the index of a sharded checkpoint.

    Args:
        index: the .index.json file.
    Returns:
        tensor name -> name of a .safetensors file beside the index, which need not exist.
    Raises:
        ValueError: as read_json; no such map; a file elsewhere or of another kind.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index}: has no weight_map")
    for shard in places.values():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(
                f"{index}: a shard must be a .safetensors file beside it, got {shard!r:.80}"
            )
    for shard in set(places.values()):
        check_link(index.parent / shard)
    return places


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with sorted names."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_files(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Writes files under temporary names and moves them to their own when all are whole.

    Args:
        folder: made where it is not there; a failure leaves it as it was.
        writers: file name -> what writes it to a path.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(temporary[name])
            with open(temporary[name], "rb") as file:
                os.fsync(file.fileno())
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `folder` at the end: whole or not at all.

    Args:
        folder: what it holds before is removed once the new one has its name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    unfinished, old = aside / "new", aside / "old"
    unfinished.mkdir()
    try:
        yield unfinished
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(unfinished, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(aside)
