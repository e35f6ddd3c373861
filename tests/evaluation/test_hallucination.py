"""Objects in texts, CHAIR against a slow count of its own, POPE's two ways to read an answer, MMHal's ratings."""

from __future__ import annotations

import json
import random
from importlib import resources

import pytest

from mmrlhf.evaluation import coco, hallucination, mmhal
from mmrlhf.evaluation.judge import Unparsable
from mmrlhf.evaluation.rows import Question


def named(text: str) -> list[str]:
    return [mention.object for mention in coco.mentions(text)]


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("Two dogs and three puppies run.", ["dog", "dog"]),
        ("A hot dog on a bench", ["hot dog", "bench"]),
        ("hot-dogs, a teddy-bear and a man-made lake", ["hot dog", "teddy bear"]),
        ("The men, women and children; a policeman's buses", ["person"] * 4 + ["bus"]),
        ("knives, mice, geese, calves, oxen, ponies", ["knife", "mouse", "bird", "cow", "cow", "horse"]),
        ("Wine glasses, stop lights and a stove top oven", ["wine glass", "traffic light", "oven"]),
        ("a baby elephant, an adult goose and a baby", ["elephant", "bird", "person"]),
        ("a baby animal", []),
        ("passenger trains and a passenger", ["train", "person"]),
        ("the toilet seat is up", ["toilet"]),
        ("a toilet with a white seat", ["toilet"]),
        ("a seat at the table", ["chair", "dining table"]),
        ("train tracks through a field", []),
        ("He wears a bow tie", ["tie"]),
        ("category, carton, bench's", ["bench"]),
        ("The cat’s bed", ["cat", "bed"]),
        ("", []),
    ],
)
def test_objects_are_found_word_by_word(text, objects):
    assert named(text) == objects


def test_vocabulary_is_the_shipped_list_and_no_word_means_two_things():
    """Each name of the file, and each plural, belongs to one class only, whatever the order of the lines."""
    text = (resources.files("mmrlhf") / "evaluation/data/chair_synonyms.txt").read_text()
    owners: dict[str, set[str]] = {}
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines:
        names = [name.strip().lower() for name in line.split(",")]
        for name in names:
            head, _, last = name.rpartition(" ")
            for form in (last, *coco.plurals(last)):
                owners.setdefault(f"{head} {form}".strip(), set()).add(names[0])
    assert len(lines) == 80
    assert [form for form, classes in owners.items() if len(classes) > 1] == []
    for form, classes in owners.items():
        assert coco.vocabulary().object_of(form) == next(iter(classes)), form
    licence = (resources.files("mmrlhf") / "evaluation/data/chair_synonyms.LICENSE.txt").read_text()
    assert "BSD 2-Clause" in licence
    assert "1809.02156" in licence


def captions_of(objects: list[set[str]]) -> list[hallucination.Caption]:
    return [
        hallucination.Caption(str(i), Question(str(i), "describe"), frozenset(there)) for i, there in enumerate(objects)
    ]


def test_chair_by_hand():
    """Four captions: true; one absent word said twice; nothing named; two absent words of one class."""
    captions = captions_of([{"dog", "person"}, {"cat"}, {"car"}, {"dog"}])
    answers = {
        "0": "A man and his dog.",
        "1": "A cat on a chair by a chair.",
        "2": "Nothing here",
        "3": "A cup, bottles, a dog",
    }
    result = hallucination.chair(captions, answers)
    assert (result.captions, result.with_objects, result.mentions) == (4, 3, 7)
    assert result.chair_s == 2 / 4
    assert result.chair_s_refine == 2 / 3
    assert result.chair_i == 3 / 7
    assert result.recall == 4 / 5
    assert result.words_per_caption == (5 + 8 + 2 + 5) / 4
    assert result.absent == {"1": ("chair",), "3": ("cup", "bottle")}
    each = hallucination.chair(captions, answers, count="mentions")
    assert (each.mentions, each.chair_i) == (8, 4 / 8)
    assert (each.chair_s, each.recall) == (result.chair_s, result.recall)


