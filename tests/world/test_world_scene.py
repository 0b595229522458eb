"""Scenes and their pictures: the same everywhere, within the rules, without overlaps."""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from sg4v_jax.world import Scene, Thing, boxes, render, sample_scene
from sg4v_jax.world.scene import (
    BACKGROUNDS,
    COLORS,
    GRID,
    PATTERNS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Dice,
)

THING = Thing("pole", "red", "small", "dotted", 0, 1)


def test_sampling_never_changes():
    scenes = [sample_scene(seed).to_dict() for seed in range(300)]
    digest = hashlib.sha256(json.dumps(scenes, sort_keys=True).encode()).hexdigest()
    assert digest == "9b640df44b6358019bf33ea0a4f13fe259332a447ae978e263ee31601452a61a"


def test_sampling_uses_the_whole_vocabulary():
    scenes = [sample_scene(seed) for seed in range(500)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {thing.texture for thing in things} == set(TEXTURES)
    assert {thing.position for thing in things} == set(POSITIONS)
    assert {(s.background, s.pattern) for s in scenes} == set(itertools.product(BACKGROUNDS, PATTERNS))
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_a_colour_word_belongs_to_things_or_to_backgrounds():
    assert not set(COLORS) & set(BACKGROUNDS)


def test_seeds_may_be_large_and_scenes_differ():
    assert sample_scene(2**70) == sample_scene(2**70)
    assert len({sample_scene(seed) for seed in range(1000)}) > 980


def test_a_scene_survives_json():
    for seed in range(50):
        scene = sample_scene(seed)
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_a_position_names_the_cell():
    cells = [
        dataclasses.replace(THING, column=column, row=row) for row in range(GRID) for column in range(GRID)
    ]
    assert [thing.position for thing in cells] == list(POSITIONS)
    for thing in cells:
        assert thing.position == f"{('top', 'bottom')[thing.row]} {('left', 'right')[thing.column]}"


def test_things_are_kept_in_reading_order():
    above = dataclasses.replace(THING, shape="ring", column=1, row=0)
    assert Scene("gray", "plain", (THING, above)) == Scene("gray", "plain", (above, THING))
    assert Scene("gray", "plain", (THING, above)).things == (above, THING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "heptagon"}, "shape is 'heptagon'"),
        ({"color": "gray"}, "color is 'gray'"),
        ({"size": "huge"}, "size is 'huge'"),
        ({"texture": "fluffy"}, "texture is 'fluffy'"),
        ({"column": 2}, "column is 2"),
        ({"row": -1}, "row is -1"),
    ],
)
def test_unknown_words_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(THING, **change)


def test_impossible_scenes_are_refused():
    twin = dataclasses.replace(THING, row=0)
    neighbour = dataclasses.replace(THING, shape="ring")
    with pytest.raises(ValueError, match="share a shape"):
        Scene("gray", "plain", (THING, twin))
    with pytest.raises(ValueError, match="share a cell"):
        Scene("gray", "plain", (THING, neighbour))
    with pytest.raises(ValueError, match="1 to 3 things"):
        Scene("gray", "plain", ())
    with pytest.raises(ValueError, match="background is 'red'"):
        Scene("red", "plain", (THING,))


def test_dice_are_fair_and_sample_without_replacement():
    dice = Dice(0)
    counts = np.bincount([dice.below(6) for _ in range(6000)], minlength=6)
    assert counts.min() > 850 and counts.max() < 1150
    assert sorted(dice.sample("abcdef", 6)) == list("abcdef")
    assert len(set(dice.sample(range(9), 4))) == 4


def test_rendering_is_a_function_of_the_scene():
    for seed in range(10):
        first, second = render(sample_scene(seed)), render(sample_scene(seed))
        assert first.mode == "RGB" and first.size == (224, 224)
        assert first.tobytes() == second.tobytes()


def test_the_pictures_handed_out_are_copies():
    scene = sample_scene(3)
    before = render(scene).tobytes()
    render(scene).paste((0, 0, 0), (0, 0, 224, 224))
    assert render(scene).tobytes() == before


@pytest.mark.parametrize("size", [64, 65, 67, 100, 224, 336])
def test_things_stay_in_their_cells(size):
    for seed in range(500):
        scene = sample_scene(seed)
        for thing, (left, top, right, bottom) in zip(scene.things, boxes(scene, size), strict=True):
            cell = size / GRID
            assert cell * thing.column <= left < right <= cell * (thing.column + 1)
            assert cell * thing.row <= top < bottom <= cell * (thing.row + 1)


def test_nothing_is_drawn_outside_the_boxes():
    for seed in range(30):
        scene = sample_scene(seed)
        # The same background, with a thing somewhere that is blanked out on both pictures.
        column, row = next(
            (column, row)
            for row, column in itertools.product(range(GRID), repeat=2)
            if (column, row) not in {(thing.column, thing.row) for thing in scene.things}
        )
        shape = next(iter(set(SHAPES) - {thing.shape for thing in scene.things}))
        other = Scene(
            scene.background,
            scene.pattern,
            (Thing(shape, "red", "small", "plain", column, row),),
        )
        pictures = np.asarray(render(scene)).copy(), np.asarray(render(other)).copy()
        for box in (*boxes(scene), *boxes(other)):
            for picture in pictures:
                picture[box[1] : box[3], box[0] : box[2]] = 0
        np.testing.assert_array_equal(*pictures)


def _small(thing, background="gray", pattern="plain"):
    picture = render(Scene(background, pattern, (thing,)))
    return np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC), np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_textures_show_at_64_pixels(shape, size):
    """Within a thing, a texture varies the brightness by far more than plain paint does."""

    def contrast(texture):
        thing = Thing(shape, "green", size, texture, 1, 1)
        scene = Scene("gray", "plain", (thing,))
        left, top, right, bottom = (edge * 64 / 224 for edge in boxes(scene)[0])
        inside = _small(thing)[round(top) : round(bottom), round(left) : round(right)]
        return inside.min(axis=2).max(), inside.max(axis=2).min()

    plain, striped, dotted = map(contrast, TEXTURES)
    background = 158  # of gray; only stripes are lighter in every channel
    assert striped[0] > background + 30 > plain[0]
    assert dotted[1] < 110 or dotted[1] < plain[1] - 25


def test_patterns_show_at_64_pixels():
    for background in BACKGROUNDS:
        plain, checkered, shaded = (_small(THING, background, name) for name in PATTERNS)
        assert np.abs(checkered - plain)[:20].mean() > 4
        assert (shaded[:8] - shaded[-8:]).mean() > 20


def test_a_picture_needs_64_pixels():
    with pytest.raises(ValueError, match="at least 64"):
        render(sample_scene(0), 32)
