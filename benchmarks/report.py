"""docs/performance.md and its plots, from benchmarks/results/<machine>/<suite>.json alone.

python3 -m benchmarks.report
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxkern import bench

from .runs import not_here

RESULTS = bench.ROOT / "benchmarks" / "results"
DOC = bench.ROOT / "docs" / "performance.md"
PLOTS = DOC.with_suffix("")  # a folder

Results = dict[str, dict[str, Any]]  # suite -> what its file holds

HEAD = """\
# Performance

Written by `fluxkern bench --report` from `benchmarks/results`: a figure that is not in a file there
cannot stand here. `fluxkern bench`, in a checkout with `make install`, measures this machine and
puts its files there; how long each took stands beside it. `--shape` names others than the default,
on a GPU up to `flux-2048-batch-4`.

Providers of a comparison are called in turn in one process; times are medians over the rounds, IQR
is the interquartile range, and a ratio is the median of the ratios within each round. Nothing is
timed before its result is verified. How that is done: `fluxkern/bench/`, `benchmarks/whole.py`.
"""
WHOLES = """\
Against diffusers' modules with the same weights, which are bf16 numbers in every dtype. The *Amdahl
bound* is the speed of diffusers with everything but its linears and its attention made free, from a
profile of the same run: 100 % of it is what better code around the same products could reach.
*Error* is the relative L2 of what the block or the loop changes, against diffusers in fp32; of a
step, against our reference of every op in fp32, which is *eager* there too.
"""
OPS = """\
*Ceiling*: the larger of the op's unavoidable bytes over the fastest copy of as many bytes, in the
same rounds with emptied caches, and its FLOPs over the rate of torch's product of two matrices of
1024 x 1024 in its dtype (8192 on a GPU). That rate is what torch reaches at this size, no limit of
the machine: above 100 % is possible. Of int8 products no rate is known. *Kernel* is our
kernel without Python, checks and allocation, where it is timed alone. Times are in microseconds.
"""
KIND = """\
From a profile of one step each: what no operator took is Python's. In compiled code products and
attention keep their own share, the fused rest is one.
"""
QUALITY = """\
Each mode of the compact pipeline against fp32, from the same noise. Errors are relative L2: of the
stream after each block of a step, of what the loop has changed after each step. PSNR and SSIM are
of the pictures of a few prompts; a picture's PSNR alone moves with the last bit.
"""
SCALING = """\
A step (or a loop of steps) as one thing grows. Attention should grow with the square of the tokens,
all else in proportion. An exponent is the slope of the logarithms from an eighth of the largest
value on; memory is what torch allocates at the peak beside weights and inputs.
"""
DROP_IN = """\
diffusers' own pipelines after `fluxkern.accelerate`, of which [diffusers.md](diffusers.md) tells:
its loop of the compact model, and root mean square errors of bf16 on tiny random pipelines against
the same in fp32, means over the seeds.
"""
WHOLE_SUITES = ("blocks", "step", "parts", "pipeline")
DISTURBED = "\n† Other programs took a core in some rounds of this comparison.\n"


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def results(folder: Path = RESULTS) -> dict[str, Results]:
    """Machine -> its suites; what was measured with uncommitted changes is not among them.

    The names are those of the files, diffusers/loop among them.
    """
    found: dict[str, Results] = {}
    files = sorted((*folder.glob("*/*.json"), *folder.glob("*/diffusers/*.json")))
    for file in files:
        data, (machine, *name) = read(file), file.relative_to(folder).with_suffix("").parts
        if (data["machine"]["commit"] or "").endswith("-dirty"):
            print(f"left out: {file} is of {data['machine']['commit']}, which nobody can look up")
            continue
        found.setdefault(machine, {})["/".join(name)] = data
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


def peers(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'absent'}" for name, version in found.items())


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
    found = next((data["peers"] for data in suites.values() if "peers" in data), None)
    if found:
        yield f"\nPeers on that machine: {peers(found)}."
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


def whole_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = "whole | dtype | by | >ms | >IQR | >rounds | >x diffusers | >x compiled"
    yield from table(f"{columns} | >of bound | >error", whole_rows(rows))
    if any(map(disturbed, rows)):
        yield DISTURBED


def wholes(suites: Results) -> Iterator[str]:
    yield WHOLES
    rows = (row for suite in WHOLE_SUITES for row in suites.get(suite, {}).get("rows", []))
    yield from whole_table(list(rows))
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


def comparisons(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, dict]]:
    """(op, direction, dtype, shape) -> provider -> row."""
    found: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in rows:
        key = (row["op"], row["direction"], row["dtype"], row["shape"])
        found.setdefault(key, {})[row["provider"]] = row
    return found


def ours(providers: dict[str, dict]) -> list[str]:
    others = ("copy", *bench.BASELINES, *bench.peers.PEERS)
    return [p for p in providers if p not in others and not p.endswith(" kernel")]


def op_rows(rows: list[dict[str, Any]]) -> Iterator[tuple]:
    for (op, direction, dtype, _), by in comparisons(rows).items():
        for name in (*ours(by), *(p for p in by if p in bench.peers.PEERS)):
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
    yield f"Ceilings: {said}."
    columns = "op | direction | dtype | >eager | >compile | by | >time | >x eager | >x compile"
    for shape in dict.fromkeys(row["shape"] for row in data["rows"]):
        yield f"\nShape `{shape}`:\n"
        rows = [row for row in data["rows"] if row["shape"] == shape]
        yield from table(f"{columns} | >of ceiling | >kernel", op_rows(rows))
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


def kinds(data: dict[str, Any]) -> Iterator[str]:
    """Share of a step by kind of work, a column a provider."""
    for step in data.get("kinds", []):
        shares = step["shares"]
        yield f"\n{step['what']}, {step['size']}, {step['dtype']}:\n"
        names = dict.fromkeys(kind for found in shares.values() for kind in found)
        rows = ((name, *(share(found.get(name)) for found in shares.values())) for name in names)
        yield from table("kind | >" + " | >".join(shares), rows)


def counted(data: dict[str, Any]) -> Iterator[str]:
    for found in data.get("counts", []):
        yield (
            f"\nA step of {found['config']} at {found['size']} px has {found['TFLOP']:.4g} TFLOP"
            f" in its products and moves {found['GB']:.4g} GB in bf16,"
            f" {found['least GB']:.4g} at least ({found['why']})."
        )


def drop_in(suites: Results) -> Iterator[str]:
    """diffusers' pipelines with our ops in them."""
    yield DROP_IN
    yield from whole_table(suites.get("diffusers/loop", {}).get("rows", []))
    yield ""
    columns = "pipeline | >models, theirs | >ours | >ratio | >latents, theirs | >ours | >ratio"
    rows = suites.get("diffusers/accuracy", {}).get("rows", [])
    yield from table(columns, map(accuracy_row, rows))