@pytest.mark.parametrize("count", ["words", "mentions"])
def test_chair_against_a_slow_count(count):
    """Random captions of known objects; every figure recomputed with loops over the objects themselves."""
    rng = random.Random(5)
    kinds = ["dog", "cat", "car", "bench", "kite", "cup", "bed", "clock"]
    said = [[rng.choice(kinds) for _ in range(rng.randint(0, 6))] for _ in range(60)]
    there = [set(rng.sample(kinds, rng.randint(1, 5))) for _ in said]
    plural = rng.choices([True, False], k=500)
    answers = {
        str(i): " and ".join(k + "s" * plural.pop() if k != "bench" else k for k in row) for i, row in enumerate(said)
    }
    result = hallucination.chair(captions_of(there), answers, count=count)
    counted = [row if count == "mentions" else sorted(set(row)) for row in said]
    bad = [[k for k in row if k not in have] for row, have in zip(counted, there, strict=True)]
    assert result.chair_s == sum(bool(b) for b in bad) / 60
    assert result.chair_s_refine == sum(bool(b) for b in bad) / sum(bool(row) for row in said)
    assert result.chair_i == sum(map(len, bad)) / sum(map(len, counted))
    assert result.recall == sum(len(set(r) & h) for r, h in zip(said, there, strict=True)) / sum(map(len, there))


def test_chair_divides_by_nothing_nowhere():
    result = hallucination.chair(captions_of([set()]), {"0": "Only words."})
    assert (result.chair_s, result.chair_s_refine, result.chair_i, result.recall) == (0, None, None, None)
    with pytest.raises(ValueError, match="1 captions have no answer: 0"):
        hallucination.chair(captions_of([set()]), {})
    with pytest.raises(ValueError, match="count must be words or mentions"):
        hallucination.chair([], {}, count="all")


def test_objects_from_a_judge():
    """The judge's phrases are mapped by the same words; answers of three words or less are not sent."""
    asked = []

    def judge(text):
        asked.append(text)
        return '```json\n["brown dogs", "sunlight", "a set of wine glasses"]\n```'

    found = hallucination.extract_objects(judge, {"a": "Brown dogs lie by {glasses}", "b": "A dog."})
    assert found.values == {"b": [], "a": ["brown dogs", "sunlight", "a set of wine glasses"]}
    assert len(asked) == 1
    assert asked[0].endswith("Brown dogs lie by {glasses}")
    captions = [hallucination.Caption("a", Question("a", ""), frozenset({"dog"}))]
    result = hallucination.chair(captions, {"a": "…"}, phrases=found.values)
    assert result.absent == {"a": ("wine glass",)}
    for reply in ('{"a": 1}', "dog, cat", "[1]"):
        with pytest.raises(Unparsable):
            hallucination.parse_list(reply)


@pytest.mark.parametrize(
    ("phrases", "objects"),
    [
        (["brown dogs", "wooden table"], ["dog", "dining table"]),
        (["table lamp", "dog collar", "bus stop", "hot dog stand"], []),
        (["lamp on a table", "man wearing a hat", "set of wine glasses"], ["dining table", "person", "wine glass"]),
        (["train track", "dog (sleeping)", "cats, benches"], ["dog", "cat", "bench"]),
        (["toilet", "white seat"], ["toilet"]),
        ([], []),
    ],
)
def test_a_phrase_names_what_its_nouns_end_with(phrases, objects):
    """A judge's "table lamp" is no table; the seat beside a toilet is no chair, in whatever phrase it stands."""
    assert [mention.object for mention in coco.named(phrases)] == objects


