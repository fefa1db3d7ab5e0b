"""The judge of drawn pictures: reads objects, their places and the background from pixels.

It sees no caption. Each attribute it cannot tell is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .drawings import (
    BASE,
    COLOURS,
    HIGH,
    LOW,
    MIDDLE,
    PERIOD,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    coverage,
    texture_coverage,
)

GRID = 32  # side of the normalised mask that templates are compared on
FRAME = 1.2  # side of the normalised mask, in extents of the object
MIN_CONTRAST = 45.0  # RGB distance from the background below which nothing is drawn
MIN_IOU = 0.89
MAX_COLOUR_DISTANCE = 30.0  # CIELAB
MAX_SIZE_RATIO = 1.35  # between an object's extent and that of the size it is called by
MAX_EXTENT = 0.85  # share of the picture's side above which there is no object but a texture
TAIL = 0.006  # share of the mask that may lie beyond each side of its extent
EVEN = 8.0  # RGB deviation within a period up to which a background is plain
MIN_SHADE = 25.0  # RGB distance of stripes or dots from the background
MIN_EXPLAINED = 0.8  # share of the variance within a period that the stripes or dots account for
MIN_GAP = 3  # px of background between two objects
MIN_SHARE = 0.15  # of what is drawn that lies on either side of the gap


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; None for what cannot be told.

    Of two objects shape and colour stand in `pair`, the left or the upper one first, and `layout`
    is "row" or "column"; `position` is that of their middle.
    """

    shape: str | None
    colour: str | None
    size: str | None
    position: str | None
    background: str | None
    texture: str | None = None
    layout: str | None = None
    pair: tuple[tuple[str | None, str | None], ...] | None = None


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 [..., 3] to CIELAB under D65."""
    c = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]
    )  # rows divided by the white point
    xyz = linear @ to_xyz.T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_NAMES = tuple(COLOURS)
_PALETTE = _lab(np.array(list(COLOURS.values())))


def _colour_name(rgb: np.ndarray) -> str | None:
    distances = np.linalg.norm(_PALETTE - _lab(rgb), axis=-1)
    nearest = int(distances.argmin())
    return _NAMES[nearest] if distances[nearest] <= MAX_COLOUR_DISTANCE else None


def _near(pixels: np.ndarray, colour: np.ndarray, share: float, distance: float = 70) -> bool:
    return bool((np.linalg.norm(pixels - colour, axis=-1) < distance).mean() >= share)


def _smoothed(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, H, 3] to float32 [BASE, BASE, 3], averaged over 3 by 3 pixels."""
    image = Image.fromarray(picture)
    if image.width != BASE:
        image = image.resize((BASE, BASE), Image.Resampling.BILINEAR)
    return np.asarray(image.filter(ImageFilter.BoxBlur(1)), dtype=np.float32)


def _extent(mass: np.ndarray) -> tuple[float, float]:
    """The interval of one axis that leaves TAIL of the mass beyond each end."""
    total = np.concatenate([[0.0], np.cumsum(mass)])
    low, high = np.interp([TAIL * total[-1], (1 - TAIL) * total[-1]], total, np.arange(total.size))
    return float(low), float(high)


Box = tuple[float, float, float]  # centre x, y and longer side, in pixels


def _object_box(alpha: np.ndarray) -> Box:
    """Where what stands out lies."""
    mask = alpha > 0.5
    (left, right), (top, bottom) = _extent(mask.sum(axis=0)), _extent(mask.sum(axis=1))
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top)


def _normalised(alpha: np.ndarray, box: Box) -> np.ndarray:
    """The mask around the object on a [GRID, GRID] raster, same scale on both axes."""
    x, y, side = box
    half = FRAME * side / 2
    pad = BASE // 2
    image = Image.fromarray(np.pad(alpha, pad))
    window = np.clip((x - half + pad, y - half + pad, x + half + pad, y + half + pad), 0, 2 * BASE)
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BILINEAR, box=tuple(window)))


def _alpha(distance: np.ndarray, contrast: float | np.ndarray) -> np.ndarray:
    """Distance from the background as coverage; the ramp leaves noise at 0."""
    return np.clip(1.3 * distance / contrast - 0.15, 0, 1)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """True shapes at each size, sharp and soft: masks [shapes, 6, cells], sides [shapes, sizes]."""
    masks, sides = [], []
    for shape in SHAPES:
        for radius in SIZES.values():
            true = coverage(shape, BASE / 2, BASE / 2, radius, BASE)
            sharp = Image.fromarray((255 * true).astype(np.uint8)).filter(ImageFilter.BoxBlur(1))
            for blur in (0, 1.5):
                soft = np.asarray(sharp.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float32)
                alpha = _alpha(soft, 255)
                box = _object_box(alpha)
                masks.append(_normalised(alpha, box).ravel())
                sides.append(box[2])
    count = len(SHAPES)
    mean_sides = np.reshape(sides, (count, len(SIZES), 2)).mean(axis=-1)
    return np.stack(masks).reshape(count, -1, GRID * GRID), mean_sides


