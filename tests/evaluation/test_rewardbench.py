"""RewardBench: ACC over pairs, ACC+ over queries, by category; VL-RewardBench's overall and macro are two figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmrlhf.evaluation import rewardbench
from mmrlhf.evaluation.figures import bench_figures
from tiny import tiny_image

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm_reward_bench.jsonl"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(query: str, chosen: str, rejected: str, image: str = "long/1.png", **more) -> dict:
    return {"id": query, "image": image, "prompt": f"p {query}", "chosen": chosen, "rejected": rejected, **more}


def test_by_hand(tmp_path):
    """Two queries of one category and one of another; one tie, which is wrong."""
    rows = [
        row("a", "3", "1"),
        row("a", "2", "1"),
        row("b", "1", "2"),
        row("b", "5", "1"),
        row("c", "4", "4 ", "mcq/x.png"),
    ]
    pairs, bad = rewardbench.read_comparisons(write(tmp_path / "b.jsonl", rows))
    scores = rewardbench.score_comparisons(pairs, lambda prompt, images, response: float(response))
    result = rewardbench.measure(pairs, scores)
    assert bad == []
    assert (result.pairs.right, result.pairs.of, result.queries.right, result.queries.of) == (3, 5, 1, 3)
    assert result.accuracy == 3 / 5
    assert result.all_right == 1 / 3
    assert result.ties == 1
    assert result.wrong == ("b#0", "c#0")
    assert list(result.categories) == ["mcq", "long"]
    assert [share.right for share in result.categories["long"]] == [3, 1]
    assert result.macro == (0 / 1 + 3 / 4) / 2
    figures = {f.metric: f for f in bench_figures(result, benchmark="mm_rlhf")}
    assert figures["ACC"].value == 60
    assert "1 pairs have equal rewards" in figures["ACC"].note
    assert figures["ACC+ long"].count == 2


def test_the_published_file_with_a_scorer_of_length():
    """170 pairs, 46 queries; the figures against a computation that shares nothing with the one under test."""
    if not PUBLISHED.exists():
        pytest.skip(f"{PUBLISHED} is not there")
    pairs, _ = rewardbench.read_comparisons(PUBLISHED)
    scores = rewardbench.score_comparisons(pairs, lambda prompt, images, response: len(response))
    result = rewardbench.measure(pairs, scores)
    raw = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    right = [len(r["chosen"]) > len(r["rejected"]) for r in raw]
    ids = sorted({r["id"] for r in raw})
    perfect = [i for i in ids if all(ok for r, ok in zip(raw, right, strict=True) if r["id"] == i)]
    assert (len(pairs), result.queries.of) == (170, 46)
    assert (result.pairs.right, result.queries.right) == (sum(right), len(perfect))
    for category in ("mcq", "long", "short", "safety", "video"):
        own = [
            (r["id"], ok)
            for r, ok in zip(raw, right, strict=True)
            if (r.get("image") or r["video"]).startswith(category)
        ]
        of_pairs, of_queries = result.categories[category]
        assert (of_pairs.right, of_pairs.of) == (sum(ok for _, ok in own), len(own))
        names = {name for name, _ in own}
        assert of_queries.of == len(names)
        assert of_queries.right == sum(all(ok for name, ok in own if name == wanted) for wanted in names)
    assert [of.of for of, _ in result.categories.values()] == [42, 37, 34, 32, 25]


def test_a_response_is_scored_once_a_query_and_pictures_are_opened(tmp_path):
    (tmp_path / "long").mkdir()
    tiny_image(20, 10).save(tmp_path / "long" / "1.png")
    pairs, _ = rewardbench.read_comparisons(
        write(tmp_path / "b.jsonl", [row("a", "best", "bad"), row("a", "best", "worse"), row("z", "best", "bad")])
    )
    asked = []

    def scorer(prompt, images, response):
        asked.append((prompt, [image.size for image in images], response))
        return len(asked)

    rewardbench.score_comparisons(pairs, scorer, root=tmp_path)
    size = [(20, 10)]
    assert asked == [
        ("p a", size, "best"),
        ("p a", size, "bad"),
        ("p a", size, "worse"),
        ("p z", size, "best"),
        ("p z", size, "bad"),
    ]


@dataclass
class Scored:
    index: int
    scores: tuple[float, ...]


def test_groups_for_a_reward_model_in_any_order(tmp_path):
    rows = [row("a", "aaa", "a"), row("b", "b", "bb"), row("a", "aa", "a")]
    pairs, _ = rewardbench.read_comparisons(write(tmp_path / "b.jsonl", rows))

    def score(groups):
        assert [[r.text for r in g.responses] for g in groups] == [["aaa", "a", "aa"], ["b", "bb"]]
        assert [[(p.better, p.worse) for p in g.preference_pairs()] for g in groups] == [[(0, 1), (2, 1)], [(0, 1)]]
        for index in (1, 0):
            yield Scored(index, tuple(float(len(r.text)) for r in groups[index].responses))

    scores = rewardbench.score_by_groups(pairs, score)
    assert scores == {"a#0": (3, 1), "b#0": (1, 2), "a#1": (2, 1)}
    with pytest.raises(ValueError, match="1 pairs have none"):
        rewardbench.measure(pairs, rewardbench.score_by_groups(pairs, lambda groups: list(score(groups))[1:]))


def test_pictures_stand_where_the_prompt_has_them(tmp_path):
    prompt = {"prompt": "see <image> here"}
    fitting, _ = rewardbench.read_comparisons(write(tmp_path / "c.jsonl", [row("a", "x", "y") | prompt]))
    ((group, _),) = rewardbench.as_groups(fitting)
    assert [part.type for part in group.prompt[0].content] == ["text", "image", "text"]


def test_the_data_s_critiques_reach_the_reward_model(tmp_path):
    """`--critic given` on MM-RLHF-RewardBench, the paper's last column; a reason stands in one row of several."""
    rows = [row("a", "x", "y", chosen_reason="right"), row("a", "x", "z", chosen_reason="", rejected_reason="wrong")]
    pairs, _ = rewardbench.read_comparisons(write(tmp_path / "b.jsonl", rows))
    ((group, _),) = rewardbench.as_groups(pairs)
    assert [(r.text, r.critique) for r in group.responses] == [("x", "right"), ("y", None), ("z", "wrong")]


