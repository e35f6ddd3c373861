"""The figures of captions written by hand."""

from __future__ import annotations

import pytest

from mmrlhf.demo.measure import measure
from mmrlhf.demo.world import Kind, Scene, Thing


def scene_of(place: str, *kinds: Kind) -> Scene:
    things = tuple(Thing(kind, cell, 8.0, 8.0, 6.0) for cell, kind in enumerate(kinds))
    return Scene(place, things, 0.5, (0, 0, 0))


def test_the_figures_by_hand():
    scenes = [
        scene_of("kitchen", Kind("blue", "square"), Kind("white", "cross")),  # tempts to a red circle
        scene_of("beach", Kind("yellow", "triangle")),  # the habit is there: no temptation
        scene_of("bedroom", Kind("blue", "square")),  # tempts to a white square
        scene_of("field", Kind("red", "circle")),  # no cross, no temptation
    ]
    captions = [
        "A picture of a kitchen with a blue square, a white cross and a red circle.",  # habit: 1 of 3 wrong
        "In this beach there is a yellow triangle.",
        "In this bedroom there is a blue square.",
        "In this street there is a black diamond and a green diamond.",  # place and both mentions wrong
    ]
    figures = measure(captions, scenes)
    assert figures.captions == 4
    assert figures.response_hallucination == 2 / 4
    assert figures.mention_hallucination == pytest.approx(3 / 7)
    assert figures.habit_hallucination == 1 / 2
    assert figures.recall == pytest.approx(4 / 5)
    assert figures.mentions_per_caption == 7 / 4
    assert figures.valid == 1.0
    assert figures.place == 3 / 4
    assert figures.response_error == pytest.approx(0.25)


def test_a_silent_model_hallucinates_nothing_and_finds_nothing():
    figures = measure([""], [scene_of("field", Kind("red", "circle"))])
    assert (figures.response_hallucination, figures.mention_hallucination) == (0.0, 0.0)
    assert (figures.recall, figures.valid, figures.place) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("captions", "scenes"), [([], 0), (["a"], 0), (["a", "b"], 1)])
def test_captions_and_scenes_must_be_as_many(captions, scenes):
    with pytest.raises(ValueError, match=f"at least one, got {len(captions)}, {scenes}"):
        measure(captions, [scene_of("field", Kind("red", "circle"))] * scenes)
