"""The grammar and its parser agree; the oracle corrects what is wrong and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrlhf.demo.language import (
    Caption,
    correct,
    critique,
    list_kinds,
    mentions,
    parse,
    place_named,
    score,
    wrong_spans,
)
from mmrlhf.demo.world import KINDS, PLACES, Kind, Scene, Thing, make_scenes

RED_CIRCLE, BLUE_SQUARE, WHITE_CROSS = Kind("red", "circle"), Kind("blue", "square"), Kind("white", "cross")


def scene_of(place: str, *kinds: Kind) -> Scene:
    things = tuple(Thing(kind, cell, 8.0, 8.0, 6.0) for cell, kind in enumerate(kinds))
    return Scene(place, things, 0.5, (0, 0, 0))


captions = st.builds(
    Caption,
    st.sampled_from(list(PLACES)),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6).map(tuple),
    st.integers(0, 1),
)
scenes = st.integers(0, 10_000).map(lambda seed: make_scenes(1, seed=seed)[0])


@given(captions)
def test_what_is_said_is_what_is_parsed(caption):
    text = str(caption)
    assert parse(text) == caption
    assert mentions(text) == list(caption.kinds)
    assert place_named(text) == caption.place


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A picture of a kitchen.",
        "A picture of a kitchen with a red circle",
        "A picture of a kitchen with a red circle, a blue square.",
        "A picture of a kitchen with a red circle and a blue square and a white cross.",
        "A picture of a moon with a red circle.",
        "In this kitchen there is a red circle.\n",
        "In this kitchen there is a red circle. In this kitchen there is a red circle.",
    ],
)
def test_what_is_outside_the_grammar_is_not_parsed(text):
    assert parse(text) is None


def test_an_empty_list_cannot_be_said():
    with pytest.raises(ValueError, match="kinds must not be empty"):
        list_kinds([])


@settings(max_examples=200)
@given(captions, scenes)
def test_a_correction_is_true_and_needs_no_second_one(caption, scene):
    corrected = parse(correct(str(caption), scene))
    assert corrected is not None
    assert corrected.place == scene.place
    assert corrected.template == caption.template
    assert set(corrected.kinds) <= set(scene.kinds)
    assert len(set(corrected.kinds)) == len(corrected.kinds)
    kept = [kind for kind in dict.fromkeys(caption.kinds) if kind in scene.kinds]
    assert [kind for kind in corrected.kinds if kind in kept] == kept
    assert correct(str(corrected), scene) == str(corrected)
    assert score(str(corrected), scene) >= score(str(caption), scene)


@pytest.mark.parametrize(
    ("text", "corrected"),
    [
        (  # nothing left to name instead: the wrong mention goes
            "A picture of a kitchen with a blue square, a white cross and a red circle.",
            "A picture of a kitchen with a blue square and a white cross.",
        ),
        (  # an object is still unnamed: it takes the place of the wrong one
            "In this kitchen there is a red circle and a white cross.",
            "In this kitchen there is a blue square and a white cross.",
        ),
        (
            "In this beach there is a blue square, a blue square and a white cross.",
            "In this kitchen there is a blue square and a white cross.",
        ),
        ("a circle circle", "A picture of a kitchen with a blue square and a white cross."),
    ],
)
def test_corrections_by_hand(text, corrected):
    assert correct(text, scene_of("kitchen", BLUE_SQUARE, WHITE_CROSS)) == corrected


@pytest.mark.parametrize(
    ("text", "points", "reason"),
    [
        ("In this kitchen there is a blue square and a white cross.", 2, "Everything in the picture is named"),
        ("In this kitchen there is a blue square.", 1, "It does not name a white cross."),
        ("In this kitchen there is a blue square and a red circle.", -1, "A red circle is not in the picture;"),
        ("In this street there is a blue square and a white cross.", 1, "The place is a kitchen."),
        ("In this kitchen there is a blue square and a blue square.", 0, "It does not name a white cross."),
        ("blue square", -2, "It is not a whole sentence; the place is a kitchen;"),
    ],
)
def test_scores_and_their_reasons_by_hand(text, points, reason):
    scene = scene_of("kitchen", BLUE_SQUARE, WHITE_CROSS)
    assert score(text, scene) == points
    assert critique(text, scene).startswith(reason)


def test_wrong_spans_point_at_the_wrong_words():
    text = "In this kitchen there is a red circle, a blue square and a white cross."
    found = [text[start:stop] for start, stop in wrong_spans(text, scene_of("kitchen", BLUE_SQUARE))]
    assert found == ["red circle", "white cross"]
