"""Captioned drawings: one shape on a plain background, and words that describe it.

What a caption leaves unsaid is the default: a size that is not named is medium, a position that is
not named is the centre. Only an incomplete caption leaves out the colour or the background.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (215, 25, 35),
    "green": (25, 150, 50),
    "blue": (20, 65, 225),
    "yellow": (250, 225, 30),
    "orange": (245, 125, 15),
    "purple": (155, 40, 165),
    "cyan": (40, 210, 225),
    "black": (14, 14, 14),
    "white": (243, 243, 243),
}
BASE = 128  # px, the picture side that radii and jitters are given for
SIZES = {"small": 17, "medium": 25, "large": 34}  # radius in px
LOW, MIDDLE, HIGH = 0.28, 0.5, 0.72
POSITIONS = {  # (x, y) as shares of the picture, y down
    "centre": (MIDDLE, MIDDLE),
    "left": (LOW, MIDDLE),
    "right": (HIGH, MIDDLE),
    "top": (MIDDLE, LOW),
    "bottom": (MIDDLE, HIGH),
    "top left": (LOW, LOW),
    "top right": (HIGH, LOW),
    "bottom left": (LOW, HIGH),
    "bottom right": (HIGH, HIGH),
}
SUPERSAMPLING = 4
MARGIN = 2  # px between a shape and the edge of the picture


@dataclass(frozen=True)
class Scene:
    """What a drawing shows, in the words of SHAPES, COLOURS, SIZES and POSITIONS."""

    shape: str
    colour: str
    size: str
    position: str
    background: str

    def __post_init__(self) -> None:
        allowed = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS}
        for name, words in (allowed | {"background": COLOURS}).items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {list(words)}")
        if self.colour == self.background:
            raise ValueError(f"colour {self.colour!r} equals background {self.background!r}")


Triple = tuple[str, str, str]  # shape, colour, background
TRIPLES: tuple[Triple, ...] = tuple(t for t in product(SHAPES, COLOURS, COLOURS) if t[1] != t[2])


def _choose_held_out(count: int = 43, seed: int = 7) -> frozenset[Triple]:
    """Pick triples in hashed order, each pair of words at most once, so no pair is all held out."""
    chosen: list[Triple] = []
    seen: set[tuple] = set()
    for triple in sorted(
        TRIPLES, key=lambda t: hashlib.sha256(f"{seed} {' '.join(t)}".encode()).digest()
    ):
        shape, colour, background = triple
        pairs = {(shape, colour, 0), (shape, 0, background), (0, colour, background)}
        if not pairs & seen and len(chosen) < count:
            chosen.append(triple)
            seen |= pairs
    return frozenset(chosen)


HELD_OUT = _choose_held_out()
_HELD_OUT = tuple(t for t in TRIPLES if t in HELD_OUT)
_TRAINING = tuple(t for t in TRIPLES if t not in HELD_OUT)


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def random_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene, uniform over triples, sizes and positions.

    Args:
        rng: the source of chance.
        held_out: False gives only triples outside HELD_OUT, True only those inside.

    Returns:
        The scene.
    """
    shape, colour, background = _pick(rng, _HELD_OUT if held_out else _TRAINING)
    return Scene(shape, colour, _pick(rng, tuple(SIZES)), _pick(rng, tuple(POSITIONS)), background)


SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "big", "huge"),
}


def _corner_words(vertical: str, other: str, side: str) -> tuple[str, ...]:
    return (
        f"at the {vertical} {side}",
        f"in the {vertical} {side}",
        f"in the {vertical} {side} corner",
        f"in the {other} {side}",
        f"in the {other} {side} corner",
    )


