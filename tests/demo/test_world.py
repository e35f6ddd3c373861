"""The world follows from its seed, and what is drawn is what the scene says."""

from __future__ import annotations

import numpy as np
import pytest

from mmrlhf.demo.world import (
    CELL,
    COLOUR_HABITS,
    COLOURS,
    GRID,
    HABIT_PRESENT,
    HABITS,
    PLACES,
    SIZE,
    Kind,
    Scene,
    Thing,
    draw,
    make_scenes,
    pixels,
)


def test_the_same_seed_gives_the_same_world_and_a_longer_one_begins_with_it():
    assert make_scenes(20, seed=3) == make_scenes(30, seed=3)[:20]
    assert make_scenes(20, seed=3) != make_scenes(20, seed=4)
    np.testing.assert_array_equal(pixels(make_scenes(5, seed=3)), pixels(make_scenes(5, seed=3)))


def test_scenes_keep_the_rules_of_the_world():
    scenes = make_scenes(500, seed=0)
    for scene in scenes:
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells))
        assert len(set(scene.kinds)) == len(scene.kinds) in (1, 2, 3, 4)
        for thing in scene.things:
            assert (int(thing.y // CELL) * GRID + int(thing.x // CELL)) == thing.cell
    assert {scene.place for scene in scenes} == set(PLACES) == set(HABITS) | set(COLOUR_HABITS)


@pytest.mark.parametrize("place", HABITS)
def test_the_habit_is_there_as_often_as_stated(place):
    """1/6 of 6000 scenes: the standard error of the share is .0145, so .05 is more than three of them."""
    here = [scene for scene in make_scenes(6000, seed=1) if scene.place == place]
    share = np.mean([HABITS[place] in scene.kinds for scene in here])
    assert abs(share - HABIT_PRESENT) < 0.05


@pytest.mark.parametrize(
    ("place", "kinds", "temptation"),
    [
        ("kitchen", [Kind("blue", "square")], Kind("red", "circle")),
        ("kitchen", [Kind("red", "circle")], None),
        ("bedroom", [Kind("blue", "square")], Kind("white", "square")),
        ("bedroom", [Kind("blue", "circle")], None),
        ("bedroom", [Kind("blue", "square"), Kind("white", "square")], None),
    ],
)
def test_temptation_is_the_habit_where_it_is_not(place, kinds, temptation):
    things = tuple(Thing(kind, cell, 8.0, 8.0, 6.0) for cell, kind in enumerate(kinds))
    assert Scene(place, things, 0.5, (0, 0, 0)).temptation == temptation


@pytest.mark.parametrize("scale", [1, 3])
def test_a_picture_shows_each_object_in_its_place(scale):
    for scene in make_scenes(40, seed=9):
        picture = np.asarray(draw(scene, scale=scale))
        assert picture.shape == (SIZE * scale, SIZE * scale, 3)
        for thing in scene.things:
            centre = picture[int(thing.y * scale), int(thing.x * scale)]
            np.testing.assert_allclose(centre, COLOURS[thing.kind.colour], atol=1)


def test_pixels_are_the_pictures_channels_first():
    scenes = make_scenes(3, seed=2)
    assert pixels([]).shape == (0, 3, SIZE, SIZE)
    np.testing.assert_array_equal(pixels(scenes)[2].transpose(1, 2, 0), np.asarray(draw(scenes[2])))


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count must be 0 or more, got -1"):
        make_scenes(-1, seed=0)