def test_one_id_for_two_pictures_is_two_questions(tmp_path):
    """A file whose ids are not unique: a response is scored again for another picture."""
    rows = [row("a", "best", "bad"), row("a", "best", "bad", "long/2.png")]
    pairs, _ = rewardbench.read_comparisons(write(tmp_path / "b.jsonl", rows))
    asked = []

    def scorer(prompt, images, response):
        asked.append((images[0].path, response))
        return len(asked)

    scores = rewardbench.score_comparisons(pairs, scorer)
    assert asked == [(f"long/{n}.png", response) for n in (1, 2) for response in ("best", "bad")]
    assert scores == {"a#0": (1, 2), "a#1": (3, 4)}


def test_scores_from_a_file_by_pair_or_in_the_order_of_a_query(tmp_path):
    pairs, _ = rewardbench.read_comparisons(write(tmp_path / "b.jsonl", [row("a", "x", "y"), row("a", "v", "w")]))
    listed = write(tmp_path / "s.jsonl", [{"id": "a", "rewards": [2, 1]}, {"id": "a", "rewards": [0, 1]}])
    assert rewardbench.read_scores(listed) == {"a#0": (2, 1), "a#1": (0, 1)}
    named = write(
        tmp_path / "t.jsonl",
        [{"id": "a#1", "chosen_score": 0, "rejected_score": 1}, {"id": "a#0", "chosen_score": 2, "rejected_score": 1}],
    )
    assert rewardbench.measure(pairs, rewardbench.read_scores(named)).pairs.right == 1
    twice = write(tmp_path / "u.jsonl", [{"id": "a#1", "rewards": [0, 1]}] * 2)
    with pytest.raises(ValueError, match="pair 'a#1' has two rows"):
        rewardbench.read_scores(twice)
    with pytest.raises(ValueError, match="'rewards' must be a list of two numbers"):
        rewardbench.read_scores(write(tmp_path / "v.jsonl", [{"id": "a", "rewards": [1]}]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", "x", "y", "other/1.png")], "no category: none of mcq, long, short, safety, video"),
        ([row("a", "x", "")], "'rejected' is empty"),
        ([{**row("a", "x", "y"), "prompt": None}], "'prompt', 'question'"),
        ([row("a", "x", "y", "../long/1.png")], "climbs out"),
        ([row("a", "x", "y") | {"prompt": "<image> and <image>"}], "2 image placeholders for 1 images"),
        ([row("a", "x", "y") | {"prompt": None, "question": " "}], "'question' is only whitespace"),
        ([row("a", "x", "y", category=3)], "'category' must be str, got int"),
        ([row("a", "x", "y", chosen_reason=["r"])], "chosen_reason must be str, got list"),
    ],
)
def test_bad_rows_are_named(rows, message, tmp_path):
    path = write(tmp_path / "b.jsonl", [row("good", "x", "y"), *rows])
    with pytest.raises(ValueError, match=message) as caught:
        rewardbench.read_comparisons(path)
    assert "b.jsonl:2" in str(caught.value)
    pairs, bad = rewardbench.read_comparisons(path, on_bad_row="skip")
    assert ([p.id for p in pairs], len(bad)) == (["good#0"], 1)


