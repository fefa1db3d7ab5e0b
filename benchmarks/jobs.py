"""Processes that measure: run side by side or in turn, watched, and never left behind.

What a job hands over (benchmarks/rows.py) arrives here line by line. A job of several items that
crashes or hangs loses the item that it was at, and the others run in a new process.
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from fluxkern.bench import ROOT

from .rows import VARIABLE

PASSED, FAILED, SKIPPED, CUT = "passed", "failed", "skipped", "cut off"
GUARD = [sys.executable, "-I", "-S", str(ROOT / "benchmarks/guard.py")]
LOG = 8 * 2**20  # bytes of the log, at most
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One process, or one after the other.

    Args:
        name: of its rows.
        command: what is run; the items that are to be measured are added to it.
        items: in their order; none where the command is one piece of work.
        limit: seconds of an item, after which it is taken to hang.
        environment: added to that of this process.
    """

    name: str
    command: tuple[str, ...]
    items: tuple[str, ...] = ()
    limit: float = 1e9
    environment: dict[str, str] = field(default_factory=dict)


class Running:
    """A started job: its pipes, what it said and where it is."""

    def __init__(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        self.tail: deque[str] = deque(maxlen=12)
        self.counts: Counter[str] = Counter()  # outcomes of tests
        self.skipped: str | None = None
        self.failures = 0
        self.item, self.since = None, self.started
        self.rest: tuple[str, ...] = ()  # the items after this one
        self.partial: dict[int, bytes] = {}
        self.rows_pipe, theirs = os.pipe()
        self.process = subprocess.Popen(
            [*GUARD, str(os.getpid()), *job.command, *job.items],
            cwd=ROOT,
            env=os.environ | job.environment | {VARIABLE: str(theirs)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
        )
        os.close(theirs)
        self.open = {self.rows_pipe, self.process.stdout.fileno()}

    def lines(self, pipe: int, data: bytes) -> list[str]:
        """Whole lines; the rest waits for more."""
        *whole, self.partial[pipe] = (self.partial.get(pipe, b"") + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def at(self, item: str) -> None:
        self.item, self.since = item, time.monotonic()
        if item in self.job.items:
            self.rest = self.job.items[self.job.items.index(item) + 1 :]

    def stop(self) -> None:
        self.process.terminate()

    def close(self) -> int:
        status = self.process.wait()
        os.close(self.rows_pipe)
        self.process.stdout.close()
        return status


class Jobs:
    """Runs jobs until a moment and hands every row to `save`."""

    def __init__(self, save: Callable[[Row], None], log: BinaryIO) -> None:
        self.save, self.log = save, log
        self.selector = selectors.DefaultSelector()
        self.running: list[Running] = []

    def run(self, part: str, jobs: Iterable[Job], until: float, side_by_side: int = 1) -> None:
        waiting = deque(jobs)
        try:
            while (waiting or self.running) and time.monotonic() < until:
                while waiting and len(self.running) < side_by_side:
                    self.start(waiting.popleft())
                self.listen(part, min(0.2, max(until - time.monotonic(), 0)))
                for one in list(self.running):
                    if again := self.look_after(part, one):
                        waiting.appendleft(again)
        finally:
            for one in self.running:
                one.stop()
            for one in list(self.running):
                self.end(part, one, CUT, "its time was up")
        for job in waiting:
            self.save({"part": part, "job": job.name, "status": CUT, "why": "no time was left"})

    def start(self, job: Job) -> None:
        self.say(f"\n$ {' '.join((*job.command, *job.items))}\n".encode())
        one = Running(job)
        self.running.append(one)
        for pipe in one.open:
            os.set_blocking(pipe, False)
            self.selector.register(pipe, selectors.EVENT_READ, one)

    def say(self, data: bytes) -> None:
        if self.log.tell() < LOG:
            self.log.write(data)
            self.log.flush()

    def listen(self, part: str, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            self.read(part, key.data, key.fd)

    def read(self, part: str, one: Running, pipe: int) -> None:
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.selector.unregister(pipe)
            one.open.discard(pipe)
        elif pipe == one.rows_pipe:
            for line in one.lines(pipe, data):
                self.take(part, one, json.loads(line))
        else:
            self.say(data)
            one.tail.extend(one.lines(pipe, data))

    def take(self, part: str, one: Running, row: Row) -> None:
        if "begin" in row:
            one.at(row["begin"])
        elif "skip" in row:
            one.skipped = row["skip"]
        elif "count" in row:
            one.counts[row["count"]] += 1
        else:
            one.failures += row.get("status") == FAILED
            self.save({"part": part, "job": one.job.name, "item": one.item} | row)

    def look_after(self, part: str, one: Running) -> Job | None:
        """Ends a job that has ended or hangs; what is left of it, if it has to go on."""
        hangs = time.monotonic() - one.since > one.job.limit
        if hangs:
            one.stop()
        elif one.process.poll() is None:
            return None
        status = one.process.wait()
        if hangs:
            why = f"stopped after {one.job.limit:.0f} s"
        else:
            why = f"exit status {status}" + f", signal {status - 128}" * (status > 128)
        good = status == 0 and not hangs
        ended = PASSED if good and not one.failures else FAILED
        self.end(part, one, SKIPPED if good and one.skipped else ended, why)
        return replace(one.job, items=one.rest) if one.rest and not good else None

    def end(self, part: str, one: Running, status: str, why: str) -> None:
        one.process.wait()
        for pipe in list(one.open):  # what it said before
            while pipe in one.open and select_now(pipe):
                self.read(part, one, pipe)
            if pipe in one.open:
                self.selector.unregister(pipe)
        one.close()
        self.running.remove(one)
        row = {"part": part, "job": one.job.name, "status": status}
        row |= {"seconds": round(time.monotonic() - one.started, 1), **one.counts}
        if status == SKIPPED:
            row["why"] = one.skipped
        elif status != PASSED:
            row |= {"why": why, "item": one.item, "said": list(one.tail)}
        self.save(row)


def select_now(pipe: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(0))
