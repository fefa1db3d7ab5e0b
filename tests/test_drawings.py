"""Drawings, their captions, and the judge that reads them back from pixels alone."""

import secrets
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fluxkern.compact.drawings import (
    BASE,
    COLOURS,
    HELD_OUT,
    POSITION_WORDS,
    POSITIONS,
    RELATION_WORDS,
    RELATIONS,
    SHAPES,
    SIZE_WORDS,
    SIZES,
    TEXTURE_WORDS,
    TEXTURES,
    TRIPLES,
    Scene,
    caption,
    coverage,
    draw,
    random_scene,
    shaded,
    texture_coverage,
)
from fluxkern.compact.judge import Verdict, judge, matches

WORDS = ("shape", "colour", "size", "position", "background")
FIELDS = (*WORDS, "texture", "layout", "pair")
ROWS, COLUMNS = np.mgrid[:BASE, :BASE]


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # pytest shows it when a test fails
    return np.random.default_rng(seed)


def single(rng):
    return random_scene(rng, objects=1)


def noisy(picture, rng):
    return np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)


def blurred(picture, rng):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))


def painted(alpha, rng):
    _, colour, background = TRIPLES[rng.integers(len(TRIPLES))]
    low, high = np.array(COLOURS[background]), np.array(COLOURS[colour])
    return (low + alpha[..., None] * (high - low)).astype(np.uint8)


def plain(rng, objects=1):
    return random_scene(rng, objects=objects, texture="plain")


def share_right(pictures, scenes):
    verdicts = [judge(picture) for picture in pictures]
    wrong = [(v, s) for v, s in zip(verdicts, scenes, strict=True) if not matches(v, s, FIELDS)]
    for verdict, scene in wrong:
        print(verdict, scene)
    return 1 - len(wrong) / len(verdicts)


# Scenes


def test_a_tenth_of_the_triples_is_held_out():
    assert 0.09 <= len(HELD_OUT) / len(TRIPLES) <= 0.11
    assert HELD_OUT <= set(TRIPLES)
    assert len(TRIPLES) == len(set(TRIPLES)) == 6 * 9 * 8


def test_no_pair_of_words_is_wholly_held_out():
    for first, second in ((0, 1), (0, 2), (1, 2)):
        everything = {(t[first], t[second]) for t in TRIPLES}
        trained = {(t[first], t[second]) for t in TRIPLES if t not in HELD_OUT}
        assert trained == everything


def test_training_scenes_are_all_triples_but_the_held_out_ones(rng):
    for objects in (1, 2):
        scenes = [random_scene(rng, objects=objects) for _ in range(20000)]
        assert {triple for s in scenes for triple in s.triples} == set(TRIPLES) - HELD_OUT


def test_held_out_scenes_are_all_held_out_triples(rng):
    scenes = [random_scene(rng, held_out=True) for _ in range(3000)]
    assert {triple for s in scenes for triple in s.triples} == HELD_OUT
    assert {s.other is None for s in scenes} == {True, False}


def test_sizes_and_positions_occur_equally_often(rng):
    scenes = [single(rng) for _ in range(5000)]
    for words, name in ((SIZES, "size"), (POSITIONS, "position")):
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(words)
        assert min(counts.values()) > 0.7 * len(scenes) / len(words)


def test_scenes_are_of_every_kind(rng):
    scenes = [random_scene(rng) for _ in range(5000)]
    two = [scene for scene in scenes if scene.other is not None]
    assert 0.3 < len(two) / len(scenes) < 0.4
    assert min(Counter(scene.relation for scene in two).values()) > 0.2 * len(two)
    textures = Counter((scene.texture, scene.other is None) for scene in scenes)
    assert len(textures) == 6 and min(textures.values()) > 0.03 * len(scenes)