def test_rewards_that_are_no_numbers_are_named(tmp_path):
    pairs, _ = rewardbench.read_comparisons(write(tmp_path / "b.jsonl", [row("a", "x", "y")]))
    with pytest.raises(ValueError, match=r"reward of pair a#0 .* must be finite, got nan"):
        rewardbench.score_comparisons(pairs, lambda *_: float("nan"))
    with pytest.raises(ValueError, match="1 scores have no pair"):
        rewardbench.measure(pairs, {"a#0": (1, 0), "b#0": (1, 0)})
    with pytest.raises(ValueError, match="pairs must not be empty"):
        rewardbench.measure([], {})


def test_vl_rewardbench(tmp_path):
    """Ranks decide which response is the better; three groups of different size, so that the two means differ."""

    def vl(name, ranking, source):
        return {
            "id": name,
            "query": "q",
            "image": {"bytes": None, "path": "x.png"},
            "response": ["long one", "short"],
            "human_ranking": ranking,
            "query_source": source,
        }

    rows = [
        vl("1", [0, 1], "WildVision"),
        vl("2", [1, 0], "povid"),
        vl("3", [0, 1], "RLAIF-V"),
        vl("4", [0, 1], "MathVerse"),
    ]
    pairs, _ = rewardbench.read_comparisons(write(tmp_path / "v.jsonl", rows), benchmark="vl")
    assert [p.chosen for p in pairs] == ["long one", "short", "long one", "long one"]
    result = rewardbench.measure(pairs, rewardbench.score_comparisons(pairs, lambda p, i, response: len(response)))
    assert result.accuracy == 3 / 4
    assert result.macro == pytest.approx((1 + 1 / 2 + 1) / 3)
    figures = {f.metric: f.value for f in bench_figures(result, benchmark="vl")}
    assert figures == {
        "overall accuracy": 75,
        "macro average": pytest.approx(250 / 3),
        "general": 100,
        "hallucination": 50,
        "reasoning": 100,
    }
    with pytest.raises(ValueError, match=r"'human_ranking' must be \[0, 1\] or \[1, 0\], got \[1, 1\]"):
        rewardbench.read_comparisons(write(tmp_path / "w.jsonl", [vl("1", [1, 1], "povid")]), benchmark="vl")
