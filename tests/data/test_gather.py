"""read_groups: records of one prompt gathered; contradictions, doubles, ties and scores that differ."""

from __future__ import annotations

from pathlib import Path

from mmrlhf.data.readers import read_groups
from records import (
    PAIR,
    edges,
    parquet,
    rlhf_v_row,
    texts,
    write,
)

BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm_reward_bench.jsonl"


def test_contradictions_cancel_and_are_counted(tmp_path):
    flipped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    more = {**PAIR, "rejected": "A fish."}
    found = read_groups(write(tmp_path / "x.jsonl", PAIR, flipped, PAIR, more))
    (group,) = found.groups
    assert [(texts(group)[b], texts(group)[w]) for b, w in edges(group)] == [("A cat.", "A fish.")]
    assert found.contradictions == 2  # the opposite statement, and the one repeated after it
    alone = read_groups(write(tmp_path / "y.jsonl", PAIR, flipped))
    assert alone.groups == []
    assert [s.split("/")[-1] for s in alone.without_pairs] == ["y.jsonl:1"]


def test_duplicates_count_once_and_ids_stay_unique(tmp_path):
    rows = [PAIR, PAIR, {**PAIR, "prompt": "Other?"}, {**PAIR, "id": "q1~2", "prompt": "Third?"}]
    found = read_groups(write(tmp_path / "x.jsonl", *rows))
    assert found.duplicate_pairs == 1
    assert found.duplicate_ids == 1
    assert sorted(g.id for g in found.groups) == ["q1", "q1~2", "q1~3"]
    anonymous = {k: v for k, v in PAIR.items() if k != "id"}
    ids = [read_groups(write(tmp_path / "y.jsonl", anonymous)).groups[0].id for _ in range(2)]
    assert ids[0] == ids[1] != ""


def test_scores_that_differ_between_rows_keep_each_rows_margin(tmp_path):
    base = {**PAIR, "score_chosen": 5.0, "score_rejected": 2.0}
    other = {**PAIR, "rejected": "A fish.", "score_chosen": 3.0, "score_rejected": 2.5}
    (group,) = read_groups(write(tmp_path / "x.jsonl", base, other)).groups
    assert [p.margin for p in group.preference_pairs()] == [3.0, 0.5]
    assert [r.score for r in group.responses] == [None, 2.0, 2.5]


def test_a_ranking_that_meets_another_becomes_pairs(tmp_path):
    one = {"prompt": "What?", "responses": ["a", "b", "c"], "ranking": "1>2>3"}
    two = {"prompt": "What?", "responses": ["b", "d"], "ranking": "1>2"}
    (group,) = read_groups(write(tmp_path / "x.jsonl", one, two)).groups
    assert texts(group) == ["a", "b", "c", "d"]
    assert edges(group) == [(0, 1), (0, 2), (1, 2), (1, 3)]


def test_ties_give_no_pair_and_no_error(tmp_path):
    rows = [
        {"id": "tied", "prompt": "1", "responses": ["a", "b"], "ranking": "1=2"},
        {"id": "fine", "prompt": "2", "responses": ["a", "b"], "ranking": "1>2"},
    ]
    found = read_groups(write(tmp_path / "x.jsonl", *rows))
    assert [g.id for g in found.groups] == ["fine"]
    assert len(found.without_pairs) == 1
    marked = read_groups(write(tmp_path / "y.jsonl", {**PAIR, "is_tie": True}, {**PAIR, "prompt": "2"}))
    assert (marked.tied_pairs, len(marked.groups), len(marked.bad_rows)) == (1, 1, 0)


def test_equal_images_are_held_once(tmp_path, picture):
    rows = [rlhf_v_row(picture, i, chosen=f"answer {i}") for i in range(3)]
    for row in rows[1:]:
        row["text"] = row["text"].replace("Describe.", f"Describe {row['idx']}.")
    groups = read_groups(parquet(tmp_path / "x.parquet", rows)).groups
    assert len(groups) == 3
    assert len({id(g.images[0].data) for g in groups}) == 1
