"""Runs a command that leaves no process behind, however it or who started it ends.

    python3 -I -S benchmarks/guard.py PARENT COMMAND ...

The kernel sends SIGTERM here when the parent is gone and hands over what lost its own parent, so
that all descendants are found, also those in sessions of their own. Linux alone.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def children() -> dict[int, list[int]]:
    """Parent -> its children, of all processes."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:  # it has just ended
                continue
            found.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    return found


def descendants() -> list[int]:
    tree, found, waiting = children(), [], [os.getpid()]
    while waiting:
        below = tree.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def end_all(patience: float = 10) -> None:
    """Until none is left: one that is being started may be missed by the first look."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        reap()
        left = descendants()
        if not left:
            return
        for pid in left:
            kill(pid)
        time.sleep(0.01)


def main(parent: int, command: list[str]) -> int:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        if os.getppid() != parent:  # it went before it was to be heard of
            return 128 + signal.SIGTERM
        return subprocess.Popen(command, close_fds=False).wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        end_all()


if __name__ == "__main__":
    status = main(int(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