def accuracy_row(row: dict[str, Any]) -> tuple:
    errors = (row[what] for what in ("models", "latents"))
    cells = ((e["original"], e["accelerated"], e["ratio"]) for e in errors)
    return row["pipeline"], *(f"{value:.3g}" for cell in cells for value in cell)


def mode_rows(data: dict[str, Any]) -> Iterator[tuple]:
    times = {row["dtype"]: row for row in data["rows"]}
    for name, found in data["modes"].items():
        blocks, steps = list(found["blocks"].values()), found["steps"]
        row = times.get(name)
        yield (
            name,
            f"{min(blocks):.1e} to {max(blocks):.1e}",
            f"{steps[0]:.1e}",
            f"{steps[-1]:.1e}",
            f"{min(found['psnr']):.1f}",
            f"{statistics.median(found['psnr']):.1f}",
            f"{min(found['ssim']):.4f}",
            f"{row['median'] * 1e3:.0f}{disturbed(row)}" if row else "",
            f"{row['times']['fp32']:.2f}" if row else "",
        )


def quality(data: dict[str, Any]) -> Iterator[str]:
    yield QUALITY
    columns = "mode | >a block | >first step | >last step | >least PSNR, dB | >median PSNR"
    yield from table(f"{columns} | >least SSIM | >ms | >x fp32", mode_rows(data))
    if any(map(disturbed, data["rows"])):
        yield DISTURBED


