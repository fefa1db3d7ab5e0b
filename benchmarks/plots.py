"""The plots of one machine's results: wholes, roofline, speed-up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fluxkern import bench

from . import report
from .report import Results

EAGER, COMPILED, OURS, KERNEL = "#9aa5b1", "#e0a030", "#1f6fb4", "#8fc1e3"
COLOURS = {"diffusers": EAGER, "diffusers compiled": COMPILED, "fluxkern": OURS}
COLOURS |= {"fluxkern int8": KERNEL, "eager": "#6b7785", "diffusers torchao int8": "#c98bb9"}
KINDS = {"linears": "#1f6fb4", "attention": "#e0a030", "rest": "#c8ccd1"}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
}


def footer(data: dict[str, Any]) -> str:
    machine = data["machine"]
    return f"{report.about(machine)} · torch {machine['versions']['torch']} · {machine['commit']}"


def save(figure: Figure, title: str, data: dict[str, Any], file: Path) -> None:
    figure.suptitle(title, fontsize=12, fontweight="bold")
    figure.get_layout_engine().set(rect=(0, bottom := 0.2 / figure.get_figheight(), 1, 1 - bottom))
    figure.text(0.995, bottom / 4, footer(data), ha="right", va="bottom", fontsize=7, color="#667")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def labelled(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


# wholes


def groups(suites: Results) -> dict[str, list[dict[str, Any]]]:
    """Label -> the rows of one comparison that diffusers is part of."""
    found: dict[str, list[dict[str, Any]]] = {}
    for suite in report.WHOLE_SUITES:
        for row in suites.get(suite, {}).get("rows", []):
            label = f"{row['what']}, {row['size'].partition(' tokens')[0]}\n{row['dtype']}"
            if "diffusers" in row["times"]:
                found.setdefault(label, []).append(row)
    return found


def speeds(axes: Axes, found: dict[str, list[dict[str, Any]]]) -> None:
    """Bars from diffusers' speed on, and the bound as a line across them."""
    for i, rows in enumerate(found.values()):
        others = [row for row in rows if row["provider"] != "diffusers"]
        height = 0.8 / len(others)
        for j, row in enumerate(others):
            y, x = i + (j - (len(others) - 1) / 2) * height, row["times"]["diffusers"]
            axes.barh(y, x, 0.9 * height, color=COLOURS[row["provider"]])
            ink = "white" if row["provider"] == "fluxkern" else "black"
            axes.text(x, y, f"{x:.2f} ", ha="right", va="center", fontsize=8, color=ink)
        theirs = next(row for row in rows if row["provider"] == "diffusers")
        bound = theirs["of_bound"] and 1 / theirs["of_bound"]
        if bound:
            axes.plot([bound, bound], [i - 0.45, i + 0.45], color="#c0392b", lw=1.6)
    axes.axvline(1, color="#556", lw=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("times the speed of diffusers eager")
    labelled(axes, list(found))
    shown = {row["provider"] for rows in found.values() for row in rows}
    names = [name for name in COLOURS if name in shown and name != "diffusers"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    handles.append(plt.Line2D([], [], color="#c0392b", lw=1.6))
    axes.legend(
        handles, [*names, "Amdahl bound"], loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3
    )


def shares(axes: Axes, found: dict[str, list[dict[str, Any]]]) -> None:
    """Time by kind in terms of diffusers' whole, theirs above ours."""
    for i, rows in enumerate(found.values()):
        apart = [row for row in rows if row["parts"]]
        height = min(0.4, 0.9 / len(apart))
        for j, row in enumerate(apart):
            y, left = i + (j - (len(apart) - 1) / 2) * height, 0.0
            for kind, colour in KINDS.items():
                width = row["parts"][kind] / row["times"]["diffusers"]
                axes.barh(y, width, 0.85 * height, left=left, color=colour)
                if width >= 0.05:
                    said, ink = f"{row['parts'][kind]:.0%}", "white" if left == 0 else "black"
                    middle = {"ha": "center", "va": "center", "fontsize": 7}
                    axes.text(left + width / 2, y, said, color=ink, **middle)
                left += width
            axes.text(left, y, f" {row['provider']}", va="center", fontsize=8)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("time, in terms of diffusers eager; in the bars, share of the provider's own")
    labelled(axes, list(found))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    axes.legend(handles, KINDS, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)


def wholes(suites: Results, file: Path) -> None:
    found = groups(suites)
    size = (12, 1.9 + 0.75 * len(found))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, layout="constrained")
    speeds(left, found)
    shares(
        right, {label: rows for label, rows in found.items() if any(row["parts"] for row in rows)}
    )
    data = next(suites[suite] for suite in report.WHOLE_SUITES if suite in suites)
    save(figure, "Blocks, step and pipeline against diffusers", data, file)


def step(data: dict[str, Any], file: Path) -> None:
    """Stacked bars, one a provider of each step."""
    bars = [
        (f"{found['size']}\n{found['dtype']}, {provider}", shares)
        for found in data["kinds"]
        for provider, shares in found["shares"].items()
    ]
    names = dict.fromkeys(kind for _, shares in bars for kind in shares)
    size = (10, 1.4 + 0.42 * len(bars))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for i, (_, shares) in enumerate(bars):
        left = 0.0
        for kind, part in shares.items():
            axes.barh(i, part, 0.7, left=left, color=colours[kind])
            if part >= 0.04:
                axes.text(left + part / 2, i, f"{part:.0%}", ha="center", va="center", fontsize=7)
            left += part
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    labelled(axes, [label for label, _ in bars])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in names]
    figure.legend(handles, names, loc="outside lower left", ncols=4)
    save(figure, "Share of the time of a step", data, file)