def test_a_picture_with_captions_alone_is_not_in_the_annotations(tmp_path):
    """Files of two splits that do not belong together: half the truth would call every other object absent."""
    instances = {"images": [{"id": 7}], "categories": [{"id": 1, "name": "dog"}], "annotations": []}
    said = {"annotations": [{"image_id": 7, "caption": "A cat"}, {"image_id": 9, "caption": "A kite"}]}
    for name, value in (("i.json", instances), ("s.json", said)):
        (tmp_path / name).write_text(json.dumps(value))
    assert hallucination.coco_objects([tmp_path / "i.json"], [tmp_path / "s.json"]) == {"7": {"cat"}}


def test_captions_and_annotations_of_coco(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [
        {"id": 7, "image": "a.png", "objects": ["Dogs", "cell phone"]},
        {"id": 8, "image": "b.png", "objects": ["unicorn"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"'unicorn' is none of the 80 COCO classes.*c.jsonl:2"):
        hallucination.read_captions(path)
    (caption,), (bad,) = hallucination.read_captions(path, on_bad_row="skip")
    assert (caption.id, caption.objects) == ("7", {"dog", "cell phone"})
    assert caption.question.prompt == hallucination.DESCRIBE
    assert bad.source.endswith("c.jsonl:2")
    instances = {
        "images": [{"id": 7}, {"id": 8}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dining table"}],
        "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 7, "category_id": 2}],
    }
    said = {"annotations": [{"image_id": 8, "caption": "A man with kites"}]}
    for name, value in (("i.json", instances), ("s.json", said)):
        (tmp_path / name).write_text(json.dumps(value))
    objects = hallucination.coco_objects([tmp_path / "i.json"], [tmp_path / "s.json"])
    assert objects == {"7": {"dog", "dining table"}, "8": {"person", "kite"}}
    found, _ = hallucination.read_captions(path, objects=objects)
    assert [caption.objects for caption in found] == [{"dog", "dining table"}, {"person", "kite"}]
    with pytest.raises(ValueError, match=r"i\.json is no file of COCO captions"):
        hallucination.coco_objects([], [tmp_path / "i.json"])
    with pytest.raises(ValueError, match="image '7' is not in the annotations"):
        hallucination.read_captions(path, objects={})


@pytest.mark.parametrize(
    ("answer", "strict", "released"),
    [
        ("Yes, there is a dog.", True, True),
        ("no", False, False),
        ("**No**.", False, True),  # the script looks for the bare word
        ("There is no dog in the image.", False, False),
        ("I see yes and no", None, False),
        ("A dog.", None, True),
        ("", None, True),
        ("It shows a cat. So yes.", True, True),
        ("The image is not clear", None, False),
    ],
)
def test_yes_and_no_are_read(answer, strict, released):
    assert hallucination.says_yes(answer) is strict
    assert hallucination.says_yes(answer, style="released") is released


def test_pope_against_a_slow_count(tmp_path):
    """Accuracy, precision, recall and F1 from a table of outcomes counted apart, by category and over all."""
    rng = random.Random(3)
    rows = [
        {
            "question_id": i,
            "image": "x.png",
            "text": "Is there a dog?",
            "label": rng.choice(["yes", "no"]),
            "category": c,
        }
        for i, c in enumerate(["random"] * 40 + ["adversarial"] * 30)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    probes, _ = hallucination.read_probes(tmp_path / "p.jsonl")
    replies = {"Yes.": True, "No, there is not.": False, "A dog": None}
    answers = {str(row["question_id"]): rng.choice(list(replies)) for row in rows}
    results = hallucination.pope(probes, answers)
    assert list(results) == ["all", "adversarial", "random"]
    for name, result in results.items():
        table = {}
        for row in rows:
            if name in ("all", row["category"]):
                key = (row["label"] == "yes", replies[answers[str(row["question_id"])]])
                table[key] = table.get(key, 0) + 1
        tp, fp, fn, tn = (table.get(key, 0) for key in ((True, True), (False, True), (True, False), (False, False)))
        lost = table.get((True, None), 0)
        total = sum(table.values())
        precision, recall = tp / (tp + fp), tp / (tp + fn + lost)
        assert result.accuracy == (tp + tn) / total
        assert (result.precision, result.recall) == (precision, recall)
        assert result.f1 == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-12)
        assert result.yes == (tp + fp) / total
        assert len(result.neither) == lost + table.get((False, None), 0)
    with pytest.raises(ValueError, match="70 probes have no answer"):
        hallucination.pope(probes, {})
    with pytest.raises(ValueError, match="probes must not be empty"):
        hallucination.pope([], {})


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Fine.\nRating: 4, somewhat informative", 4),
        ("**Rating: 0**", 0),
        ("Rating = 6", 6),
        ("rating: 2 ... Rating: 2", 2),
        ("Rating: 4 then Rating: 5", None),
        ("Rating: 7", None),
        ("Rating: 14", None),
        ("Rating: 3.5", None),
        ("Rating: 3-4", None),
        ("Rating: 5. 2 objects are right", 5),
        ("I would give it a 5", None),
        ("", None),
    ],
)
def test_ratings_are_read_strictly(reply, rating):
    if rating is None:
        with pytest.raises(Unparsable):
            mmhal.parse_rating(reply)
    else:
        assert mmhal.parse_rating(reply) == rating


def test_mmhal_by_hand(tmp_path):
    """Ratings 0..6 once each and one answer unrated; informativeness as RLHF-V's script: s - 3 from 3 on, over 3."""
    types = ["[attribute]", "Adversarial object", "attribute", "attribute", "counting", "counting", "other", "holistic"]
    rows = [
        {
            "question_type": kind,
            "question": f"q{i}?",
            "gt_answer": "g",
            "image_content": ["Cat", "Dog"],
            "image_id": "a.jpg",
        }
        for i, kind in enumerate(types)
    ]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    items, _ = mmhal.read_mmhal(tmp_path / "m.json")
    assert [item.id for item in items] == list("01234567")
    assert items[0].question.images[0].path == "a.jpg"
    seen = []

    def judge(text):
        seen.append(text)
        number = int(text.split("|")[-1])
        return f"ok. Rating: {number}" if number < 7 else "I cannot say"

    answers = {str(i): f"an answer |{i}" for i in range(8)}
    template = "{contents} {question} {reference} {answer}"
    verdicts = mmhal.rate_mmhal(items, answers, judge, template=template, workers=1)
    assert seen[0] == "Cat, Dog q0? g an answer |0"
    assert verdicts.unparsable == [("7", "I cannot say")]
    result = mmhal.mmhal(items, verdicts.values)
    assert (result.rated, result.score, result.hallucination) == (7, 3.0, 3 / 7)
    assert result.informativeness == pytest.approx((0 + 1 + 2 + 0 + 1 + 2 + 3) / 3 / 7)
    assert list(result.types) == ["attribute", "adversarial", "counting", "other"]
    assert result.types["attribute"] == (3, 5 / 3, 2 / 3)
    bare = mmhal.rate_mmhal(items[:1], answers, judge, template="{} / {} / {} / {}")
    assert bare.values == {"0": 0}
    assert seen[-1] == "Cat, Dog / q0? / g / an answer |0"
    with pytest.raises(ValueError, match=r"template lacks \{reference\}"):
        mmhal.rate_mmhal(items, answers, judge, template="{contents} {question} {answer}")
    assert mmhal.mmhal(items, {}).score is None


def test_a_question_without_an_id_is_named_by_its_place(tmp_path):
    """A row that cannot be read moves no other: answers made elsewhere stay with their questions."""
    row = {"question": "?", "gt_answer": "g", "image_content": ["x"], "question_type": "other"}
    (tmp_path / "m.jsonl").write_text(
        "\n".join([json.dumps(row), "{", json.dumps(row | {"question": ""}), json.dumps(row)])
    )
    items, bad = mmhal.read_mmhal(tmp_path / "m.jsonl", on_bad_row="skip")
    assert ([item.id for item in items], len(bad)) == (["0", "3"], 2)
