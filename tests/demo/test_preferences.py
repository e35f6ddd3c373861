"""What is written in the published forms comes back through the readers as it was meant."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest

from mmrlhf.data.images import open_image
from mmrlhf.data.readers import read_groups
from mmrlhf.demo.language import QUESTION, correct, parse, score
from mmrlhf.demo.pipeline import load_base
from mmrlhf.demo.preferences import corrected_group, make_preferences, ranked_group
from mmrlhf.demo.world import Kind, Scene, Thing, draw, make_scenes

SCENE = Scene("kitchen", (Thing(Kind("blue", "square"), 0, 8.0, 8.0, 6.0),), 0.5, (0, 0, 0))
RIGHT = "In this kitchen there is a blue square."
WRONG = "In this kitchen there is a blue square and a red circle."
WORSE = "In this beach there is a red circle."


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    scenes = make_scenes(30, seed=10)
    model, tokenizer = load_base()
    return scenes, make_preferences(model, tokenizer, scenes, tmp_path_factory.mktemp("data"), seed=0)


def test_only_answers_that_need_it_are_corrected():
    assert corrected_group(SCENE, [RIGHT, RIGHT], id="a", picture="a.png") is None
    group = corrected_group(SCENE, [RIGHT, WRONG, WORSE], id="a", picture="a.png")
    assert [response.text for response in group.responses] == [RIGHT, WRONG]
    assert [(pair.better, pair.worse) for pair in group.preference_pairs()] == [(0, 1)]


def test_lists_are_ranked_with_margins_and_without_repeats():
    assert ranked_group(SCENE, [RIGHT, RIGHT], id="a", picture="a.png") is None
    group = ranked_group(SCENE, [WORSE, WRONG, RIGHT, WRONG], id="a", picture="a.png")
    assert [(r.text, r.score, r.rank) for r in group.responses] == [(RIGHT, 1, 1), (WRONG, -1, 2), (WORSE, -3, 3)]
    assert [pair.margin for pair in group.preference_pairs()] == [2.0, 4.0, 2.0]
    assert "red circle is not in the picture" in group.responses[1].critique


def test_corrected_answers_come_back_from_the_parquet(made):
    scenes, data = made
    groups = read_groups(data.corrected, root=data.root).groups
    assert len(groups) == data.corrected_groups > 5
    columns = pyarrow.parquet.read_schema(data.corrected).names
    assert {"ds_name", "image", "text", "origin_dataset", "origin_split", "idx", "image_path"} <= set(columns)
    pictures = [np.asarray(draw(scene)).tobytes() for scene in scenes]
    for group in groups:
        scene = scenes[pictures.index(np.asarray(open_image(group.images[0], data.root)).tobytes())]
        pair = group.preference_pairs()[0]
        chosen, rejected = group.responses[pair.better].text, group.responses[pair.worse].text
        assert correct(rejected, scene) == chosen != rejected
        assert QUESTION in "".join(part.text for message in group.prompt for part in message.content)


def test_ranked_lists_come_back_with_their_scores(made):
    scenes, data = made
    groups = read_groups(data.ranked, root=data.root).groups
    assert len(groups) == data.ranked_groups > 3
    assert sum(len(group.preference_pairs()) for group in groups) == data.ranked_pairs
    for group in groups:
        scene = scenes[int(group.id.removeprefix("scene-"))]
        for response in group.responses:
            assert response.score == score(response.text, scene)
        for pair in group.preference_pairs():
            assert pair.margin == group.responses[pair.better].score - group.responses[pair.worse].score > 0


def test_the_pairs_file_has_the_published_keys(made):
    _, data = made
    rows = [json.loads(line) for line in data.dpo_pairs.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == data.ranked_pairs
    for row in rows:
        assert {"id", "image", "prompt", "chosen", "rejected"} <= set(row)
        assert (data.root / row["image"]).is_file()
    read = read_groups(data.dpo_pairs, root=data.root).groups
    assert sum(len(group.preference_pairs()) for group in read) == data.ranked_pairs


def test_the_same_seed_makes_the_same_data(made, tmp_path):
    scenes, data = made
    again = make_preferences(*load_base(), scenes, tmp_path, seed=0)
    assert again.ranked.read_bytes() == data.ranked.read_bytes()
    assert again.dpo_pairs.read_bytes() == data.dpo_pairs.read_bytes()


def test_most_samples_are_sentences(made):
    _, data = made
    texts = [response.text for group in read_groups(data.ranked, root=data.root).groups for response in group.responses]
    assert np.mean([parse(text) is not None for text in texts]) > 0.9