def scaling_rows(rows: list[dict[str, Any]]) -> Iterator[tuple]:
    for row in rows:
        times = (row["median"], row["iqr"], row["kinds"]["attention"], row["kinds"]["rest"])
        peak = f"{row['peak'] / 1e6:.1f}"
        yield f"{row['what']}{disturbed(row)}", *(f"{s * 1e3:.1f}" for s in times), peak


def scaling(data: dict[str, Any]) -> Iterator[str]:
    yield SCALING
    columns = "against | >time | >attention | >rest | >memory"
    rows = ((axis, *(f"{p:.2f}" for p in of.values())) for axis, of in data["exponents"].items())
    yield from table(columns, rows)
    yield ""
    columns = "what | >ms | >IQR | >attention, ms | >rest, ms | >peak, MB"
    yield from table(columns, scaling_rows(data["rows"]))
    if any(map(disturbed, data["rows"])):
        yield DISTURBED


PLOTTED = {  # plot -> the suites of which one is enough, what it shows
    "wholes": (WHOLE_SUITES, "Speed and share of time by kind, of blocks, step and pipeline"),
    "step": (("step",), "Share of the time of a step by kind of work"),
    "roofline": (("ops",), "Share of the machine's ceiling that each op reaches"),
    "speed-up": (("ops",), "How many times faster than eager and torch.compile"),
    "quality": (("quality",), "Latency of a picture against the error of the loop"),
    "scaling": (("scaling",), "Time and memory as the tokens grow"),
}


def plots_of(name: str, suites: Results) -> dict[str, str]:
    """File name -> what it shows."""
    return {
        f"{name}-{plot}.png": what
        for plot, (of, what) in PLOTTED.items()
        if any(suites.get(suite, {}).get("rows") for suite in of)
    }


def shown(name: str, plot: str, suites: Results) -> Iterator[str]:
    file = f"{name}-{plot}.png"
    found = plots_of(name, suites)
    if file in found:
        yield f"\n![{found[file]}](performance/{file})"


def section(name: str, suites: Results) -> Iterator[str]:
    machine = next(iter(suites.values()))["machine"]
    yield f"## {about(machine)}\n"
    yield f"In `benchmarks/results/{name}`:\n"
    yield from measured(suites)
    if any(suite in suites for suite in WHOLE_SUITES):
        yield "\n### Blocks, step and pipeline\n"
        yield from wholes(suites)
        yield from shown(name, "wholes", suites)
    if "step" in suites:
        yield "\n### Where the time of a step goes\n"
        yield KIND
        yield from kinds(suites["step"])
        yield from counted(suites["step"])
        yield from shown(name, "step", suites)
    if "quality" in suites:
        yield "\n### Quality beside speed\n"
        yield from quality(suites["quality"])
        yield from shown(name, "quality", suites)
    if "scaling" in suites:
        yield "\n### Scaling\n"
        yield from scaling(suites["scaling"])
        yield from shown(name, "scaling", suites)
    if any(name.startswith("diffusers/") for name in suites):
        yield "\n### diffusers, accelerated\n"
        yield from drop_in(suites)
    if "products" in suites:
        yield "\n### Linears, attention, GELU\n"
        yield from products(suites["products"]["rows"])
    if "ops" in suites:
        yield "\n### Ops\n"
        yield from ops(suites["ops"])
        for plot in ("roofline", "speed-up"):
            yield from shown(name, plot, suites)
    for data in suites.values():
        skipped = (f"{what}: {why}" for what, why in data["skipped"].items() if not not_here(why))
        for why in (*data["refused"], *skipped):
            yield f"\nNot timed: {why}"
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
