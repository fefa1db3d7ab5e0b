"""Rows as JSON and on the terminal."""

import json
from pathlib import Path
from typing import Any

from .._files import write_files
from .calls import CallCost
from .compare import Row
from .timers import spread


def diffable(value: Any, indent: str = "") -> str:
    """JSON in which an element of a list is a line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(name)}: {diffable(v, inner)}" for name, v in value.items()]
    elif isinstance(value, list) and value:
        lines = [json.dumps(v) for v in value]
    else:
        return json.dumps(value)
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    return f"{opened}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closed}"


def write_json(path: Path, data: object) -> None:
    """The file is the old or the new one, never a part."""

    def write(file: Path) -> None:
        file.write_text(diffable(data) + "\n", encoding="utf-8")

    write_files(path.parent, {path.name: write})


def table(rows: list[Row]) -> str:
    """One line a row, a heading for each comparison; times are medians in microseconds."""
    lines, heading = [], None
    columns = f"{'us':>11} {'IQR':>9} {'GB/s':>8} {'share':>6} {'x eager':>8} {'x compile':>9}"
    for row in rows:
        about = (row.op, row.direction, row.dtype, row.shape, row.device)
        if about != heading:
            lines += ["", ", ".join(about) + f"; {row.timer}", f"  {'':12} {columns}  max error"]
            heading = about
        gains = " ".join(
            f"{row.times[b]:{width}.2f}" if b in row.times else " " * width
            for b, width in (("eager", 8), ("compile", 9))
        )
        share = "" if row.share is None else f"{row.share:.0%}"
        error = "" if row.max_error is None else f"{row.max_error:.2g}"
        lines.append(
            f"  {row.provider:12} {row.median * 1e6:11.1f} {spread(row.seconds) * 1e6:9.1f}"
            f" {row.bytes / row.median / 1e9:8.1f} {share:>6} {gains}  {error}"
        )
    return "\n".join(lines[1:])


def cost_table(costs: list[CallCost]) -> str:
    lines = [f"{'op':36} {'backend':10} {'route':16} {'us a call':>10} {'IQR':>7}"]
    for c in costs:
        lines.append(f"{c.op:36} {c.backend:10} {c.route:16} {c.microseconds:10.1f} {c.iqr:7.1f}")
    return "\n".join(lines)
