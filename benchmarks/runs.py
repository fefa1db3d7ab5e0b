"""What the suites share: their options, and the report that grows while they run."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxkern import bench


def options(name: str, about: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python3 -m benchmarks.{name}", description=about)
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="0 verifies and times nothing")
    add("--threads", type=int, help="of torch; as many as there are cores")
    add("--json", type=Path, metavar="FILE")
    return parser


class Report:
    """Rows as they are measured, on the terminal and in the file, and what was refused."""

    def __init__(self, suite: str, args: argparse.Namespace, **about: Any) -> None:
        bench.pin_threads(args.threads)
        bench.limit_isa()
        pages = bench.keep_pages()
        self.file, self.started = args.json, time.monotonic()
        self.data: dict[str, Any] = {
            "suite": suite,
            "machine": bench.machine() | {"freed_pages_kept": pages},
            "seconds": 0,
            **about,
            **{"rows": [], "verified": [], "refused": [], "skipped": {}},
        }

    def add(
        self, name: str, measure: Callable[[], bench.Comparison], table: Callable[[list], str]
    ) -> None:
        try:
            found = measure()
        except bench.WrongResult as refusal:
            self.data["refused"].append(f"{name}: {refusal}")
            print(f"REFUSED {name}: {refusal}", flush=True)
        else:
            self.data["rows"] += [row.as_dict() for row in found.rows]
            self.data["verified"].append(f"{name}: {', '.join(found.verified)}")
            self.data["skipped"] |= found.skipped
            print(table(found.rows) or f"right: {self.data['verified'][-1]}", flush=True)
        self.save()

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
