"""`data check` on clean, broken and real files; `data view` writes one page that no data can break out of."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmrlhf.data.check import check
from mmrlhf.data.schema import ListedPair, Message, Part, PreferenceGroup, Response
from mmrlhf.data.view import best_first, mark_group, mark_spans, mark_words, view

BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm_reward_bench.jsonl"


@pytest.fixture
def world(tmp_path, picture):
    """Three groups over two splits, with scores, a tie, a shared image and one absent image."""
    for name in ("long/a.png", "short/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(format="PNG" if name.endswith("png") else "JPEG"))
    rows = [
        {
            "id": "one",
            "images": ["long/a.png"],
            "prompt": "What is it?",
            "responses": [
                {"text": "A red cat on a mat.", "score": 3, "critique": "fine"},
                {"text": "A blue cat on a mat.", "score": 1.5},
                {"text": "A green cat on a mat.", "score": 1.5},
            ],
        },
        {
            "id": "two",
            "images": ["long/a.png"],
            "prompt": "Where?",
            "responses": ["On a mat.", "On a car."],
            "ranking": "1>2",
        },
        {
            "id": "three",
            "images": ["short/b.jpg"],
            "prompt": "Why?",
            "responses": ["Because.", "No."],
            "ranking": "2>1",
        },
    ]

    def write(*extra):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in (*rows, *extra)))
        return path

    return write


def test_check_counts(world):
    report = check(world())
    assert (report.format, report.rows, report.groups, report.pairs, report.responses) == ("mmrlhf", 3, 3, 4, 7)
    assert report.group_sizes == {2: 2, 3: 1}
    assert (report.ties, report.margins, report.critiques) == (1, 2, 1)
    assert report.categories == {"long": (2, 3), "short": (1, 1)}
    assert (report.images, report.missing, report.bad_images) == (2, [], [])
    assert (report.response_slots, report.image_slots) == (8, 8)
    assert report.largest_image == "40x30"
    assert report.image_sizes.high == 1200
    assert report.status == 0
    text = report.text()
    assert "4 pairs in 3 groups with 7 unique responses" in text
    assert "8 responses for 7 unique (1.1x)" in text
    assert text.endswith("every row can be used")


def test_check_reports_what_cannot_be_used(world, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    absent = {"id": "x", "images": ["long/absent.png"], "prompt": "x", "responses": ["a", "b"], "ranking": "1>2"}
    path = world(absent)
    report = check(path)
    assert report.status == 0  # an image that is merely not here does not condemn the file
    assert [m.split(" ")[0] for m in report.missing] == ["long/absent.png"]
    assert "1 images or videos are missing" in report.text()
    report = check(world(absent, {**absent, "images": ["broken.png"]}, "{oops", {**absent, "ranking": "1>3"}))
    assert report.status == 1
    assert len(report.bad_images) == 1
    assert [b.source.rsplit(":", 1)[1] for b in report.bad_rows] == ["6", "7"]
    text = report.text()
    assert "data.jsonl:6: not JSON" in text
    assert "must name each of 1..2 once" in text


def test_check_what_cannot_be_read_at_all(tmp_path):
    assert check(tmp_path / "absent.jsonl").status == 2
    (tmp_path / "x.pkl").write_bytes(b"")
    report = check(tmp_path / "x.pkl")
    assert report.status == 2
    assert "pickles can run code" in report.text()
    (tmp_path / "only_ties.jsonl").write_text(json.dumps({"prompt": "x", "responses": ["a", "b"], "ranking": "1=2"}))
    assert check(tmp_path / "only_ties.jsonl").status == 2


def test_check_with_a_processor_counts_tokens(world, processor):
    report = check(world(), processor=processor("qwen2_vl"))
    assert report.status == 0
    assert report.prompt_tokens.low > 10
    assert report.group_tokens.high > report.prompt_tokens.high
    assert "group tokens" in report.text()
    marked = {"prompt": "x <|im_end|>", "responses": ["a", "b"], "ranking": "1>2"}
    report = check(world(marked), processor=processor("qwen2_vl"), max_group_tokens=60)
    assert report.status == 1
    assert "a marker of the model" in report.text()


@pytest.mark.skipif(not BENCH.exists(), reason=f"{BENCH} is absent")
def test_check_reward_bench_as_published():
    report = check(BENCH)
    assert (report.rows, report.pairs, report.groups, report.responses) == (170, 170, 46, 170)
    assert report.status == 0
    assert len(report.missing) == report.images == 46
    assert (report.response_slots, report.image_slots) == (340, 340)
    assert report.group_sizes == {3: 17, 4: 26, 5: 3}
    assert report.categories == {
        "mcq": (10, 42),
        "long": (10, 37),
        "short": (10, 34),
        "safety": (6, 32),
        "video": (10, 25),
    }
    assert "340 image encodings for 46 images (7.4x)" in report.text()
    assert "none of the images is here" in report.text()


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.words.append(data)


def test_view_is_one_page_with_pictures_and_facts(world, tmp_path):
    from PIL import Image

    target = view(world(), tmp_path / "out.html")
    page = Page(target.read_text())
    images = [value for tag, name, value in page.attributes if tag == "img" and name == "src"]
    assert len(images) == 3
    picture = Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1])))
    assert (picture.format, picture.size) == ("JPEG", (40, 30))
    text = " ".join("".join(page.words).split())
    for piece in ("What is it?", "A red cat on a mat.", "score 3", "A > B", "+1.5", "fine", "2 pairs", "A · best"):
        assert piece in text
    assert not list(tmp_path.glob("*.part"))
    assert view(world()).name == "data.jsonl.html"


def test_view_escapes_everything_and_fetches_nothing(tmp_path):
    evil = "</p><script>alert(1)</script><img src=http://x/y onerror=alert(1)>\"'&{{ 7*7 }}"
    row = {
        "id": evil,
        "images": ["gone/x.png"],
        "prompt": evil,
        "meta": {"origin": evil},
        "responses": [{"text": evil + "a", "rank": 1, "critique": evil}, {"text": evil + "b", "rank": 2}],
    }
    (tmp_path / "<b>x.jsonl").write_text(json.dumps(row))
    page = Page(view(tmp_path / "<b>x.jsonl", tmp_path / "out.html").read_text())
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("b") == 5  # the five facts; none from the file's name
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert not [a for a in page.attributes if a[1] in ("src", "href") and not a[2].startswith("data:")]
    whole = (tmp_path / "out.html").read_text()
    assert not re.search(r"url\(|@import|<link|49", whole)
    assert "gone/x.png: not found" in "".join(page.words)
    assert "default-src 'none'" in whole


def test_view_limit_and_bad_rows(world, tmp_path):
    whole = view(world("{oops"), tmp_path / "out.html", limit=1).read_text()
    assert "the first 1 of 3 groups" in whole
    assert "bad rows left out" in whole
    assert whole.count("<article>") == 1
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        view(world(), tmp_path / "out.html", limit=0)


def make(*responses, pairs=None):
    return PreferenceGroup("g", (Message("user", (Part("text", "?"),)),), responses, pairs=pairs)


def test_corrections_are_marked_on_both_sides():
    gone, new = mark_words("a blue cat sat", "a red cat sat down")
    assert gone == [("", "a "), ("gone", "blue"), ("", " cat sat")]
    assert new == [("", "a "), ("new", "red"), ("", " cat sat"), ("new", " down")]
    group = make(
        Response("a red cat sat", rank=1), Response("a blue cat sat", rank=2), Response("entirely other", rank=3)
    )
    marked = mark_group(group, [0, 1, 2])
    assert ("new", "red") in marked[0]
    assert ("gone", "blue") in marked[1]
    assert marked[2] == [("", "entirely other")]  # nothing alike: no marks
    for index, response in enumerate(group.responses):
        assert "".join(text for _, text in marked[index]) == response.text


def test_explicit_segments_are_marked():
    assert mark_spans("abcdef", [(4, 5), (1, 3), (2, 4)], "gone") == [("", "a"), ("gone", "bcde"), ("", "f")]
    group = make(Response("a red cat", rank=1), Response("a blue cat", rank=2, segments=((2, 6),)))
    assert mark_group(group, [0, 1])[1] == [("", "a "), ("gone", "blue"), ("", " cat")]


def test_best_first_by_wins():
    assert best_first(3, [ListedPair(2, 0), ListedPair(2, 1), ListedPair(0, 1)]) == [2, 0, 1]
    assert best_first(2, []) == [0, 1]
