"""What the suites share: their options, and the report that grows while they run."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fluxkern import bench

from . import rows

NOT_HERE = ("no CUDA device", "is missing")  # reasons of the machine and the build, not of a row


def options(name: str, about: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python3 -m benchmarks.{name}", description=about)
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="0 verifies and times nothing")
    add("--threads", type=int, help="of torch; as many as there are cores")
    add("--json", type=Path, metavar="FILE")
    return parser


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_shape() -> str:
    return "flux-1024" if torch.cuda.is_available() else "flux-512"


def not_here(why: str) -> bool:
    return any(said in why for said in NOT_HERE)


class Report:
    """Rows as they are measured, on the terminal and in the file, and what was refused.

    Args:
        suite: its name.
        args: what `options` parsed.
        planned: how many comparisons will be added.
        about: what the file holds besides.
    """

    def __init__(
        self, suite: str, args: argparse.Namespace, planned: int = 1, **about: Any
    ) -> None:
        bench.pin_threads(args.threads)
        bench.limit_isa()
        pages = bench.keep_pages()
        self.file, self.started = args.json, time.monotonic()
        self.data: dict[str, Any] = {
            "suite": suite,
            "machine": bench.machine() | {"freed_pages_kept": pages},
            "peers": bench.peers.installed(),
            "seconds": 0,
            "planned": planned,
            **about,
            **{"rows": [], "verified": [], "refused": [], "skipped": {}},
        }
        self.save()

    def add(
        self, name: str, measure: Callable[[], bench.Comparison], table: Callable[[list], str]
    ) -> None:
        try:
            found = measure()
        except Exception as failure:  # of all of it: the rest of the suite goes on
            said = self.refuse(f"{name}: {rows.failed(failure)}")
        else:
            for row in found.rows:
                self.data["rows"].append(row.as_dict())
                rows.emit(comparison=name, **row.as_dict())
            self.data["verified"].append(f"{name}: {', '.join(found.verified)}")
            self.data["skipped"] |= {
                provider if not_here(why) else f"{name} by {provider}": why
                for provider, why in found.skipped.items()
            }
            said = table(found.rows) or f"right: {self.data['verified'][-1]}"
            for peer, why in found.failed.items():
                said += "\n" + self.refuse(f"{name} by {peer}: {why}")
        self.save()
        print(said, flush=True)

    def refuse(self, why: str) -> str:
        self.data["refused"].append(why)
        rows.emit(status="failed", why=why)
        return f"REFUSED {why}"

    def save(self) -> None:
        """What was measured is there when a run is cut off."""
        self.data["seconds"] = round(time.monotonic() - self.started)
        if self.file:
            bench.write_json(self.file, self.data)

    def close(self) -> int:
        """The exit status."""
        self.save()
        for provider, reason in self.data["skipped"].items():
            print(f"without {provider}: {reason}")
        return 1 if self.data["refused"] else 0