def test_two_objects_are_never_the_same_thing(rng):
    scenes = [random_scene(rng, objects=2) for _ in range(2000)]
    assert all(scene.pair[0] != scene.pair[1] for scene in scenes)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_pair_begins_at_the_left_or_the_top(relation):
    scene = Scene("star", "red", "medium", "centre", "blue", "plain", relation, ("ring", "white"))
    first = relation in ("left of", "above")
    assert scene.pair[0] == (("star", "red") if first else ("ring", "white"))
    assert scene.layout == ("row" if "of" in relation else "column")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texture": "woven"}, "texture is 'woven'"),
        ({"relation": "near"}, "relation is 'near'"),
        ({"other": ("blob", "red")}, "shape of other is 'blob'"),
        ({"other": ("star", "blue")}, "colour of other 'blue' equals background"),
        ({"other": None}, "relation is 'above', but other is None"),
        ({"relation": None}, "relation is None, but other is"),
        ({"size": "large"}, "medium and in the centre, got large"),
        ({"position": "top"}, "medium and in the centre, got medium, top"),
    ],
)
def test_a_scene_that_cannot_be_drawn_is_refused(changes, message):
    words = dict(zip(WORDS, ("circle", "red", "medium", "centre", "blue"), strict=True))
    with pytest.raises(ValueError, match=message):
        Scene(**words | {"relation": "above", "other": ("ring", "white")} | changes)


@pytest.mark.parametrize("field", WORDS)
def test_an_unknown_word_is_refused_by_name(field):
    words = dict(zip(WORDS, ("circle", "red", "small", "centre", "blue"), strict=True))
    with pytest.raises(ValueError, match=f"{field} is 'mauve'"):
        Scene(**words | {field: "mauve"})


def test_a_shape_in_the_background_colour_is_refused():
    with pytest.raises(ValueError, match="colour 'red' equals background 'red'"):
        Scene("circle", "red", "small", "centre", "red")


# Captions


def words_of(text):
    return text.lower().replace(",", " ").replace(".", " ").split()


def things_of(scene):
    return [(scene.shape, scene.colour), scene.other][: 1 + (scene.other is not None)]


def test_every_caption_names_its_shapes_once_in_their_order(rng):
    for complete in (True, False):
        for _ in range(2000):
            scene = random_scene(rng)
            words = words_of(caption(scene, rng, complete))
            assert [w for w in words if w in SHAPES] == [shape for shape, _ in things_of(scene)]


def test_a_complete_caption_names_all_colours_and_no_other(rng):
    for _ in range(2000):
        scene = random_scene(rng)
        words = words_of(caption(scene, rng))
        named = sorted(w for w in words if w in COLOURS)
        assert named == sorted([*(colour for _, colour in things_of(scene)), scene.background])


def test_an_incomplete_caption_leaves_out_the_colour_or_the_background(rng):
    left_out = Counter()
    for _ in range(2000):
        scene = single(rng)
        named = [w for w in words_of(caption(scene, rng, complete=False)) if w in COLOURS]
        assert len(named) == 1
        left_out["background" if named == [scene.colour] else "colour"] += 1
        assert named[0] in (scene.colour, scene.background)
    assert min(left_out.values()) > 800


def test_an_incomplete_caption_of_two_objects_leaves_out_the_background(rng):
    for _ in range(500):
        scene = random_scene(rng, objects=2)
        words = words_of(caption(scene, rng, complete=False))
        assert [w for w in words if w in COLOURS] == [colour for _, colour in things_of(scene)]


def test_a_caption_says_how_two_objects_stand(rng):
    for _ in range(2000):
        scene = random_scene(rng, objects=2)
        text = " ".join(words_of(caption(scene, rng)))
        said = {name for name, ws in RELATION_WORDS.items() if any(f" {w} a" in text for w in ws)}
        assert said == {scene.relation}, text
        assert text.index(scene.colour) < text.rindex(f"{scene.other[1]} {scene.other[0]}")


def test_a_caption_says_the_texture_unless_it_is_plain(rng):
    for _ in range(4000):
        scene = random_scene(rng)
        words = set(words_of(caption(scene, rng)))
        said = {name for name, ws in TEXTURE_WORDS.items() if words & set(ws)}
        assert said == {scene.texture} or (not said and scene.texture == "plain")


