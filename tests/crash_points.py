"""Kills saves: before each system call that writes, and at random times.

    python tests/crash_points.py [SCENARIO ...] [--points N] [--kills N] [--seed N]

After each kill the place holds the old save or the new one, whole, and what was not ours; after the
next save it holds that one and nothing is left over. Prints the counts; exits with 1 where one that
should be 0 is not. System calls are counted by ptrace, of one thread, on x86-64 Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from checkpoint_files import TINY_AUTOENCODER, TINY_FLUX
from safetensors.torch import load_file

from fluxkern import checkpoint
from fluxkern.cli import main as fluxkern
from fluxkern.compact.optimise import save_tensors
from fluxkern.model.autoencoder import AutoEncoder
from fluxkern.model.transformer import Flux

CAN_COUNT = sys.platform == "linux" and platform.machine() == "x86_64"
TRACEME, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
EXITKILL_SYSGOOD = 0x100001
ENTRY = 1
O_CREAT = 0o100
WRITES = {
    "write": 1, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "mkdirat": 258,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268,
    "utimensat": 280, "fallocate": 285, "pwritev": 296, "renameat2": 316, "copy_file_range": 326,
}  # fmt: skip
OPENS = {2: 1, 257: 2}  # open, openat: which argument holds the flags
FOREIGN = "notes.txt"


@dataclass(frozen=True)
class Scenario:
    """A save to a path: the old one's and the next one's values, and what reads one back."""

    save: Callable[[Path, int], None]
    read: Callable[[Path], object]
    name: str = "saved"


def filled(kind: type, config: object, value: int) -> torch.nn.Module:
    model = kind(config)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def values(model: torch.nn.Module) -> tuple[float, ...]:
    found = {float(x) for p in model.parameters() for x in p.aminmax()}
    return tuple(sorted(found))


def save_flux(path: Path, value: int, *, sizes: tuple[str, ...] = ("200KB",)) -> None:
    size = sizes[value % len(sizes)]
    checkpoint.save_flux(filled(Flux, TINY_FLUX, value), path, max_shard_size=size)


def save_bfl(path: Path, value: int) -> None:
    checkpoint.save_flux(filled(Flux, TINY_FLUX, value), path, format="bfl")


def save_autoencoder(path: Path, value: int) -> None:
    model = filled(AutoEncoder, TINY_AUTOENCODER, value)
    checkpoint.save_autoencoder(model, path, max_shard_size="500KB")


def save_state(path: Path, value: int) -> None:
    save_tensors(
        path, {"a": torch.full((300,), value), "b": torch.full((3,), value)}, {"step": "1"}
    )


def read_state(path: Path) -> tuple[float, ...]:
    return tuple(sorted({float(x) for t in load_file(path).values() for x in t}))


def convert(path: Path, value: int) -> None:
    name = "compact-schnell" if value == 2 else "compact-base"
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        code = fluxkern(["convert", name, str(path), "--to", "diffusers", "--force"])
    if code:
        raise OSError(f"convert ended with {code}")


def read_model(path: Path) -> tuple[float, ...]:
    return values(checkpoint.load_flux(path))


SCENARIOS = {
    "shards": Scenario(save_flux, read_model),
    "shards-and-one": Scenario(partial(save_flux, sizes=("1GB", "200KB")), read_model),
    "bfl": Scenario(save_bfl, read_model, "saved.safetensors"),
    "autoencoder": Scenario(save_autoencoder, lambda p: values(checkpoint.load_autoencoder(p))),
    "state": Scenario(save_state, read_state, "state.safetensors"),
    "convert": Scenario(convert, checkpoint.weights_hash),
}


# killing


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def killed_at(point: int, work: Callable[[], None]) -> bool:
    """Does work in a child that dies before its point-th writing call; False: it ended before."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

    def traced() -> None:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    child = in_child(traced)
    os.waitpid(child, 0)
    libc.ptrace(SETOPTIONS, child, None, EXITKILL_SYSGOOD)
    passed = 0
    while True:
        libc.ptrace(SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            if status:
                raise OSError(f"a save ended with status {status}")
            return False
        passed += is_write(libc, child)
        if passed == point:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True


def is_write(libc: ctypes.CDLL, child: int) -> bool:
    info = ctypes.create_string_buffer(88)
    libc.ptrace(GET_SYSCALL_INFO, child, len(info), ctypes.addressof(info))
    number, *arguments = struct.unpack_from("7Q", info, 24)
    if info[0] != bytes([ENTRY]):
        return False
    flags = OPENS.get(number)
    return number in WRITES.values() or (flags is not None and bool(arguments[flags] & O_CREAT))


def killed_after(seconds: float, work: Callable[[], None]) -> bool:
    child = in_child(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


# judging


class Judge:
    """Kills one scenario's saves again and again, and counts what is wrong then."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self.folder = scenario, folder
        self.path = folder / "place" / scenario.name
        self.wanted = {}
        for value in (1, 2, 3):
            self.fresh()
            scenario.save(self.path, value)
            self.wanted[value] = scenario.read(self.path)
        self.counts: Counter[str] = Counter()

    def fresh(self) -> None:
        """The old save alone, where there is one, and a file that is not ours."""
        shutil.rmtree(self.path.parent, ignore_errors=True)
        old = self.folder / "old"
        if old.exists():
            shutil.copytree(old, self.path.parent)
        else:
            self.path.parent.mkdir()

    def keep_old(self) -> None:
        self.fresh()
        self.scenario.save(self.path, 1)
        (self.place / FOREIGN).write_text("mine")
        shutil.copytree(self.path.parent, self.folder / "old")

    @property
    def place(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def __call__(self, kill: Callable[[Callable[[], None]], bool]) -> bool:
        """False where the save ended before it was killed."""
        self.fresh()
        killed = kill(lambda: self.scenario.save(self.path, 2))
        self.counts["kills" if killed else "whole"] += 1
        self.look({1, 2} if killed else {2})
        self.scenario.save(self.path, 3)
        self.look({3})
        left = [p for p in self.path.parent.rglob(".*")]
        self.counts["left over"] += bool(left)
        return killed

    def look(self, allowed: set[int]) -> None:
        if not self.path.exists():
            self.counts["gone"] += 1
            return
        self.counts["not ours lost"] += not (self.place / FOREIGN).exists()
        try:
            found = self.scenario.read(self.path)
        except Exception:
            self.counts["unloadable"] += 1
            return
        self.counts["mixed"] += found not in [self.wanted[value] for value in allowed]


def run(
    names: list[str], points: int | None, kills: int, seed: int, folder: Path
) -> dict[str, Counter]:
    """Every point of each scenario, or `points` of them drawn; then kills at random times."""
    rng, found = random.Random(seed), {}
    for name in names:
        below = folder / name
        below.mkdir()
        judge = Judge(SCENARIOS[name], below)
        judge.keep_old()
        if CAN_COUNT:
            last = count_points(judge)
            judge.counts["points"] = last
            chosen = range(1, last + 1)
            for point in chosen if points is None else rng.sample(chosen, min(points, last)):
                judge(partial(killed_at, point))
        judge.fresh()
        begin = time.monotonic()
        os.waitpid(in_child(lambda j=judge: j.scenario.save(j.path, 2)), 0)
        seconds = time.monotonic() - begin
        for _ in range(kills):
            judge(partial(killed_after, rng.uniform(0, seconds)))
        found[name] = judge.counts
    return found


def count_points(judge: Judge) -> int:
    low, high = 1, 2
    while died(judge, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if died(judge, middle) else (low, middle)
    return low


def died(judge: Judge, point: int) -> bool:
    judge.fresh()
    return killed_at(point, lambda: judge.scenario.save(judge.path, 2))


FAULTS = ("mixed", "unloadable", "gone", "left over", "not ours lost")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="*", choices=[[], *SCENARIOS], help="all")
    parser.add_argument("--points", type=int, help="of each scenario; all")
    parser.add_argument("--kills", type=int, default=10, help="at random times, of each; 10")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="drawn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"seed: {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        names = args.scenario or list(SCENARIOS)
        found = run(names, args.points, args.kills, args.seed, Path(folder))
    total = sum(found.values(), Counter())
    for name, counts in (*found.items(), ("all", total)):
        shown = {key: counts[key] for key in ("points", "kills", "whole", *FAULTS)}
        print(name, json.dumps(shown), flush=True)
    return int(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
