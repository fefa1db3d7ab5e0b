"""Files: those that others wrote are read with care, ours appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # not a system with such locks
    fcntl = None

if TYPE_CHECKING:
    from torch import Tensor

JSON_LIMIT = 2**20  # bytes; the index of a full-size FLUX.1 has an eighth of it
SUFFIXES = (".safetensors", ".sft", ".gguf")
PICKLES = {".bin", ".pt", ".ckpt", ".pth", ".pkl", ".pickle"}
SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
ASIDE = ".fluxkern-", ".tmp"  # how the name of a folder of unfinished files begins and ends
ALL = re.compile(r"(?s).*")
PATIENCE = 60  # seconds; a writer holds a folder while it renames, no longer
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


# reading


def check_file(path: Path) -> None:
    """Refuses what may not stand in a file's place in a folder that others made.

    A link out of the folder is followed to a file of the caller's, of root's, or of whoever owns
    the link: what the hub's cache, links to another disk, and package managers make.

    Raises:
        ValueError: not there, no regular file, or a link to a file of somebody else.
    """
    try:
        link, file = os.lstat(path), os.stat(path)
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: has no {path.name}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(file.st_mode):
        raise ValueError(f"{path} is not a file")
    _check_owner(path, link, file)


def check_folders(folder: Path) -> None:
    """Refuses links in a folder that others made to folders that `check_file` refuses files of."""
    for path in folder.iterdir():
        if path.is_symlink() and path.is_dir():
            _check_owner(path, os.lstat(path), os.stat(path))


def _check_owner(path: Path, link: os.stat_result, target: os.stat_result) -> None:
    if not stat.S_ISLNK(link.st_mode) or target.st_uid in (link.st_uid, 0, _caller()):
        return
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        kind = "folder" if stat.S_ISDIR(target.st_mode) else "file"
        raise ValueError(f"{path}: leads out of its folder, to a {kind} of another user")


def _caller() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Reads a file of at most `limit` bytes; one that is larger or not readable: ValueError."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise ValueError(f"{path}: larger than {limit} bytes")
    return data


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file; a link is followed as `check_file` says.
        limit: bytes that it may have, 1 MiB.
    Returns:
        the object, unchecked.
    Raises:
        ValueError: not there, not readable, too large, no JSON, or no object.
    """
    path = Path(path)
    check_file(path)
    text = read_bytes(path, limit)
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
    return places


def read_tensor_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Reads what a safetensors file says of its tensors, without their values.

    Returns:
        name -> dtype, shape and data_offsets, as the format has them, with sizes and places
        checked; the texts of the header; where in the file offset 0 is.
    Raises:
        ValueError: not a file, a pickle or another kind of file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        _check_is_safetensors(path)
        with safe_open(path, framework="pt") as file:  # which checks sizes and places
            texts = file.metadata() or {}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error!s:.200}") from None
    header.pop("__metadata__", None)
    return header, texts, 8 + length


def _check_is_safetensors(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code; only .safetensors is loaded")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must be a {' or '.join(SUFFIXES)} file, got {suffix or 'none'}")
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # after the header's length
        return
    if head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} is a pickle under another name; only .safetensors is loaded")
    what = "a git-lfs pointer" if head[:4] == b"vers" else "something else"
    raise ValueError(f"{path} is not a safetensors file but {what} ({len(head)} bytes read)")


# writing


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with sorted names."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; OSError where it cannot be written, a full disk say."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # the library's own file is the caller's alone, whatever the umask
    try:
        save_file(dict(tensors), path, dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from None
    path.chmod(mode)


def write_files(
    folder: Path, writers: Mapping[str, Callable[[Path], None]], *, new: bool = False
) -> None:
    """Writes files beside their place and moves them there when all are whole.

    Args:
        folder: made where it is not there; a failure leaves it as it was.
        writers: file name -> what writes it to a path. Each file appears whole; several are moved
            one after another.
        new: refuse to take the place of a file that is there.
    Raises:
        FileExistsError: one is there and `new` is set.
    """
    with _parents(folder), _aside(folder) as aside:
        for name, write in writers.items():
            write(aside / name)
        _sync(aside)
        with _locked(folder):
            for path in (folder / name for name in writers if new):
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, "exists already", str(path))
            for name in writers:
                os.replace(aside / name, folder / name)
        _sync_entry(folder)


