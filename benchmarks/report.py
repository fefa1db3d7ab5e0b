"""docs/performance.md and its plots, from benchmarks/results/<machine>/<suite>.json alone.

python3 -m benchmarks.report
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxkern import bench

RESULTS = bench.ROOT / "benchmarks" / "results"
DOC = bench.ROOT / "docs" / "performance.md"
PLOTS = DOC.with_suffix("")  # a folder

Results = dict[str, dict[str, Any]]  # suite -> what its file holds

HEAD = """\
# Performance

Written by `fluxkern bench --report` from `benchmarks/results`: a figure that is not in a file there
cannot stand here. `fluxkern bench`, in a checkout with `make install`, measures this machine and
puts its files there; how long each took stands beside it.

Providers of a comparison are called in turn in one process; times are medians over the rounds, IQR
is the interquartile range, and a ratio is the median of the ratios within each round. Nothing is
timed before its result is verified. How that is done: `fluxkern/bench/`, `benchmarks/whole.py`.
"""
WHOLES = """\
Against diffusers' modules with the same weights, which are bf16 numbers in every dtype. The *Amdahl
bound* is the speed of diffusers with everything but its linears and its attention made free, from a
profile of the same run: 100 % of it is what better code around the same products could reach.
*Error* is the relative L2 of what the block or the loop changes, against diffusers in fp32.
"""
OPS = """\
*Ceiling*: the larger of the op's unavoidable bytes over the fastest copy of as many bytes, in the
same rounds with emptied caches, and its FLOPs over the rate of a square product. *Kernel* is our
kernel without Python, checks and allocation, where it is timed alone. Times are in microseconds.
"""
DISTURBED = "\n† Other programs took a core in some rounds of this comparison.\n"


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def results(folder: Path = RESULTS) -> dict[str, Results]:
    """Machine -> its suites."""
    found: dict[str, Results] = {}
    for file in sorted(folder.glob("*/*.json")):
        found.setdefault(file.parent.name, {})[file.stem] = read(file)
    return found


def table(columns: str, rows: Iterator[tuple]) -> Iterator[str]:
    """Markdown; a column that begins with > is of numbers."""
    names = columns.split(" | ")
    yield "| " + " | ".join(name.removeprefix(">") for name in names) + " |"
    yield "|" + "|".join("--:" if name.startswith(">") else "---" for name in names) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def times(row: dict[str, Any], baseline: str) -> str:
    return f"{row['times'][baseline]:.2f}" if baseline in row["times"] else ""


def disturbed(row: dict[str, Any]) -> str:
    return " †" if "DISTURBED" in row["timer"] else ""


def about(machine: dict[str, Any]) -> str:
    """In words: the processor, its instruction sets and threads."""
    if machine["gpu"]:
        return f"{machine['gpu']['name']}, driver {machine['gpu']['driver']}"
    isa = machine["cpu_capability"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {isa['torch']} (ours {isa['fluxkern']})"
    )


def file_row(item: tuple[str, dict[str, Any]]) -> tuple:
    suite, data = item
    machine, versions = data["machine"], data["machine"]["versions"]
    return (
        f"`{suite}.json`",
        machine["time"][:10],
        f"`{machine['commit']}`",
        str(data["seconds"]),
        f"{machine['load']:.1f}",
        versions["torch"],
        versions["diffusers"] or "",
    )


def measured(suites: Results) -> Iterator[str]:
    columns = "file | measured | commit | >took, s | >load before | torch | diffusers"
    yield from table(columns, map(file_row, suites.items()))
    limits = next(iter(suites.values()))["machine"]["limits"]
    if limits:
        said = " ".join(f"{name}={value}" for name, value in limits.items())
        yield f"\nLimited as an older processor by `{said}`; our kernels follow the first."


def whole_rows(rows: list[dict[str, Any]]) -> Iterator[tuple]:
    for row in rows:
        yield (
            f"{row['what']}, {row['size']}{disturbed(row)}",
            row["dtype"],
            row["provider"],
            f"{row['median'] * 1e3:.0f}",
            f"{row['iqr'] * 1e3:.0f}",
            str(row["rounds"]),
            times(row, "diffusers"),
            times(row, "diffusers compiled"),
            share(row["of_bound"]),
            f"{row['error']:.0e}" if row["error"] else "",
        )


def wholes(suites: Results) -> Iterator[str]:
    rows = [
        row for suite in ("blocks", "pipeline") for row in suites.get(suite, {}).get("rows", [])
    ]
    columns = "whole | dtype | by | >ms | >IQR | >rounds | >x diffusers | >x compiled"
    yield WHOLES
    yield from table(f"{columns} | >of bound | >error", whole_rows(rows))
    if any(map(disturbed, rows)):
        yield DISTURBED
    levels = suites.get("pipeline", {}).get("levels")
    if levels:
        yield (
            f"\nThe picture from the same noise differs from diffusers' by {levels['largest']:.0f}"
            f" of 255 levels at most, in {levels['differing']:.4%} of its values."
        )
    memory = suites.get("blocks", {}).get("memory")
    if memory:
        yield "\nPeak memory of weights, inputs and one call, in a process of its own:\n"
        columns = "block | dtype | by | >weights, MB | >peak, MB | >ratio"
        yield from table(columns, map(memory_row, memory))


def memory_row(found: dict[str, Any]) -> tuple:
    about = (found["what"], found["dtype"], found["provider"])
    sizes = (f"{found[name] / 1e6:.0f}" for name in ("weights", "peak"))
    return *about, *sizes, f"{found['ratio']:.2f}"


def comparisons(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, dict]]:
    """(op, direction, dtype) -> provider -> row."""
    found: dict[tuple[str, str, str], dict[str, dict]] = {}
    for row in rows:
        key = (row["op"], row["direction"], row["dtype"])
        found.setdefault(key, {})[row["provider"]] = row
    return found


def ours(providers: dict[str, dict]) -> list[str]:
    return [p for p in providers if p not in ("copy", *bench.BASELINES) and "kernel" not in p]


def op_rows(rows: list[dict[str, Any]]) -> Iterator[tuple]:
    for (op, direction, dtype), by in comparisons(rows).items():
        for name in ours(by):
            row = by[name]
            yield (
                f"`{op}`{disturbed(row)}",
                direction,
                dtype,
                *(f"{by[b]['median'] * 1e6:.0f}" if b in by else "" for b in bench.BASELINES),
                name,
                f"{row['median'] * 1e6:.0f}",
                *(times(row, baseline) for baseline in bench.BASELINES),
                share(row["share"]),
                share(by[f"{name} kernel"]["share"]) if f"{name} kernel" in by else "",
            )


def ops(data: dict[str, Any]) -> Iterator[str]:
    yield OPS
    said = ", ".join(f"{name} {rate:.4g}" for name, rate in data["ceilings"].items())
    yield f"Shape `{data['shape']}`. Ceilings: {said}.\n"
    columns = "op | direction | dtype | >eager | >compile | by | >time | >x eager | >x compile"
    yield from table(f"{columns} | >of ceiling | >kernel", op_rows(data["rows"]))
    if any(map(disturbed, data["rows"])):
        yield DISTURBED


def product_rows(rows: list[dict[str, Any]]) -> Iterator[tuple]:
    for row in rows:
        faster = ", ".join(f"{ratio:.2f} {name}" for name, ratio in row["times"].items())
        yield (
            f"{row['what']}{disturbed(row)}",
            row["dtype"],
            row["provider"],
            f"{row['median'] * 1e3:.1f}",
            f"{row['iqr'] * 1e3:.1f}",
            str(row["rounds"]),
            faster if row["provider"] == "fluxkern" else "",
            f"{row['error']:.0e}",
        )


def products(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = "what | dtype | by | >ms | >IQR | >rounds | x | >error, rel. L2"
    yield from table(columns, product_rows(rows))
    if any(map(disturbed, rows)):
        yield DISTURBED


def plots_of(name: str, suites: Results) -> dict[str, str]:
    """File name -> what it shows."""
    found = {}
    if "blocks" in suites or "pipeline" in suites:
        found[f"{name}-wholes.png"] = "Speed and share of time by kind, of blocks and pipeline"
    if "ops" in suites:
        found[f"{name}-roofline.png"] = "Share of the machine's ceiling that each op reaches"
        found[f"{name}-speed-up.png"] = "How many times faster than eager and torch.compile"
    return found


def section(name: str, suites: Results) -> Iterator[str]:
    machine = next(iter(suites.values()))["machine"]
    yield f"## {about(machine)}\n"
    yield f"In `benchmarks/results/{name}`:\n"
    yield from measured(suites)
    shown = [f"\n![{what}](performance/{file})" for file, what in plots_of(name, suites).items()]
    if "blocks" in suites or "pipeline" in suites:
        yield "\n### Blocks and pipeline\n"
        yield from wholes(suites)
        yield shown.pop(0)
    if "products" in suites:
        yield "\n### Linears, attention, GELU\n"
        yield from products(suites["products"]["rows"])
    if "ops" in suites:
        yield "\n### Ops\n"
        yield from ops(suites["ops"])
        yield from shown
    for refused in (why for data in suites.values() for why in data["refused"]):
        yield f"\nNot timed: {refused}"
    yield ""


def text(found: dict[str, Results]) -> str:
    lines = [HEAD]
    for name, suites in found.items():
        lines += section(name, suites)
    return "\n".join(lines)


def write() -> None:
    from .plots import draw

    found = results()
    for old in PLOTS.glob("*.png"):
        old.unlink()
    for name, suites in found.items():
        draw(name, suites, PLOTS)
    DOC.write_text(text(found), encoding="utf-8")
    print(DOC)


if __name__ == "__main__":
    write()
