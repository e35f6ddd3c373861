"""Questions to a model: what cannot be asked is named before it is loaded, and no answer outlives its question."""

from __future__ import annotations

import json

import pytest

from mmrlhf.data.schema import BadRow, ImageRef, VideoRef
from mmrlhf.evaluation import answers, hallucination
from mmrlhf.evaluation.rows import Question
from mmrlhf.models import generate
from tiny import tiny_image


@pytest.fixture
def asked(monkeypatch):
    """Every prompt that reaches the model; it answers with the number of its pictures."""
    seen: list[generate.Prompt] = []

    def answer(model, processor, prompts, **options):
        seen.extend(prompts)
        return [f"{len(pictures)} pictures" for _, pictures in prompts]

    monkeypatch.setattr(generate, "answer", answer)
    return seen


def ask(questions, path, **options):
    return answers.answer_questions(questions, path, lambda: (None, None), model_name="m", **options)


def picture(root, name: str, seed: int = 0) -> ImageRef:
    tiny_image(8, 8, seed=seed).save(root / name)
    return ImageRef(path=name)


def test_another_picture_under_the_same_name_is_another_question(tmp_path, asked):
    """A data set that was repaired, or another root with the same names: the old answer is refused."""
    question = Question("a", "what is it ?", (picture(tmp_path, "a.png"),))
    for _ in range(2):
        assert ask([question], tmp_path / "answers.jsonl", root=tmp_path)[0] == {"a": "1 pictures"}
    assert len(asked) == 1
    picture(tmp_path, "a.png", seed=1)
    with pytest.raises(ValueError, match=r"answers\.jsonl: the answer to 'a' is of another model, prompt, picture or"):
        ask([question], tmp_path / "answers.jsonl", root=tmp_path)


def test_what_cannot_be_asked_is_said_before_the_model_is_loaded(tmp_path, asked):
    """No picture at all (a column that is spelled otherwise), a picture or video that is gone, places for too many."""
    there = (picture(tmp_path, "a.png"),)
    (tmp_path / "broken.png").write_bytes(b"GIF89a")
    questions = [
        Question("0", "fine ?", there),
        Question("1", "nothing to see ?", source="f:1"),
        Question("2", "see <image> and <image>", there, source="f:2"),
        Question("3", "?", (ImageRef(path="gone.png"),), source="f:3"),
        Question("4", "?", (ImageRef(path="broken.png"),), source="f:4"),
        Question("5", "?", (), (VideoRef("clip"),), source="f:5"),
    ]

    def load():
        raise AssertionError("loaded")

    with pytest.raises(ValueError, match="5 of 6 questions cannot be asked") as caught:
        answers.answer_questions(questions, tmp_path / "x", load, model_name="m", root=tmp_path)
    for line in ("no picture: 'image' or 'video'", "2 image placeholders for 1 images", "2 x 'gone.png'", "first: f:4"):
        assert line in str(caught.value)
    assert not (tmp_path / "x").exists()
    found, bad = ask(questions, tmp_path / "x", root=tmp_path, on_bad_row="skip")
    assert found == {"0": "1 pictures"}
    assert [row.source for row in bad] == [f"f:{n}" for n in range(1, 6)]


def test_no_question_left_is_an_error_whatever_happens_to_bad_rows(tmp_path):
    """Pictures looked up in the wrong folder and --on-bad-row skip: no figure is made of nothing."""
    questions = [Question("a", "?", (ImageRef(path="a.png"),), source="f:1")]
    with pytest.raises(ValueError, match="1 of 1 questions cannot be asked"):
        ask(questions, tmp_path / "x", root=tmp_path, on_bad_row="skip")


def test_frames_stand_where_the_video_does(tmp_path, asked):
    """Behind the text, between pictures: each part shows what the prompt has there."""
    (tmp_path / "clip").mkdir()
    for index in range(4):
        picture(tmp_path / "clip", f"{index}.png")
    wide = picture(tmp_path, "wide.png")
    tiny_image(16, 8).save(tmp_path / "wide.png")
    question = Question("a", "in <video> and <image> ?", (wide,), (VideoRef("clip"),))
    ask([question], tmp_path / "x", root=tmp_path, frames=2)
    (((turn,), pictures),) = asked
    assert [part.type for part in turn.content] == ["text", "image", "image", "text", "image", "text"]
    assert [image.size for image in pictures] == [(8, 8), (8, 8), (16, 8)]
    plain = Question("b", "what happens ?", (), (VideoRef("clip"),))
    ask([plain], tmp_path / "y", root=tmp_path, frames=3)
    assert [part.type for part in asked[1][0][0].content] == ["image"] * 3 + ["text"]


def test_a_picture_that_breaks_off_stops_the_run_or_is_left_out(tmp_path, asked):
    """A header is no whole picture: found when it is opened, and earlier answers are kept."""
    good, cut = picture(tmp_path, "a.png"), picture(tmp_path, "b.png")
    data = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    questions = [Question("a", "?", (good,)), Question("b", "?", (cut,), source="f:2")]
    with pytest.raises(BadRow, match="f:2"):
        ask(questions, tmp_path / "x", root=tmp_path, batch_size=1)
    assert [json.loads(line)["id"] for line in (tmp_path / "x").read_text().splitlines()] == ["a"]
    found, bad = ask(questions, tmp_path / "x", root=tmp_path, batch_size=1, on_bad_row="skip")
    assert (set(found), [row.source for row in bad]) == ({"a"}, ["f:2"])


def test_equal_pictures_of_a_file_are_held_once(tmp_path):
    """POPE's parquet files hold a picture with each of its 18 questions."""
    import pyarrow
    import pyarrow.parquet as parquet

    picture(tmp_path, "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [{"id": n, "image": image, "question": "?", "label": "yes"} for n in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    (one, other), _ = hallucination.read_probes(tmp_path / "p.parquet")
    assert one.question.images[0].data == image["bytes"]
    assert one.question.images[0].data is other.question.images[0].data


def test_another_chat_template_is_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    found = {answers.model_fingerprint(tmp_path)}
    for name in ("chat_template.jinja", "merges.txt", "tokenizer.model"):
        (tmp_path / name).write_text("x")
        found.add(answers.model_fingerprint(tmp_path))
    assert len(found) == 4
