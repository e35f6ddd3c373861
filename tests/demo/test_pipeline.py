"""The whole demo on a few pictures, and its page."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from mmrlhf.demo import pipeline, run
from mmrlhf.demo.measure import measure
from mmrlhf.demo.page import choose as choose_pictures
from mmrlhf.demo.page import mark_changes, mark_wrong
from mmrlhf.demo.pipeline import Plan, Result, settings
from mmrlhf.demo.preferences import PreferenceData
from mmrlhf.demo.sweep import choose as choose_rate
from mmrlhf.demo.world import Kind, Scene, Thing

SCENE = Scene("kitchen", (Thing(Kind("blue", "square"), 0, 8.0, 8.0, 6.0),), 0.5, (0, 0, 0))
RIGHT = "In this kitchen there is a blue square."
WRONG = "In this kitchen there is a blue square and a red circle."


def result_of(captions: list[str]) -> Result:
    return Result("base", measure(captions, [SCENE] * len(captions)), captions, 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    threads = torch.get_num_threads()
    assert run(output, quick=True) == 0
    assert torch.get_num_threads() == threads
    return output


def test_the_demo_leaves_everything_it_promises(finished):
    for name in ("data/corrected.parquet", "data/ranked.jsonl", "data/dpo_pairs.jsonl", "results.png", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    for recipe in ("rlhf_v", "mm_dpo"):
        assert (finished / recipe / "report.html").is_file()
        assert (finished / recipe / "model" / "config.json").is_file()
        steps = [json.loads(line) for line in (finished / recipe / "metrics.jsonl").read_text().splitlines()]
        assert len(steps) == Plan.quick().steps
        assert all(math.isfinite(step["loss"]) for step in steps)


def test_the_results_are_all_there(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["quick"] is True
    assert [row["name"] for row in results["results"]] == ["base", "rlhf_v", "mm_dpo", "sft"]
    for row in results["results"]:
        assert row["captions"] == Plan.quick().held_out
        assert 0 <= row["response_hallucination"] <= 1
        assert 0.5 < row["recall"] <= 1


def test_the_page_is_self_contained_and_says_that_the_run_was_quick(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "quick run" in page
    assert page.count("data:image/png;base64,") == Plan.quick().shown + 3  # two corrections and a ranked list
    for outside in ("http://", "https://", "<script", "<link", "@import"):
        assert outside not in page


def test_a_second_demo_takes_the_place_of_the_first_but_of_nothing_else(finished, tmp_path):
    (finished / "data" / "stale").touch()
    pipeline.prepare(finished)
    assert not (finished / "data").exists()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="not an earlier demo's folder"):
        run(tmp_path, quick=True)
    assert (tmp_path / "thesis.tex").exists()


def test_the_recipes_are_those_that_ship(tmp_path):
    data = PreferenceData(tmp_path, tmp_path / "c", tmp_path / "r", tmp_path / "d", 400, 250, 150, 460)
    ddpo = settings("rlhf_v", data, Plan(), tmp_path / "run")
    assert (ddpo.data.segments, ddpo.data.gamma, ddpo.loss.beta, ddpo.loss.reduction) == ("paper", 5.0, 0.5, "mean")
    mm = settings("mm_dpo", data, Plan(), tmp_path / "run")
    assert (mm.loss.beta, mm.loss.beta_mode, mm.loss.w, mm.loss.k, mm.loss.sft_weight) == (
        0.1,
        "margin",
        0.5,
        0.5,
        0.25,
    )
    for made, groups in ((ddpo, 250), (mm, 150)):
        assert made.epochs * groups >= made.max_steps * made.groups_per_step == 960
    with pytest.raises(ValueError, match="recipe must be rlhf_v or mm_dpo, got 'ppo'"):
        settings("ppo", data, Plan(), tmp_path / "run")


def test_the_table_shows_recall_beside_hallucination():
    shown = pipeline.table([result_of([WRONG, RIGHT])])
    assert "50.0 ± 35.4 %" in shown  # captions
    assert "33.3 %" in shown  # mentions
    assert "100.0 %" in shown  # recall


def test_pictures_are_chosen_by_rule():
    before = result_of([RIGHT, WRONG, RIGHT, WRONG, WRONG])
    assert choose_pictures(before, [SCENE] * 5, 3) == [1, 3, 0]


def test_wrong_mentions_are_marked():
    assert mark_wrong(WRONG, SCENE) == [
        ("In this kitchen there is a blue square and a ", ""),
        ("red circle", "wrong"),
        (".", ""),
    ]
    assert mark_wrong(RIGHT, SCENE) == [(RIGHT, "")]


def test_changes_are_marked_on_both_sides():
    gone, new = mark_changes(WRONG, RIGHT)
    assert "".join(text for text, _ in gone) == WRONG
    assert "".join(text for text, _ in new) == RIGHT
    assert [text for text, mark in gone if mark] == ["and a red circle"]
    assert not [text for text, mark in new if mark]


def test_the_learning_rate_is_chosen_by_rule():
    def at(recall: float, wrong: float) -> Result:
        base = result_of([RIGHT])
        return dataclasses.replace(
            base, figures=dataclasses.replace(base.figures, recall=recall, mention_hallucination=wrong)
        )

    assert choose_rate({1e-6: at(0.990, 0.10), 2e-6: at(0.988, 0.05), 3e-6: at(0.950, 0.01)}) == 2e-6