def test_what_a_caption_does_not_say_is_the_default(rng):
    for _ in range(4000):
        scene = single(rng)
        text = " ".join(words_of(caption(scene, rng)))
        sizes = {name for name, words in SIZE_WORDS.items() if set(words) & set(text.split())}
        assert sizes == {scene.size} or (not sizes and scene.size == "medium")
        said = [phrase for phrase in POSITION_WORDS[scene.position] if phrase in text]
        others = [p for name, ps in POSITION_WORDS.items() if name != "centre" for p in ps]
        assert said or (scene.position == "centre" and not any(p in text for p in others))


def test_captions_are_tidy(rng):
    for complete in (True, False):
        for _ in range(2000):
            text = caption(random_scene(rng), rng, complete)
            assert text == " ".join(text.split()).strip(",") and " ," not in text
            assert ",," not in text and ", ," not in text and ",." not in text
            words = words_of(text)
            for article, word in zip(words, words[1:], strict=False):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou"), text


def test_the_plain_sentence_is_one_of_the_captions(rng):
    scene = Scene("circle", "red", "medium", "centre", "blue")
    captions = {caption(scene, rng) for _ in range(3000)}
    assert "a red circle on a blue background" in captions
    assert len(captions) > 200


# Drawings


def test_the_same_seed_gives_the_same_picture_to_the_bit():
    seed = secrets.randbits(32)
    scene = random_scene(np.random.default_rng(seed))
    first, second = (draw(scene, np.random.default_rng(seed)) for _ in range(2))
    other = draw(scene, np.random.default_rng(seed + 1))
    assert first.dtype == np.uint8 and first.shape == (BASE, BASE, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_shape_stays_off_the_edge(rng):
    for _ in range(300):
        picture = draw(plain(rng), rng)
        frame = picture.copy()
        frame[1:-1, 1:-1] = picture[0, 0]
        assert (frame == picture[0, 0]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_bounding_box_at_its_place(shape):
    covered = coverage(shape, 60, 68, 25, BASE) > 0.5
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    extent = max(np.ptp(columns), np.ptp(rows)) + 1
    assert 44 <= extent <= 51  # the square is drawn at 0.9 so that it does not look bigger
    assert abs((columns[0] + columns[-1] + 1) / 2 - 60) <= 1
    assert abs((rows[0] + rows[-1] + 1) / 2 - 68) <= 1


def test_two_objects_stay_off_each_other_and_off_the_edge(rng):
    for _ in range(200):
        scene = plain(rng, objects=2)
        picture = draw(scene, rng).astype(int)
        drawn = np.abs(picture - picture[0, 0]).sum(-1) > 0
        assert not drawn[[0, -1]].any() and not drawn[:, [0, -1]].any()
        middle = drawn.any(axis=0 if scene.layout == "row" else 1)[44:84]
        assert 5 <= (~middle).sum() <= 30


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_recurs_and_covers_less_than_half(rng, texture):
    alpha = texture_coverage(texture, *rng.uniform(0, 16, 2), BASE)
    assert alpha.shape == (BASE, BASE) and alpha.min() >= 0 and alpha.max() <= 1
    assert all(np.array_equal(alpha, np.roll(alpha, 16, axis)) for axis in (0, 1))
    covered = {"plain": 0, "striped": 6 / 16, "dotted": np.pi * 4.5**2 / 16**2}[texture]
    assert alpha.mean() == pytest.approx(covered, abs=0.01)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_shade_of_a_texture_keeps_its_distance_and_its_name(colour):
    rgb = np.array(COLOURS[colour], float)
    assert np.linalg.norm(shaded(rgb) - rgb) == pytest.approx(50)
    nearest = min(COLOURS, key=lambda name: np.linalg.norm(shaded(rgb) - COLOURS[name]))
    assert nearest == colour


def test_edges_are_smooth(rng):
    levels = np.unique(draw(Scene("circle", "black", "large", "centre", "white"), rng)[..., 0])
    assert len(levels) >= 10


def test_a_size_below_16_is_refused(rng):
    with pytest.raises(ValueError, match="size is 8"):
        draw(random_scene(rng), rng, size=8)


# The judge


@pytest.mark.parametrize("spoil", [None, noisy, blurred])
@pytest.mark.parametrize("objects", [1, 2])
def test_true_drawings_are_judged_right_on_every_attribute(rng, objects, spoil):
    scenes = [random_scene(rng, held_out=i % 4 == 0, objects=objects) for i in range(150)]
    pictures = [draw(scene, rng) for scene in scenes]
    if spoil is not None:
        pictures = [spoil(picture, rng) for picture in pictures]
    assert share_right(pictures, scenes) >= 0.99


@pytest.mark.parametrize("size", [64, 200, 256])
def test_other_picture_sizes_are_judged_right(rng, size):
    scenes = [random_scene(rng) for _ in range(50)]
    assert share_right([draw(scene, rng, size) for scene in scenes], scenes) >= 0.98


@pytest.mark.parametrize("background", COLOURS)
def test_a_plain_picture_shows_its_background_and_nothing_else(rng, background):
    picture = np.full((BASE, BASE, 3), COLOURS[background], dtype=np.uint8)
    nothing = Verdict(None, None, None, None, background, "plain")
    assert judge(picture) == judge(noisy(picture, rng)) == nothing


def test_random_noise_shows_nothing(rng):
    for _ in range(20):
        picture = rng.integers(0, 256, (BASE, BASE, 3), dtype=np.uint8)
        assert judge(picture) == Verdict(None, None, None, None, None)


def random_blob(rng):
    """Two to five gaussians, cut at a soft level: coverage [BASE, BASE]."""
    field = np.zeros((BASE, BASE))
    for _ in range(rng.integers(2, 6)):
        (x, y), (a, b), turn = rng.uniform(30, 98, 2), rng.uniform(6, 20, 2), rng.uniform(0, np.pi)
        u = (COLUMNS - x) * np.cos(turn) + (ROWS - y) * np.sin(turn)
        v = (ROWS - y) * np.cos(turn) - (COLUMNS - x) * np.sin(turn)
        field += np.exp(-0.5 * ((u / a) ** 2 + (v / b) ** 2))
    steepness = rng.choice([1, 12])
    return np.clip((field / field.max() - 0.4) * steepness + 0.5 * (steepness > 1), 0, 1)


def half_of(shape, rng):
    """A shape with one side of a random line through its centre erased."""
    x, y = rng.uniform(40, 88, 2)
    whole = coverage(shape, x, y, rng.choice(list(SIZES.values())), BASE)
    turn = rng.uniform(0, 2 * np.pi)
    return whole * ((COLUMNS - x) * np.cos(turn) + (ROWS - y) * np.sin(turn) > 0)


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_a_texture_without_an_object_is_told_from_nothing(rng, texture):
    for background in COLOURS:
        colour = np.array(COLOURS[background], float)
        alpha = texture_coverage(texture, *rng.uniform(0, 16, 2), BASE)[..., None]
        picture = (colour + alpha * (shaded(colour) - colour)).astype(np.uint8)
        nothing = Verdict(None, None, None, None, background, texture)
        assert judge(picture) == judge(noisy(picture, rng)) == nothing


def test_an_uneven_background_is_neither_plain_nor_textured(rng):
    for _ in range(20):
        stains = rng.normal(0, 1, (16, 16)).repeat(8, 0).repeat(8, 1)[..., None]
        tile = rng.normal(0, 20, (16, 16, 1))
        for spoiled in (25 * stains, np.tile(tile, (8, 8, 1)), 20 * (ROWS % 8 < 4)[..., None]):
            picture = np.clip(np.full((BASE, BASE, 3), (25, 150, 50)) + spoiled, 0, 255)
            assert judge(picture.astype(np.uint8)).texture not in TEXTURES[1:]


def two(rng):
    scene = plain(rng, objects=2)
    return scene, draw(scene, rng)


def test_two_objects_in_exchanged_places_are_wrong(rng):
    for _ in range(40):
        scene, picture = two(rng)
        turned = picture[:, ::-1] if scene.layout == "row" else picture[::-1]
        expected = (scene.pair[1], scene.pair[0])
        colours = [thing[1] for thing in expected]
        assert [thing[1] for thing in judge(turned).pair] == colours
        assert not matches(judge(turned), scene)


def test_two_objects_in_another_layout_are_wrong(rng):
    for _ in range(40):
        scene, picture = two(rng)
        assert judge(picture.transpose(1, 0, 2)).layout != scene.layout


def test_objects_on_a_diagonal_have_no_layout(rng):
    alpha = np.maximum(coverage("square", 34, 34, 22, BASE), coverage("circle", 94, 94, 22, BASE))
    verdict = judge(painted(alpha, rng))
    assert verdict.layout is None and [shape for shape, _ in verdict.pair] == ["square", "circle"]


def test_one_object_is_not_two_and_two_are_not_one(rng):
    for _ in range(40):
        pair, picture = two(rng)
        one = plain(rng)
        assert judge(picture).shape is None and judge(picture).colour is None
        assert judge(draw(one, rng)).pair is None and judge(draw(one, rng)).layout is None
        assert not matches(judge(picture), one) and not matches(judge(draw(one, rng)), pair)


def test_the_second_object_is_held_to_the_rule_of_the_first(rng):
    for _ in range(40):
        scene, picture = two(rng)
        if scene.pair[1][0] == "triangle":  # whose upper half is one
            continue
        half = picture.copy()
        x, y = (96, 64) if scene.layout == "row" else (64, 96)
        half[y:, x - 32 : x + 32][: 128 - y] = picture[0, 0]  # its lower part is gone
        assert not matches(judge(half), scene, ("shape",))


def test_random_blobs_are_no_shape(rng):
    verdicts = [judge(painted(random_blob(rng), rng)) for _ in range(200)]
    assert sum(v.shape is not None for v in verdicts) <= 10  # some blobs are round


@pytest.mark.parametrize("shape", ["circle", "square", "star", "ring", "cross"])
def test_half_a_shape_is_no_shape(rng, shape):
    for _ in range(40):  # not the triangle, half of which can be a triangle
        assert judge(painted(half_of(shape, rng), rng)).shape is None


def test_an_ellipse_is_no_circle(rng):
    for flat in rng.uniform(0.5, 0.8, 20):
        inside = ((COLUMNS - 64) / 30) ** 2 + ((ROWS - 64) / 30 / flat) ** 2 < 1
        assert judge(painted(inside, rng)).shape is None


def test_two_shapes_are_not_one_shape(rng):
    for _ in range(40):
        first, second = (coverage(SHAPES[rng.integers(6)], x, 64, 20, BASE) for x in (34, 94))
        assert judge(painted(np.maximum(first, second), rng)).shape is None


def test_a_two_coloured_object_has_no_colour():
    picture = np.full((BASE, BASE, 3), COLOURS["white"], dtype=np.uint8)
    picture[40:88, 40:64], picture[40:88, 64:88] = COLOURS["blue"], COLOURS["red"]
    assert judge(picture).colour is None


@pytest.mark.parametrize("rgb", [(128, 128, 128), (120, 75, 40), (255, 175, 200), (20, 90, 90)])
def test_a_colour_outside_the_palette_is_none(rgb):
    picture = np.full((BASE, BASE, 3), rgb, dtype=np.uint8)
    assert judge(picture).background is None


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((8, 9, 3), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 0, 3), np.uint8),
        [[0]],
    ],
)
def test_what_is_not_a_square_picture_is_refused(picture):
    with pytest.raises(ValueError, match="picture must be uint8"):
        judge(picture)


def test_matches_compares_only_the_named_fields():
    scene = Scene("star", "red", "small", "top", "blue")
    verdict = Verdict("star", "red", None, "left", "blue", "plain")
    assert matches(verdict, scene)
    assert not matches(verdict, scene, ("size",))
    assert not matches(verdict, scene, ("shape", "position"))