POSITION_WORDS = {
    "centre": ("in the centre", "in the middle", "at the centre", "in the center"),
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "top": ("at the top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "top left": _corner_words("top", "upper", "left"),
    "top right": _corner_words("top", "upper", "right"),
    "bottom left": _corner_words("bottom", "lower", "left"),
    "bottom right": _corner_words("bottom", "lower", "right"),
}
# {thing} a small red circle, {bare} the same without its article, {noun} a circle
# {where} may be empty, {spot} never is; {on} may be empty, {backdrop} (a blue background) never is
TEMPLATES = (
    "{thing} {where} {on}",
    "{thing} {where} {on}",
    "{thing} {on} {where}",
    "{thing} {on}, {where}",
    "draw {thing} {where} {on}",
    "show {thing} {where} {on}",
    "there is {thing} {where} {on}",
    "a picture of {thing} {where} {on}",
    "a drawing of {thing} {on}, {where}",
    "an image with {thing} {where} {on}",
    "draw {noun}, {colour}, {size}, {where}, {on}",
    "{noun}, {size}, {colour}, {where}, {on}",
    "{bare}, {where}, {on}",
    "{on}, {thing} {where}",
    "{on} there is {thing} {where}",
    "{thing} {spot} of {backdrop}",
    "there is {thing} {spot} of {backdrop}",
    "{backdrop} with {thing} {where}",
    "{backdrop} and {thing} {where}",
    "{bare}, {background} background, {where}",
)
_PLAIN_TEMPLATES = tuple(t for t in TEMPLATES if "backdrop" not in t and "background" not in t)


def _with_article(words: str) -> str:
    words = " ".join(words.split())
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _tidy(text: str) -> str:
    parts = (" ".join(part.split()) for part in text.split(","))
    return ", ".join(part for part in parts if part)


def _on(background: str, rng: np.random.Generator) -> str:
    plain = _with_article(f"{background} background")
    choices = (
        f"on {plain}",
        f"on {plain}",
        f"on {background}",
        f"against {plain}",
        f"on a plain {background} background",
    )
    return _pick(rng, choices)


def caption(scene: Scene, rng: np.random.Generator, complete: bool = True) -> str:
    """Describe a scene in varied words.

    A size that is not said is medium, a position that is not said is the centre.

    Args:
        scene: what to describe.
        rng: the source of chance.
        complete: False leaves out either the colour or the background, which is then anyone's
            guess.

    Returns:
        One line of text that names the shape; a few begin with a capital or end in a full stop.
    """
    missing = None if complete else _pick(rng, ("colour", "background"))
    size = "" if scene.size == "medium" and rng.random() < 0.6 else scene.size
    size = _pick(rng, SIZE_WORDS[size]) if size else ""
    spot = _pick(rng, POSITION_WORDS[scene.position])
    where = "" if scene.position == "centre" and rng.random() < 0.6 else spot
    colour = "" if missing == "colour" else scene.colour
    bare = f"{size} {colour} {scene.shape}"
    text = _pick(rng, _PLAIN_TEMPLATES if missing == "background" else TEMPLATES).format(
        thing=_with_article(bare),
        bare=bare,
        noun=_with_article(scene.shape),
        colour=colour,
        size=size,
        where=where,
        spot=spot,
        on="" if missing == "background" else _on(scene.background, rng),
        backdrop=_with_article(f"{scene.background} background"),
        background=scene.background,
    )
    text = _tidy(text)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def _star_points() -> np.ndarray:
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _fit(points, extent: float = 1.0) -> np.ndarray:
    """Centre the points' bounding box on 0 and scale its longer side to 2 * extent."""
    points = np.asarray(points, dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * (2 * extent / (high - low).max())


_ARM = 0.32  # half the width of the cross's arms
_CROSS = [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
POLYGONS = {  # corners for radius 1, y down
    "square": _fit([(-1, -1), (1, -1), (1, 1), (-1, 1)], extent=0.9),
    "triangle": _fit([(0, 0), (1, math.sqrt(3)), (-1, math.sqrt(3))]),
    "star": _fit(_star_points()),
    "cross": _fit(_CROSS + [(-x, -y) for x, y in _CROSS]),
}
HOLE = 0.58  # inner radius of the ring


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """Return how much of each pixel a shape covers: float32 [size, size] in 0..1."""
    side = size * SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    centre, scaled = np.array([x, y]) * SUPERSAMPLING, radius * SUPERSAMPLING
    if shape in POLYGONS:
        pen.polygon((centre + scaled * POLYGONS[shape] - 0.5).ravel().tolist(), fill=255)
    else:
        pen.ellipse([*(centre - scaled), *(centre + scaled - 1)], fill=255)
    if shape == "ring":
        pen.ellipse([*(centre - HOLE * scaled), *(centre + HOLE * scaled - 1)], fill=0)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def _jittered(colour: str, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.integers(-5, 6, 3), 0, 255).astype(np.float32)


def draw(scene: Scene, rng: np.random.Generator, size: int = BASE) -> np.ndarray:
    """Draw a scene, anti-aliased, with a little jitter of place, radius and colours.

    Args:
        scene: what to draw.
        rng: the source of the jitter; the same state gives the same picture to the bit.
        size: side of the picture in pixels, at least 16.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: size is below 16.
    """
    if size < 16:
        raise ValueError(f"size is {size}, but a drawing needs at least 16 pixels")
    scale = size / BASE
    radius = (SIZES[scene.size] + rng.uniform(-1, 1)) * scale
    centre = np.array(POSITIONS[scene.position]) * size + rng.uniform(-3, 3, 2) * scale
    edge = radius + MARGIN * scale
    x, y = np.clip(centre, edge, size - edge)
    background, colour = _jittered(scene.background, rng), _jittered(scene.colour, rng)
    alpha = coverage(scene.shape, x, y, radius, size)[..., None]  # [size, size, 1]
    return (background + alpha * (colour - background) + 0.5).astype(np.uint8)
