"""The figures of a check of a GPU in less than a hundred lines."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .jobs import CUT, FAILED, Row

LINES, WIDTH = 100, 160  # of the table, which has fewer
OURS = ("cuda", "cuda-wgmma", "triton")
OTHERS = ("cudnn", "flash3", "flash")
MEMORY_BOUND = ("gated_residual_norm_modulate", "norm_modulate", "qk_norm_rope_")


@dataclass(frozen=True)
class Figure:
    """One promise about an H200, and what was measured here."""

    name: str
    value: float
    bound: float
    most: bool = False  # the bound is an upper one

    def __str__(self) -> str:
        kept = self.value <= self.bound if self.most else self.value >= self.bound
        word = "at most" if self.most else "at least"
        return f"{'yes' if kept else 'NO':3} {self.name}: {self.value:.4g}, {word} {self.bound:g}"


def fastest(rows: list[Row], op: str, way: str, *names: str) -> Row | None:
    """The row of the fastest of these providers."""
    asked = [r for r in rows if (r.get("op"), r.get("direction")) == (op, way) and "median" in r]
    found = [row for row in asked if row["provider"] in names]
    return min(found, key=lambda row: row["median"], default=None)


def figures(rows: list[Row]) -> Iterator[Figure]:
    """What was promised; of what was not measured nothing."""
    for op in MEMORY_BOUND:
        if ours := fastest(rows, op, "forward", *OURS):
            yield Figure(f"{op}, share of the copy", ours["share"], 0.9)
        ran = [r for r in rows if (r.get("op"), r.get("direction")) == (op, "forward")]
        times = [r["times"] for r in ran if r.get("provider") in OURS and "times" in r]
        gains = [found["compile"] for found in times if "compile" in found]
        if gains:
            yield Figure(f"{op}, times Inductor's", max(gains), 1.1)
        if ours := fastest(rows, op, "backward", *OURS):
            yield Figure(f"{op} backward, share of the copy", ours["share"], 0.8)
    yield from attention_figures(rows)
    ms = {row["what"]: row["ms"] for row in rows if "ms" in row}
    if step := ms.get("step in the loop, modulation ahead, sustained"):
        yield Figure("57-block step, ms", step, 118, most=True)
    for row in rows:
        if (row.get("what"), row.get("provider")) == ("step", "fluxkern"):
            for baseline, gain in row["times"].items():
                yield Figure(f"57-block step, times {baseline}", gain, 1.05)


def attention_figures(rows: list[Row]) -> Iterator[Figure]:
    ours = fastest(rows, "attention", "forward", *OURS)
    best = fastest(rows, "attention", "forward", "cudnn", "flash3")
    if ours and best:
        ratio = best["median"] / ours["median"]
        yield Figure(f"own attention over {best['provider']}", ratio, 0.7)
    best = fastest(rows, "attention", "forward", *OTHERS, *OURS)
    whole = fastest(rows, "rope_attention", "forward", *OTHERS, *OURS)
    if best and whole:
        name = f"norm + RoPE + attention ({whole['provider']}) over {best['provider']} alone"
        yield Figure(name, best["median"] / whole["median"], 0.92)


def failures(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row.get("status") in (FAILED, CUT):
            what = (row[n] for n in ("op", "direction", "provider", "what", "test") if row.get(n))
            why = row.get("why") or (row.get("said") or [""])[-1]
            yield f"{row['status'].upper():7} {row['job']}: {' '.join(what)}: {why}"


def op_lines(rows: list[Row]) -> Iterator[str]:
    """A line an op and direction: each provider's microseconds and its share of the copy."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "op" in row and "median" in row:
            found.setdefault((row["op"], row["direction"]), {})[row["provider"]] = row
    for (op, direction), by in found.items():
        cells = []
        for name, row in sorted(by.items(), key=lambda item: item[1]["median"]):
            share = "" if row["share"] is None or name == "copy" else f" {row['share']:.0%}"
            cells.append(f"{name} {row['median'] * 1e6:.1f}{share}")
        yield f"{op}{' backward' * (direction == 'backward')}, us: {', '.join(cells)}"


def whole_lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "ms" in row:
            state = f"; {row['state']}" if row.get("state") else ""
            spread = f"{row['least']:.4g} to {row['most']:.4g} of {row['samples']}"
            yield f"{row['what']}: {row['ms']:.4g} ms ({spread}){state}"
        elif "comparison" in row and "op" not in row:
            times = ", ".join(f"{x:.2f} x {name}" for name, x in row["times"].items())
            about = f"{row['what']}, {row['provider']}: {row['median'] * 1e3:.4g} ms"
            yield f"{about}, relative L2 {row['error']:.1g}; {times}"
        elif "error" in row and "limit" in row:
            yield "{what}: {error:.2g}, eager {eager:.2g}".format_map(row)
        elif "judge" in row:
            yield f"{row['what']}: {row['judge']}, {row['levels_from_reference']} levels off"


def table(data: dict[str, Any]) -> str:
    machine, rows = data["machine"], data["rows"]
    lines = [f"{'DRY RUN, NO GPU: ' * data['dry_run']}{data['measured_on']}, "]
    lines[0] += f"torch {machine['versions']['torch']}, commit {machine['commit']}, "
    lines[0] += f"source {machine['source']}"
    lines.append(", ".join(f"{part} {status}" for part, status in data["parts"].items()))
    if not data["dry_run"]:
        lines += map(str, figures(rows))
    for part in (whole_lines, op_lines, failures):
        lines += part(rows)
    if len(lines) >= LINES:
        left = len(lines) - LINES + 2
        lines[LINES - 2 :] = [f"and {left} lines more: summary.json has all rows"]
    return "\n".join(line[:WIDTH] for line in lines)