def quality(data: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in data["rows"]:
        found = data["modes"].get(row["dtype"])
        if found:
            x, y = row["median"] * 1e3, found["steps"][-1]
            axes.scatter(x, y, 60, color=OURS)
            said = f" {row['dtype']}, {min(found['psnr']):.0f} dB at least"
            axes.annotate(said, (x, y), (6, 4), textcoords="offset points")
        else:
            axes.axvline(row["median"] * 1e3, color="#c0392b", lw=1.2)
            axes.text(row["median"] * 1e3, 0.02, " fp32", transform=axes.get_xaxis_transform())
    axes.set_yscale("log")
    axes.set_xlim(left=0, right=1.3 * axes.get_xlim()[1])
    axes.set_xlabel("ms a picture")
    axes.set_ylabel("relative L2 after the last step")
    save(figure, "Latency against error", data, file)


def scaling(data: dict[str, Any], file: Path) -> None:
    """Time of attention and of the rest, and memory, against tokens."""
    rows = [row for row in data["rows"] if row["axis"] == "tokens"]
    powers, x = data["exponents"]["tokens"], [row["count"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind, colour in (("attention", KINDS["attention"]), ("rest", KINDS["linears"])):
        y = [row["kinds"][kind] * 1e3 for row in rows]
        left.plot(x, y, "o-", color=colour, label=f"{kind}, tokens ^ {powers[kind]:.2f}")
    y = [row["peak"] / 1e6 for row in rows]
    right.plot(x, y, "o-", color=OURS, label=f"peak, tokens ^ {powers['memory']:.2f}")
    for axes, unit in ((left, "ms"), (right, "MB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.legend(loc="upper left")
    save(figure, f"A step as its tokens grow: {rows[0]['size']}", data, file)


# ops


def panels(rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, dict[str, dict]]]]:
    """Title -> op -> provider -> row, of each direction and dtype."""
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for (op, direction, dtype, shape), by in report.comparisons(rows).items():
        if report.ours(by):
            found.setdefault(f"{direction}, {dtype}, {shape}", {})[op] = by
    yield from sorted(found.items(), key=lambda item: (item[0].split(",")[0] != "forward", item[0]))


def grid(rows: list[dict[str, Any]]) -> tuple[Figure, Iterator[tuple[Axes, str, dict]]]:
    shown = list(panels(rows))
    columns = 2 if len(shown) > 1 else 1
    lines = -(-len(shown) // columns)
    most = [
        max(len(ops) for _, ops in shown[i * columns : (i + 1) * columns]) for i in range(lines)
    ]
    figure, axes = plt.subplots(
        *(lines, columns),
        figsize=(6.4 * columns, 1.2 * lines + 0.42 * sum(most)),
        layout="constrained",
        height_ratios=[count + 1 for count in most],
        squeeze=False,
        sharex="row",
    )
    for spare in axes.flat[len(shown) :]:
        spare.set_visible(False)
    return figure, ((a, title, ops) for a, (title, ops) in zip(axes.flat, shown, strict=False))


def marks(by: dict[str, dict]) -> Iterator[tuple[float, str, str, str]]:
    """Share, marker, colour and name of each provider."""
    name = report.ours(by)[0]
    if f"{name} kernel" in by:
        yield by[f"{name} kernel"]["share"], "D", KERNEL, "our kernel alone"
    for provider, marker, colour, label in (
        ("eager", "o", EAGER, "eager"),
        ("compile", "s", COMPILED, "torch.compile"),
        (name, "D", OURS, "fluxkern"),
    ):
        if provider in by:
            yield by[provider]["share"], marker, colour, label


def roofline(data: dict[str, Any], file: Path) -> None:
    rows = [row for row in data["rows"] if row["share"] is not None]
    figure, cells = grid(rows)
    named = {}
    shares = [x for by in report.comparisons(rows).values() for x, *_ in marks(by)]
    far = 1.05 * max(1.05, *shares)
    for axes, title, found in cells:
        for i, by in enumerate(found.values()):
            drawn = list(marks(by))
            axes.plot([0, max(x for x, *_ in drawn)], [i, i], color="#d5d9de", lw=1, zorder=1)
            for x, marker, colour, label in drawn:
                named[label] = axes.scatter(x, i, 42, color=colour, marker=marker, zorder=2)
        axes.axvline(1, color="#c0392b", lw=1.2)
        axes.axvline(0.8, color="#c0392b", lw=0.8, ls=":")
        axes.set_xlim(0, far)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axes.set_title(title, loc="left", fontsize=10)
        labelled(axes, list(found))
    order = [n for n in ("eager", "torch.compile", "fluxkern", "our kernel alone") if n in named]
    figure.legend([named[n] for n in order], order, loc="outside lower left", ncols=4)
    save(figure, "Share of the ceiling: copy bandwidth or matrix rate (dotted: 80 %)", data, file)


def speed_up(data: dict[str, Any], file: Path) -> None:
    figure, cells = grid(data["rows"])
    for axes, title, found in cells:
        for i, by in enumerate(found.values()):
            times = by[report.ours(by)[0]]["times"]
            for j, (baseline, colour) in enumerate(
                zip(bench.BASELINES, (EAGER, COMPILED), strict=True)
            ):
                if baseline in times:
                    y = i + (j - 0.5) * 0.38
                    axes.barh(y, times[baseline] - 1, 0.34, left=1, color=colour)
                    axes.text(
                        max(times[baseline], 1),
                        y,
                        f" {times[baseline]:.1f}",
                        va="center",
                        fontsize=7,
                    )
        axes.set_xscale("log", base=2)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.25)
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.axvline(1, color="#556", lw=1)
        axes.set_title(title, loc="left", fontsize=10)
        labelled(axes, list(found))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (EAGER, COMPILED)]
    figure.legend(handles, ("eager", "torch.compile"), loc="outside lower left", ncols=2)
    save(figure, "How many times faster fluxkern is than", data, file)


def draw(name: str, suites: Results, folder: Path) -> None:
    """Every plot that the report names for these results."""
    with plt.rc_context(STYLE):
        for file in report.plots_of(name, suites):
            match file.removeprefix(f"{name}-"):
                case "wholes.png":
                    wholes(suites, folder / file)
                case "roofline.png":
                    roofline(suites["ops"], folder / file)
                case "speed-up.png":
                    speed_up(suites["ops"], folder / file)
                case "step.png":
                    step(suites["step"], folder / file)
                case "quality.png":
                    quality(suites["quality"], folder / file)
                case "scaling.png":
                    scaling(suites["scaling"], folder / file)
