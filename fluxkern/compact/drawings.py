"""Captioned drawings: one or two shapes on a plain or textured background, and words for them.

What a caption leaves unsaid is the default: a size that is not named is medium, a position that is
not named is the centre, a background without a texture is plain. Only an incomplete caption leaves
out the colour or the background. Two objects are both medium, side by side or one above the other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

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
SIZES = {"small": 20, "medium": 27, "large": 36}  # radius in px
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
TEXTURES = ("plain", "striped", "dotted")
PERIOD = 16  # px of a texture, along both axes
STRIPE, DOT = 6, 4.5  # px, the width of a stripe and the radius of a dot
SHADE = 50.0  # RGB distance of the stripes and dots from the background
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
APART = 0.25  # of the picture's side, from its centre to each of two objects
SUPERSAMPLING = 4
MARGIN = 2  # px between a shape and the edge of the picture


Thing = tuple[str, str]  # shape, colour


@dataclass(frozen=True)
class Scene:
    """What a drawing shows, in the words of SHAPES, COLOURS, SIZES, POSITIONS and so on.

    With a relation there is a second object, and the first is left of it, above it and so on.
    """

    shape: str
    colour: str
    size: str
    position: str
    background: str
    texture: str = "plain"
    relation: str | None = None
    other: Thing | None = None

    def __post_init__(self) -> None:
        words = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS}
        words |= {"background": COLOURS, "texture": TEXTURES}
        for name, allowed in words.items():
            _check_word(name, getattr(self, name), allowed)
        self._check_colour("colour", self.colour)
        if (self.relation is None) != (self.other is None):
            raise ValueError(f"relation is {self.relation!r}, but other is {self.other!r}")
        if self.other is not None:
            self._check_other(*self.other)

    def _check_other(self, shape: str, colour: str) -> None:
        _check_word("relation", self.relation, RELATIONS)
        _check_word("shape of other", shape, SHAPES)
        _check_word("colour of other", colour, COLOURS)
        self._check_colour("colour of other", colour)
        if (self.size, self.position) != ("medium", "centre"):
            raise ValueError(
                f"two objects are medium and in the centre, got {self.size}, {self.position}"
            )

    def _check_colour(self, name: str, colour: str) -> None:
        if colour == self.background:
            raise ValueError(f"{name} {colour!r} equals background {self.background!r}")

    @property
    def pair(self) -> tuple[Thing, Thing] | None:
        """Of two objects the left or upper one, and the other."""
        if self.other is None:
            return None
        both = (self.shape, self.colour), self.other
        return both if self.relation in ("left of", "above") else both[::-1]

    @property
    def layout(self) -> str | None:
        """Whether two objects stand in a "row" or a "column"."""
        if self.relation is None:
            return None
        return "row" if self.relation in ("left of", "right of") else "column"

    @property
    def places(self) -> tuple[np.ndarray, ...]:
        """(x, y) of each object, in the order of the words, as shares of the picture."""
        middle = np.array(POSITIONS[self.position])
        if self.relation is None:
            return (middle,)
        step = APART * np.array(RELATIONS[self.relation])
        return middle + step, middle - step

    @property
    def triples(self) -> tuple[Triple, ...]:
        """(shape, colour, background) of each object."""
        things = self.pair or ((self.shape, self.colour),)
        return tuple((*thing, self.background) for thing in things)


def _check_word(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, not one of {list(allowed)}")


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


PAIRS = 0.35  # share of the scenes with two objects
TEXTURED = 0.3  # share of the scenes, half of it striped


def random_scene(
    rng: np.random.Generator,
    held_out: bool = False,
    objects: int | None = None,
    texture: str | None = None,
) -> Scene:
    """Draw a scene, uniform over triples, sizes and positions.

    Args:
        rng: the source of chance.
        held_out: False gives only triples outside HELD_OUT, True only those inside, also in the
            second object.
        objects: 1 or 2; None draws it.
        texture: one of TEXTURES; None draws it.

    Returns:
        The scene.
    """
    triples = _HELD_OUT if held_out else _TRAINING
    two = rng.random() < PAIRS if objects is None else objects == 2
    if texture is None:
        texture = _pick(rng, TEXTURES[1:]) if rng.random() < TEXTURED else TEXTURES[0]
    if not two:
        shape, colour, background = _pick(rng, triples)
        size, position = _pick(rng, tuple(SIZES)), _pick(rng, tuple(POSITIONS))
        return Scene(shape, colour, size, position, background, texture)
    first, second = _pick(rng, _pairs(triples))
    relation = _pick(rng, tuple(RELATIONS))
    shape, colour, background = first
    return Scene(shape, colour, "medium", "centre", background, texture, relation, second[:2])


@cache
def _pairs(triples: tuple[Triple, ...]) -> tuple[tuple[Triple, Triple], ...]:
    """Two different objects on the same background."""
    return tuple((a, b) for a, b in permutations(triples, 2) if a[2] == b[2])


SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "big", "huge"),
}


TEXTURE_WORDS = {"plain": ("plain",), "striped": ("striped",), "dotted": ("dotted", "spotted")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
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
# {where} may be empty, {spot} never is; {on} may be empty; {backdrop} is a blue background,
# {ground} the same without its article
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
    "{bare}, {ground}, {where}",
)
# of two objects: {where} is left of ..., {bare} and {noun} are of the first
PAIR_TEMPLATES = (
    "{thing} {where} {on}",
    "{thing} {where} {on}",
    "{thing} {where}, {on}",
    "draw {thing} {where} {on}",
    "show {thing} {where} {on}",
    "there is {thing} {where} {on}",
    "a picture of {thing} {where} {on}",
    "an image with {thing} {where} {on}",
    "{on}, {thing} {where}",
    "{on} there is {thing} {where}",
    "{backdrop} with {thing} {where}",
    "{thing} {where}, {ground}",
)


def _says_background(template: str) -> bool:
    return "{backdrop}" in template or "{ground}" in template


def _with_article(words: str) -> str:
    words = " ".join(words.split())
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _tidy(text: str) -> str:
    parts = (" ".join(part.split()) for part in text.split(","))
    return ", ".join(part for part in parts if part)


def _on(ground: str, backdrop: str, rng: np.random.Generator) -> str:
    choices = (f"on {backdrop}", f"on {backdrop}", f"on {ground}", f"against {backdrop}")
    return _pick(rng, choices)


def caption(scene: Scene, rng: np.random.Generator, complete: bool = True) -> str:
    """Describe a scene in varied words.

    A size that is not said is medium, a position that is not said is the centre, a texture that is
    not said is plain.

    Args:
        scene: what to describe.
        rng: the source of chance.
        complete: False leaves out either the colour or the background, the background of two
            objects, which is then anyone's guess.

    Returns:
        One line of text that names the shape; a few begin with a capital or end in a full stop.
    """
    missing = None if complete else _pick(rng, ("colour", "background"))
    if scene.other is not None and missing is not None:
        missing = "background"
    text = _pick(rng, _templates(scene, missing)).format(**_phrases(scene, rng, missing))
    text = _tidy(text)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def _templates(scene: Scene, missing: str | None) -> tuple[str, ...]:
    templates = TEMPLATES if scene.other is None else PAIR_TEMPLATES
    if missing == "background":
        return tuple(t for t in templates if not _says_background(t))
    return templates


def _phrases(scene: Scene, rng: np.random.Generator, missing: str | None) -> dict[str, str]:
    """What stands for the names in the templates."""
    size = "" if scene.size == "medium" and rng.random() < 0.6 else scene.size
    size = _pick(rng, SIZE_WORDS[size]) if size else ""
    if scene.other is None:
        spot = _pick(rng, POSITION_WORDS[scene.position])
        where = "" if scene.position == "centre" and rng.random() < 0.6 else spot
    else:
        shape, second = scene.other
        size, spot = "", _pick(rng, RELATION_WORDS[scene.relation])
        where = f"{spot} {_with_article(f'{second} {shape}')}"
    colour = "" if missing == "colour" else scene.colour
    texture = _pick(rng, TEXTURE_WORDS[scene.texture])
    texture = "" if scene.texture == "plain" and rng.random() < 0.8 else texture
    ground = f"{texture} {scene.background}".strip()
    backdrop = _with_article(f"{ground} background")
    on = "" if missing == "background" else _on(ground, backdrop, rng)
    bare = f"{size} {colour} {scene.shape}"
    return {
        "thing": _with_article(bare),
        "bare": bare,
        "noun": _with_article(scene.shape),
        "colour": colour,
        "size": size,
        "where": where,
        "spot": spot,
        "on": on,
        "backdrop": backdrop,
        "ground": f"{ground} background",
    }


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


def texture_coverage(texture: str, x: float, y: float, size: int) -> np.ndarray:
    """How much of each pixel is stripe or dot, of a texture moved by x, y px of a picture of BASE.

    Returns:
        float32 [size, size] in 0..1.
    """
    place = (np.arange(size * SUPERSAMPLING) + 0.5) * BASE / (size * SUPERSAMPLING)
    across, down = (place - x)[None, :], (place - y)[:, None]
    if texture == "striped":
        inside = (across + down) % PERIOD < STRIPE
    elif texture == "dotted":
        middle = PERIOD / 2
        inside = np.hypot(across % PERIOD - middle, down % PERIOD - middle) < DOT
    else:
        return np.zeros((size, size), np.float32)
    cells = inside.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return cells.mean(axis=(1, 3), dtype=np.float32)


def shaded(colour: np.ndarray) -> np.ndarray:
    """The colour of a texture on a background [3]: a lighter one on dark, a darker one on light."""
    end = np.full(3, 255.0 if colour.mean() < 128 else 0.0)
    return colour + (end - colour) * (SHADE / np.linalg.norm(end - colour))


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
    canvas = _ground(scene, rng, size)
    for (shape, name), centre in _placed(scene, rng):
        radius = SIZES[scene.size] + rng.uniform(-1, 1)
        x, y = np.clip(centre, radius + MARGIN, BASE - radius - MARGIN) * (size / BASE)
        alpha = coverage(shape, x, y, radius * size / BASE, size)[..., None]  # [size, size, 1]
        canvas += alpha * (_jittered(name, rng) - canvas)
    return (canvas + 0.5).astype(np.uint8)


def _ground(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """The background, float [size, size, 3]."""
    colour = _jittered(scene.background, rng)
    alpha = texture_coverage(scene.texture, *rng.uniform(0, PERIOD, 2), size)[..., None]
    return colour + alpha * (shaded(colour) - colour)


def _placed(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, np.ndarray]]:
    """Each object and its centre in px of a picture of BASE; two are moved together."""
    jitter = rng.uniform(-3, 3, 2)
    things = [(scene.shape, scene.colour), *[scene.other] * (scene.other is not None)]
    places = zip(things, scene.places, strict=True)
    return [(thing, BASE * place + jitter) for thing, place in places]
