"""The look of every picture: fonts, colours that the colour-blind tell apart, tiles, saving."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image
from torch import Tensor

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, INK = "#CC79A7", "#56B4E9", "#8a929b", "#22272e"
SIGNED, POSITIVE = "RdBu_r", "viridis"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "text.color": INK,
}
plt.rcParams.update(STYLE)


def figure(width: float, height: float, *shape: int, **options) -> tuple[Figure, np.ndarray]:
    """A figure in inches and its axes as an array of this shape."""
    size = {"figsize": (width, height), "layout": "constrained", "squeeze": False}
    return plt.subplots(*shape, **size, **options)


def save(fig: Figure, folder: Path, name: str) -> None:
    """Writes name.png, in 256 colours where nobody would see it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    fig.savefig(file, dpi=110, facecolor="white")
    plt.close(fig)
    whole = Image.open(file).convert("RGB")
    few = whole.quantize(256, dither=Image.Dither.NONE)
    off = np.asarray(whole, int) - np.asarray(few.convert("RGB"))
    (few if np.abs(off).mean() < 0.4 else whole).save(file, optimize=True)


def tile(axes: Axes, picture: Tensor | np.ndarray, title: str = "", **options) -> None:
    """A picture or a map, with every cell sharp and no axes."""
    axes.imshow(np.asarray(picture), interpolation="nearest", **options)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)


def signed(axes: Axes, values: Tensor, title: str = "") -> None:
    """A map around zero: blue below, red above."""
    most = float(abs(values).max())
    tile(axes, values, title, cmap=SIGNED, vmin=-most, vmax=most)


def numbers(axes: Axes, values: np.ndarray, form: str = "{:.2f}", size: float = 6.5) -> None:
    """Writes its number in each cell of a signed map."""
    most = abs(values).max()
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 * most else INK
        font = {"ha": "center", "va": "center", "fontsize": size, "color": ink}
        axes.text(column, row, form.format(value), **font)


def row_label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)


def empty(axes: Axes, width: float, height: float) -> None:
    """A canvas for boxes and arrows, y down."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, **font) -> None:
    """A filled box, (x, y) its upper left corner."""
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), w, h, shape, fc=f"{colour}26", ec=colour, lw=1.2))
    font = {"fontsize": 8} | font
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=INK, **font)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour=INK) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))
