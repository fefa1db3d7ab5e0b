"""The judge of drawn pictures: reads shape, colour, size, position and background from pixels.

It sees no caption. Each attribute it cannot tell is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .drawings import BASE, COLOURS, HIGH, LOW, MIDDLE, POSITIONS, SHAPES, SIZES, Scene, coverage

GRID = 32  # side of the normalised mask that templates are compared on
FRAME = 1.2  # side of the normalised mask, in extents of the object
MIN_CONTRAST = 45.0  # RGB distance from the background below which nothing is drawn
MIN_IOU = 0.89
MAX_COLOUR_DISTANCE = 30.0  # CIELAB
MAX_SIZE_RATIO = 1.35  # between an object's extent and that of the size it is called by
MAX_EXTENT = 0.85  # share of the picture's side above which there is no object but a texture
TAIL = 0.006  # share of the mask that may lie beyond each side of its extent


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; None for what cannot be told."""

    shape: str | None
    colour: str | None
    size: str | None
    position: str | None
    background: str | None


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


def _object_box(alpha: np.ndarray) -> tuple[float, float, float]:
    """Centre x, y and longer side of what stands out, in pixels."""
    mask = alpha > 0.5
    (left, right), (top, bottom) = _extent(mask.sum(axis=0)), _extent(mask.sum(axis=1))
    return (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top)


def _normalised(alpha: np.ndarray, box: tuple[float, float, float]) -> np.ndarray:
    """The mask around the object on a [GRID, GRID] raster, same scale on both axes."""
    x, y, side = box
    half = FRAME * side / 2
    pad = BASE // 2
    image = Image.fromarray(np.pad(alpha, pad))
    window = np.clip((x - half + pad, y - half + pad, x + half + pad, y + half + pad), 0, 2 * BASE)
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BILINEAR, box=tuple(window)))


def _alpha(distance: np.ndarray, contrast: float) -> np.ndarray:
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


def _shape_scores(alpha: np.ndarray, box: tuple[float, float, float]) -> np.ndarray:
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


def judge(picture: np.ndarray) -> Verdict:
    """Tell what a picture shows from its pixels alone.

    The border's median is the background; what differs from it is the object; its median is the
    colour; its extent gives size and position; the best soft intersection over union with true
    shapes, each scaled to the same extent, gives the shape.

    Args:
        picture: uint8 [H, H, 3], RGB.

    Returns:
        The verdict, None in each field that cannot be told.

    Raises:
        ValueError: picture is not a square uint8 RGB array.
    """
    shape, dtype = np.shape(picture), getattr(picture, "dtype", None)
    if (
        dtype != np.uint8
        or len(shape) != 3
        or shape[0] != shape[1]
        or shape[2] != 3
        or not shape[0]
    ):
        raise ValueError(f"picture must be uint8 [H, H, 3], got {dtype} {list(shape)}")
    pixels = _smoothed(picture)
    ground, plain = _background(pixels)
    background = _colour_name(ground) if plain else None
    nothing = Verdict(None, None, None, None, background)
    offset = pixels - ground
    distance = np.sqrt(np.einsum("hwc,hwc->hw", offset, offset))
    contrast = float(np.partition(distance.ravel(), -150)[-150])  # a small star covers 300 pixels
    if contrast < MIN_CONTRAST:
        return nothing
    core = pixels[distance > 0.8 * contrast]
    ink = np.median(core, axis=0)
    alpha = _alpha(distance, float(np.linalg.norm(ink - ground)))
    box = _object_box(alpha)
    if box[2] > MAX_EXTENT * BASE:
        return nothing
    scores = _shape_scores(alpha, box)
    best = SHAPES[int(scores.argmax())] if scores.max() >= MIN_IOU else None
    colour = _colour_name(ink) if _near(core, ink, 0.7) else None
    return Verdict(best, colour, _size_name(box[2], best), _position_name(*box[:2]), background)


def matches(
    verdict: Verdict, scene: Scene, fields: tuple[str, ...] = ("shape", "colour", "background")
) -> bool:
    """Return whether the verdict agrees with the scene on every named field."""
    return all(getattr(verdict, field) == getattr(scene, field) for field in fields)