@contextmanager
def new_folder(folder: Path, own: re.Pattern[str] | None = None) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `folder` at the end: whole or not at all.

    The two change places in one step where the system can (Linux's RENAME_EXCHANGE). Elsewhere a
    process killed between the two steps leaves no folder, and the next one that writes beside it
    brings the old one back. Of two that write the same folder at a time the later has it.

    Args:
        folder: a link is followed; parents are made where they are not there.
        own: matches the paths below `folder` that are replaced or go, "vae/config.json"; all others
            stay. None: `folder` may hold nothing.
    Raises:
        ValueError: `folder` is a file, holds something though `own` is None, holds the working
            folder, or is a mount point.
    """
    folder = Path(os.path.realpath(folder))
    _check_replaceable(folder, own)
    with _parents(folder.parent), _aside(folder.parent) as aside:
        unfinished = aside / "new"
        unfinished.mkdir()
        yield unfinished
        _sync(unfinished)
        with _locked(folder.parent), _locked(folder):
            _check_replaceable(folder, own)
            if own and folder.exists():
                _carry_over(folder, unfinished, own)
            _sync(unfinished)
            _take_place(unfinished, folder, aside / "old")
        _sync_entry(folder.parent)


def _check_replaceable(folder: Path, own: re.Pattern[str] | None) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, got a file")
    if not own and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder must be new or empty, got {folder}")
    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder):
        raise ValueError(
            f"{folder} is a mount point or holds the working folder: name a folder in it"
        )


def _carry_over(old: Path, new: Path, own: re.Pattern[str]) -> None:
    """Gives a new folder all that the old one holds of others, as links to the same files."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        below = Path(folder).relative_to(old)
        return {name for name in names if own.fullmatch((below / name).as_posix())} | {
            name
            for name in names
            if os.path.lexists(new / below / name)
            and not ((new / below / name).is_dir() and not (Path(folder) / name).is_symlink())
        }

    shutil.copytree(
        old, new, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not on every file system, nor to a file of everybody
        shutil.copy2(source, target)


def _take_place(new: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        os.replace(new, folder)
    elif not _exchange(new, folder):
        old.mkdir()
        os.replace(folder, old / folder.name)
        try:
            os.replace(new, folder)
        except BaseException:
            os.replace(old / folder.name, folder)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Lets two names change places in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Makes a folder with those above it; after a failure, the empty ones of them go again."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):  # others may have put something there
                parent.rmdir()
        raise


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder of a random name in `folder`, held while it is used and removed at the end.

    Those that killed processes left there are removed too.
    """
    prefix, suffix = ASIDE
    with _locked(folder):
        _sweep(folder)
        aside = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=folder))
        held = _lock(aside, wait=False)
    files = aside / "files"  # whose lock is free: a writer may make folders in it in this way
    try:
        files.mkdir()
        yield files
    finally:
        shutil.rmtree(aside)
        if held is not None:
            os.close(held)


def _sweep(folder: Path) -> None:
    for aside in folder.glob("*".join(ASIDE)):
        held = _lock(aside, wait=False)
        if held is None:  # a live process has it, or it has just gone
            continue
        if os.fstat(held).st_uid == _caller():
            _bring_back(aside / "files" / "old", folder)
            shutil.rmtree(aside, ignore_errors=True)
        os.close(held)


def _bring_back(moved: Path, folder: Path) -> None:
    """Gives a folder its old name, which a process killed before the new one had it had taken."""
    linked = any(map(Path.is_symlink, (moved, moved.parent)))  # by who packed it, not by us
    for old in [] if linked else moved.glob("*"):
        if not os.path.lexists(folder / old.name):
            os.replace(old, folder / old.name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other writers out of a folder, where its file system has locks."""
    held = _lock(folder, wait=True)
    while held is not None and not _leads_to(folder, held):
        os.close(held)  # another took its place while we waited
        held = _lock(folder, wait=True)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _leads_to(folder: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(held))
    except FileNotFoundError:  # then nobody holds another of this name
        return True


def _lock(folder: Path, *, wait: bool) -> int | None:
    """The descriptor that holds a folder till it is closed; None where that cannot be had.

    Raises:
        TimeoutError: `wait` is set and another process has not let go of it.
    """
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW * (not wait))
    except OSError:
        return None
    busy = False
    with suppress(OSError):
        if hold(held, patience=PATIENCE * wait):
            return held
        busy = wait
    os.close(held)
    if busy:
        what = f"another process has locked it for {PATIENCE} s"
        raise TimeoutError(errno.ETIMEDOUT, what, str(folder))
    return None


def hold(descriptor: int, *, patience: float = 0) -> bool:
    """Holds an open file against others until it is closed.

    Args:
        patience: seconds to wait for another to let go of it.
    Returns:
        False where another has it.
    Raises:
        OSError: there are no locks on this system or file system.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)


def _sync(folder: Path) -> None:
    """Waits until all below a folder is on the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _sync_entry(Path(root))


def _sync_entry(folder: Path) -> None:
    """Waits until a folder's list of names is on the disk; not every system lets one ask."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
