"""`pairs` modes where the file lists its pairs itself: MM-RLHF's dpo_pairs.jsonl, TRL rows, our own `pairs`."""

from __future__ import annotations

import json

import pytest

from mmrlhf.data.check import check
from mmrlhf.data.collate import PreferenceDataset
from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import BadRow
from records import CONVERSATIONAL, PAIR, write

ANSWERS = ("cat", "dog", "fish", "bird")
DIAMOND = ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))  # one best, two in the middle never compared, one worst
CHAIN = ((0, 1), (0, 2), (1, 2))
CIRCLE = ((0, 1), (1, 2), (2, 0))


def listed(path, edges, kind="mm_rlhf"):
    """A file of one prompt whose rows list `edges`."""
    if kind == "mmrlhf":
        return write(path, {"prompt": "What?", "responses": list(ANSWERS), "pairs": [list(e) for e in edges]})
    if kind == "mm_rlhf":
        made = ({**PAIR, "chosen": ANSWERS[a], "rejected": ANSWERS[b]} for a, b in edges)
        return write(path, *({k: v for k, v in row.items() if k != "image"} for row in made))
    plain = {**CONVERSATIONAL, "images": [], "prompt": [{"role": "user", "content": "What?"}]}
    turn = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return write(path, *({**plain, "chosen": turn(ANSWERS[a]), "rejected": turn(ANSWERS[b])} for a, b in edges))


def named(group, mode):
    """The pairs of a group as the places of their words in ANSWERS (readers number responses as they come)."""
    place = [ANSWERS.index(r.text) for r in group.responses]
    return sorted((place[p.better], place[p.worse]) for p in group.preference_pairs(mode))


@pytest.mark.parametrize("kind", ["mm_rlhf", "trl", "mmrlhf"])
@pytest.mark.parametrize(
    ("edges", "adjacent", "best"),
    [
        (DIAMOND, [(0, 1), (0, 2), (1, 3), (2, 3)], [(0, 1), (0, 2), (0, 3)]),
        (CHAIN, [(0, 1), (1, 2)], [(0, 1), (0, 2)]),
        (((0, 1), (2, 3)), [(0, 1), (2, 3)], [(0, 1), (2, 3)]),  # two bests: nothing beats either
        (((0, 1), (1, 2)), [(0, 1), (1, 2)], [(0, 1)]),
        (CIRCLE, sorted(CIRCLE), []),
    ],
    ids=["diamond", "chain", "apart", "unclosed", "circle"],
)
def test_modes_hold_for_listed_pairs(tmp_path, kind, edges, adjacent, best):
    found = read_groups(listed(tmp_path / "dpo_pairs.jsonl", edges, kind))
    assert found.format == kind
    (group,) = found.groups
    assert named(group, "all") == sorted(edges)
    assert named(group, "adjacent") == adjacent
    assert named(group, "best_vs_rest") == best


def test_margins_stay_with_the_pairs_that_are_kept(tmp_path):
    row = {"prompt": "What?", "responses": ["a", "b", "c"], "pairs": [[0, 2, 5.0], [1, 2, 3.0], [0, 1, 2.0]]}
    (group,) = read_groups(write(tmp_path / "x.jsonl", row)).groups
    margins = {mode: [p.margin for p in group.preference_pairs(mode)] for mode in ("adjacent", "best_vs_rest")}
    assert margins == {"adjacent": [3.0, 2.0], "best_vs_rest": [5.0, 2.0]}


def test_encoder_and_check_use_the_mode(tmp_path, encoder):
    path = listed(tmp_path / "dpo_pairs.jsonl", DIAMOND)
    (group,) = read_groups(path).groups
    for mode, count in (("all", 5), ("adjacent", 4), ("best_vs_rest", 3)):
        assert encoder(pairs=mode).encode(group).num_pairs == count
        report = check(path, pairs=mode)
        assert (report.pairs, report.response_slots, report.status) == (count, 2 * count, 0)
    assert len({encoder(pairs=mode).row_hash(group) for mode in ("all", "adjacent", "best_vs_rest")}) == 3
    with pytest.raises(ValueError, match="pairs must be one of all, adjacent, best_vs_rest, got 'some'"):
        check(path, pairs="some")


def test_a_circle_without_a_best_is_named(tmp_path, encoder, processor):
    path = listed(tmp_path / "dpo_pairs.jsonl", CIRCLE)
    (group,) = read_groups(path).groups
    message = "no preference pair: the 3 listed pairs go in a circle, so that pairs=best_vs_rest keeps none"
    with pytest.raises(BadRow, match=message):
        encoder(pairs="best_vs_rest").encode(group)
    assert len(PreferenceDataset([group], encoder(pairs="best_vs_rest"), on_bad_row="skip", max_bad_rows=1.0)) == 0
    for given in (None, processor("qwen2_vl")):  # named once, with a processor or without
        report = check(path, pairs="best_vs_rest", processor=given)
        assert [row.reason for row in report.bad_rows] == [message]
        assert report.status == 1
    assert check(path, processor=processor("qwen2_vl")).bad_rows == []


def test_check_counts_scores_that_say_the_opposite(tmp_path):
    rows = [
        {**PAIR, "chosen_score": 1.0, "rejected_score": 2.0},
        {**PAIR, "id": "q2", "prompt": "Else?", "chosen_score": 2.0, "rejected_score": 1.0},
        {**PAIR, "id": "q3", "prompt": "More?"},
    ]
    report = check(write(tmp_path / "x.jsonl", *rows))
    assert (report.margins, report.contradicting_margins) == (2, 1)
    assert "1 pairs whose scores say the opposite" in report.text()
    ranked = {"prompt": "R?", "responses": [{"text": t, "rank": r, "score": r} for t, r in (("a", 1), ("b", 2))]}
    report = check(write(tmp_path / "y.jsonl", ranked))
    assert report.contradicting_margins == 1
    assert "say the opposite" not in check(write(tmp_path / "z.jsonl", json.loads(json.dumps(PAIR)))).text()