def _shape_scores(alpha: np.ndarray, box: Box) -> np.ndarray:
    """Best soft intersection over union of the object with each shape: [shapes]."""
    mask, templates = _normalised(alpha, box).ravel(), _templates()[0]
    common = np.minimum(mask, templates).sum(axis=-1)
    return (common / (mask.sum() + templates.sum(axis=-1) - common)).max(axis=-1)


def _size_name(side: float, shape: str | None) -> str | None:
    sides = _templates()[1]
    expected = sides.mean(axis=0) if shape is None else sides[SHAPES.index(shape)]
    ratios = np.exp(np.abs(np.log(side / expected)))
    return list(SIZES)[int(ratios.argmin())] if ratios.min() <= MAX_SIZE_RATIO else None


def _position_name(x: float, y: float) -> str:
    steps = np.array([LOW, MIDDLE, HIGH])
    nearest = tuple(float(steps[np.abs(steps - value / BASE).argmin()]) for value in (x, y))
    return next(name for name, place in POSITIONS.items() if place == nearest)


def _background(pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """The border's median colour, and whether the border is all of about that colour."""
    strips = (pixels[:2], pixels[-2:], pixels[2:-2, :2], pixels[2:-2, -2:])
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    ground = np.median(border, axis=0)
    return ground, _near(border, ground, 0.8)


# Backgrounds


@cache
def _patterns() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Every texture at every place: names, tiles [N, PERIOD^2] and the same with mean 0, norm 1."""
    names, tiles = [], []
    for name, down in (("striped", 1), ("dotted", PERIOD)):
        for x in range(PERIOD):
            for y in range(down):
                whole = Image.fromarray((255 * texture_coverage(name, x, y, BASE)).astype(np.uint8))
                blurred = np.asarray(whole.filter(ImageFilter.BoxBlur(1)), dtype=np.float32) / 255
                names.append(name)
                tiles.append(blurred[PERIOD : 2 * PERIOD, PERIOD : 2 * PERIOD].ravel())
    stacked = np.stack(tiles)
    centred = stacked - stacked.mean(axis=1, keepdims=True)
    return tuple(names), stacked, centred / np.linalg.norm(centred, axis=1, keepdims=True)


def _folded(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray | None:
    """The mean background over all periods [PERIOD^2, 3], away from what is drawn on it."""
    drawn = np.linalg.norm(pixels - ground, axis=-1) > 75
    near = Image.fromarray((255 * drawn).astype(np.uint8)).filter(ImageFilter.MaxFilter(7))
    free = np.asarray(near) == 0
    periods = (BASE // PERIOD, PERIOD, BASE // PERIOD, PERIOD)
    counts = free.reshape(periods).sum(axis=(0, 2))
    if counts.min() < 4:
        return None
    sums = (pixels * free[..., None]).reshape(*periods, 3).sum(axis=(0, 2))
    return (sums / counts[..., None]).reshape(-1, 3)


def _texture(pixels: np.ndarray, border: np.ndarray) -> tuple[str | None, np.ndarray, np.ndarray]:
    """The texture's name, the background's colour and the background [BASE, BASE, 3]."""
    even = border, np.broadcast_to(border, pixels.shape)
    tile = _folded(pixels, border)
    if tile is None:
        return None, *even
    deviation = tile - tile.mean(axis=0)
    total = float(np.square(deviation).sum())
    if total <= EVEN**2 * len(tile):
        return "plain", *even
    names, patterns, directions = _patterns()
    steps = directions @ deviation  # [N, 3]
    best = int(np.square(steps).sum(axis=-1).argmax())
    pattern = patterns[best]
    shade = steps[best] / np.linalg.norm(pattern - pattern.mean())  # stripe or dot less background
    explained = float(np.square(steps[best]).sum()) / total
    if explained < MIN_EXPLAINED or np.linalg.norm(shade) < MIN_SHADE:
        return None, *even
    base = tile.mean(axis=0) - pattern.mean() * shade
    tiled = np.tile(pattern.reshape(PERIOD, PERIOD), (BASE // PERIOD, BASE // PERIOD))
    return names[best], base, (base + tiled[..., None] * shade).astype(np.float32)


# Objects


@dataclass(frozen=True)
class _Object:
    box: Box
    shape: str | None
    colour: str | None
    size: str | None


def _object(
    pixels: np.ndarray, ground: np.ndarray, distance: np.ndarray, within: np.ndarray | None = None
) -> _Object | None:
    """What stands out from the background, in a part of the picture; None if nothing does."""
    if within is not None:
        distance = distance * within
    contrast = float(np.partition(distance.ravel(), -150)[-150])  # a small star covers 300 pixels
    if contrast < MIN_CONTRAST:
        return None
    core = pixels[distance > 0.8 * contrast]
    ink = np.median(core, axis=0)
    alpha = _alpha(distance, np.linalg.norm(ink - ground, axis=-1))
    box = _object_box(alpha)
    scores = _shape_scores(alpha, box)
    best = SHAPES[int(scores.argmax())] if scores.max() >= MIN_IOU else None
    colour = _colour_name(ink) if _near(core, ink, 0.7) else None
    return _Object(box, best, colour, _size_name(box[2], best))


def _gap(drawn: np.ndarray) -> tuple[int, int] | None:
    """The widest gap between two parts of what is drawn, as its first and last but one pixel."""
    (filled,) = np.nonzero(drawn)
    if filled.size < 2:
        return None
    widths = np.diff(filled) - 1
    i = int(widths.argmax())
    share = drawn[: filled[i] + 1].sum() / drawn.sum()
    if widths[i] < MIN_GAP or not MIN_SHARE <= share <= 1 - MIN_SHARE:
        return None
    return int(filled[i]) + 1, int(filled[i + 1])


def _halves(distance: np.ndarray) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Two objects: "row" or "column" and the part of the picture of each, [BASE, BASE]."""
    drawn = distance > MIN_CONTRAST
    gaps = {"row": _gap(drawn.sum(axis=0)), "column": _gap(drawn.sum(axis=1))}
    found = {name: gap for name, gap in gaps.items() if gap is not None}
    if not found:
        return None
    layout = max(found, key=lambda name: found[name][1] - found[name][0])
    middle = sum(found[layout]) / 2
    first = np.arange(BASE) < middle
    if layout == "row":
        return layout, np.tile(first, (BASE, 1)), np.tile(~first, (BASE, 1))
    return layout, np.tile(first[:, None], (1, BASE)), np.tile(~first[:, None], (1, BASE))


def _pair(layout: str | None, first: _Object, second: _Object) -> dict[str, object]:
    (x0, y0, _), (x1, y1, _) = first.box, second.box
    along, across = abs(x1 - x0), abs(y1 - y0)
    if layout == "column":
        along, across = across, along
    return {
        "shape": None,
        "colour": None,
        "size": first.size if first.size == second.size else None,
        "position": _position_name((x0 + x1) / 2, (y0 + y1) / 2),
        "layout": layout if across < along / 2 else None,
        "pair": ((first.shape, first.colour), (second.shape, second.colour)),
    }


def judge(picture: np.ndarray) -> Verdict:
    """Tell what a picture shows from its pixels alone.

    The border's median is the background, with what recurs in every period as its texture; what
    differs from it is the object, or two where a gap parts it. The median of an object is its
    colour; its extent gives size and position; the best soft intersection over union with true
    shapes, each scaled to the same extent, gives the shape.

    Args:
        picture: uint8 [H, H, 3], RGB.

    Returns:
        The verdict, None in each field that cannot be told.

    Raises:
        ValueError: picture is not a square uint8 RGB array.
    """
    _check(picture)
    pixels = _smoothed(picture)
    border, plain = _background(pixels)
    texture, colour, ground = _texture(pixels, border)
    offset = pixels - ground
    distance = np.sqrt(np.einsum("hwc,hwc->hw", offset, offset))
    background = _colour_name(colour) if plain else None
    backdrop = {"background": background, "texture": texture if background else None}
    nothing = Verdict(None, None, None, None, **backdrop)
    halves = _halves(distance)
    if halves is not None:
        layout, *parts = halves
        objects = [_object(pixels, ground, distance, part) for part in parts]
        return nothing if None in objects else Verdict(**_pair(layout, *objects), **backdrop)
    only = _object(pixels, ground, distance)
    if only is None or only.box[2] > MAX_EXTENT * BASE:
        return nothing
    place = _position_name(*only.box[:2])
    return Verdict(only.shape, only.colour, only.size, place, **backdrop)


def _check(picture: np.ndarray) -> None:
    shape, dtype = np.shape(picture), getattr(picture, "dtype", None)
    square = len(shape) == 3 and shape[0] == shape[1] > 0 and shape[2] == 3
    if dtype != np.uint8 or not square:
        raise ValueError(f"picture must be uint8 [H, H, 3], got {dtype} {list(shape)}")


_DEFAULT = ("shape", "colour", "background", "texture", "layout")


def matches(verdict: Verdict, scene: Scene, fields: tuple[str, ...] = _DEFAULT) -> bool:
    """Return whether the verdict agrees with the scene on every named field.

    Of two objects both shapes or colours must be right, each in its place.
    """
    return all(_of(verdict, field) == _of(scene, field) for field in fields)


def _of(shown: Verdict | Scene, field: str) -> object:
    if shown.pair is not None and field in ("shape", "colour"):
        return tuple(thing[field == "colour"] for thing in shown.pair)
    return getattr(shown, field)
