"""`mmrlhf eval` on a tiny model and a local judge: figures, files, going on after a stop, what users get wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fakejudge import serve
from mmrlhf.cli import main
from mmrlhf.evaluation import answers
from mmrlhf.evaluation.rows import Question
from mmrlhf.models import load
from rewarddata import reward_folder
from tiny import tiny_folder, tiny_image


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    tiny_folder("llava_onevision", root / "model")
    for index in range(5):
        tiny_image(28, 28, seed=index).save(root / f"{index}.png")
    captions = [{"id": i, "image": f"{i}.png", "objects": ["dog", "cat"]} for i in range(5)]
    write(root / "captions.jsonl", captions)
    return root


def figures_of(folder: Path) -> dict[str, float | None]:
    return {f["metric"]: f["value"] for f in json.loads((folder / "results.json").read_text())["figures"]}


QUICK = ["--device", "cpu", "--max-new-tokens", "3", "--batch-size", "2"]


def test_answers_are_written_as_they_come_and_a_stopped_run_goes_on(world, tmp_path, capsys, monkeypatch):
    """Cut after three answers and a half line: the rest is asked, the first three are not, the model is loaded once."""
    words = [
        "eval",
        "hallucination",
        str(world / "captions.jsonl"),
        "--benchmark",
        "chair",
        "--model",
        str(world / "model"),
    ]
    words += [*QUICK, "--output", str(tmp_path)]
    assert main(words) == 0
    file = tmp_path / "answers-chair.jsonl"
    whole, results = file.read_bytes(), (tmp_path / "results.json").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == list("01234")
    file.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    capsys.readouterr()
    assert main(words) == 0
    assert file.read_bytes() == whole
    assert "2 of 2 questions answered" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["figures"] == json.loads(results)["figures"]
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("everything was answered"))
    assert main(words) == 0
    assert main([*words, "--max-new-tokens", "4"]) == 2
    assert "answer to '0' is of another model, prompt, picture or length" in capsys.readouterr().err


def test_pictures_that_cannot_be_read_are_named_before_the_model_is_loaded(world, tmp_path, capsys, monkeypatch):
    rows = [{"id": "a", "image": "0.png", "objects": []}, {"id": "b", "image": "gone.png", "objects": []}]
    data = write(world / "broken.jsonl", rows)
    words = ["eval", "hallucination", str(data), "--benchmark", "chair", "--model", str(world / "model"), *QUICK]
    words += ["-o", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(load, "load_model", lambda *_, **__: pytest.fail("loaded"))
        assert main(words) == 2
    assert "1 of 2 questions cannot be asked" in capsys.readouterr().err
    assert main([*words, "--on-bad-row", "skip"]) == 0
    details = json.loads((tmp_path / "results.json").read_text())["details"]["chair"]
    assert details["bad_rows"][0]["source"].endswith("broken.jsonl:2")
    assert "gone.png" in details["bad_rows"][0]["reason"]


def test_answers_of_a_file_by_words_and_by_a_judge(world, tmp_path, capsys):
    """The two ways to find objects are two benchmarks in the results, with other figures."""
    pytest.importorskip("openai", reason="the openai package is not installed: pip install mmrlhf[eval]")
    said = ["A dog and a kite.", "A cat", "Two dogs fly kites", "nothing to see here", "It sits on an orange mat"]
    file = write(tmp_path / "answers.jsonl", [{"id": i, "answer": a} for i, a in enumerate([*said, "unused"])])
    words = ["eval", "hallucination", str(world / "captions.jsonl"), "--benchmark", "chair", "--answers", str(file)]
    words += ["-o", str(tmp_path / "out"), "--name", "mine"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "1 answers of" in captured.err
    found = figures_of(tmp_path / "out")
    assert found["CHAIRs"] == 60  # the kites, and the mat whose colour is a fruit
    assert found["recall"] == 30
    with serve(lambda text, attempt: '["dog", "kite"]' if "kite" in text else "[]") as endpoint:
        judged = [*words, "--judge", "m", "--judge-url", endpoint.url]
        assert main(judged) == 0
        assert main(judged) == 0
        assert len(endpoint.requests) == 4  # "A cat" is too short to be sent; nothing is asked twice
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    both = written["figures"]
    assert {f["measurement"] for f in both} == set(written["details"]) == {"chair", "chair by judge"}
    rates = {f["benchmark"]: f["value"] for f in both if f["metric"] == "CHAIRs"}
    assert rates == {"CHAIR, by words": 60, "Object HalBench": 40}
    assert "the results lie in" in capsys.readouterr().out


def test_pope_mmhal_and_safety_end_to_end(world, tmp_path, capsys):
    pytest.importorskip("openai", reason="the openai package is not installed: pip install mmrlhf[eval]")
    ids = ["p0", "p1"]
    pope = write(tmp_path / "pope.jsonl", [{"id": i, "question": "?", "label": "yes"} for i in ids])
    said = write(tmp_path / "said.jsonl", [{"id": "p0", "answer": "Yes"}, {"id": "p1", "answer": "Maybe"}])
    out = ["-o", str(tmp_path / "out"), "--name", "m"]
    assert main(["eval", "hallucination", str(pope), "--benchmark", "pope", "--answers", str(said), *out]) == 0
    assert figures_of(tmp_path / "out")["accuracy"] == 50
    rows = [{"id": i, "question": "?", "gt_answer": "g", "image_content": ["x"], "question_type": "other"} for i in ids]
    mmhal = write(tmp_path / "mmhal.jsonl", rows)
    sets = [{"id": i, "set": "typographic", "label": "b", "question": "?"} for i in ids]
    sets += [{"id": "n", "set": "nsfw_text", "question": "?"}]
    safety = write(tmp_path / "safety.jsonl", sets)
    safe = {"typographic/p0": "I cannot help with that", "typographic/p1": "Sure", "nsfw_text/n": "Sure"}
    given = write(tmp_path / "safe.jsonl", [{"id": name, "answer": text} for name, text in safe.items()])

    def judge(text, attempt):
        if "Rating" in text:
            return "Rating: 4" if "Yes" in text else "no idea"
        return "yes" if "Sure" in text else "no"

    with serve(judge) as endpoint:
        asked = ["--judge", "m", "--judge-url", endpoint.url, *out]
        assert main(["eval", "hallucination", str(mmhal), "--benchmark", "mmhal", "--answers", str(said), *asked]) == 0
        assert "1 of 2 have no verdict and count nowhere" in capsys.readouterr().out
        assert main(["eval", "safety", str(safety), "--answers", str(given), *asked]) == 0
        template = tmp_path / "harm.txt"
        template.write_text("mine: {label} {answer}")
        assert (
            main(
                ["eval", "safety", str(safety), "--answers", str(given), *asked, "--judge-template", f"harm={template}"]
            )
            == 0
        )
        assert "mine: b Sure" in endpoint.texts()
    found = figures_of(tmp_path / "out")
    assert (found["score (0 to 6)"], found["hallucination rate"]) == (4, 0)
    assert [found[name] for name in ("Typographic_ASR", "Typographic_RtA", "Safe_unsafes")] == [50, 50, 100]
    assert found["accuracy"] == 50  # the first command's figures are still there
    details = json.loads((tmp_path / "out" / "results.json").read_text())["details"]
    assert details["mmhal"]["judge"]["unparsable"] == [{"id": "p1", "reply": "no idea"}]
    assert main(["eval", "compare", str(tmp_path / "out"), str(tmp_path / "out" / "results.json")]) == 0
    assert "0 figures are better, 0 worse" in capsys.readouterr().out


def test_a_benchmark_measured_again_keeps_nothing_of_the_time_before(tmp_path, capsys):
    """POPE with categories, then of a file without: the figures by category were of the other questions."""
    questions = [{"id": i, "question": "?", "label": "yes", "category": "random"} for i in ("a", "b")]
    words = ["--benchmark", "pope", "-o", str(tmp_path / "out"), "--name", "m"]
    answered = write(tmp_path / "said.jsonl", [{"id": "a", "answer": "Yes"}, {"id": "b", "answer": "Yes"}])
    data = write(tmp_path / "pope.jsonl", questions)
    assert main(["eval", "hallucination", str(data), "--answers", str(answered), *words]) == 0
    assert "random accuracy" in figures_of(tmp_path / "out")
    capsys.readouterr()
    write(data, [{"id": "a", "question": "?", "label": "no"}])
    more = ["--answers", str(answered), "--style", "released"]
    assert main(["eval", "hallucination", str(data), *more, *words]) == 0
    assert set(figures_of(tmp_path / "out")) == {"accuracy", "F1", "yes"}
    assert figures_of(tmp_path / "out")["accuracy"] == 0
    assert "3 figures of an earlier measurement, which the new one does not have, are gone: POPE random F1" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["hallucination", "safety", "rewardbench", "suite"])
def test_several_processes_are_refused(command, world, tmp_path, capsys, monkeypatch):
    """Under torchrun each would answer, ask the judge and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    data = [] if command == "suite" else [str(world / "captions.jsonl")]
    source = ["--scores", "x"] if command == "rewardbench" else ["--model", "x"]
    words = ["--benchmark", "chair"] if command == "hallucination" else []
    assert main(["eval", command, *data, *source, *words, "-o", str(tmp_path / "out")]) == 2
    assert f"WORLD_SIZE is 2, and mmrlhf eval {command} runs in one process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rewardbench_from_scores(tmp_path, capsys):
    row = {"id": "a", "image": "short/1.png", "prompt": "p", "chosen": "x", "rejected": "y"}
    data = write(tmp_path / "b.jsonl", [row, row | {"chosen": "z"}])
    scores = write(tmp_path / "s.jsonl", [{"id": "a", "rewards": [1, 0]}, {"id": "a", "rewards": [0, 1]}])
    assert main(["eval", "rewardbench", str(data), "--scores", str(scores), "-o", str(tmp_path / "out")]) == 0
    found = figures_of(tmp_path / "out")
    assert (found["ACC"], found["ACC+"], found["ACC short"]) == (50, 0, 50)
    assert "ACC+" in capsys.readouterr().out
    assert main(["eval", "rewardbench", str(data), "--scores", str(tmp_path / "none.jsonl")]) == 2


def test_rewardbench_of_a_reward_model(tmp_path, capsys):
    """A tiny reward model scores every pair; one whose picture is gone stops the command, or is named and left out."""
    folder = reward_folder(tmp_path / "model")
    (tmp_path / "long").mkdir()
    tiny_image(28, 28).save(tmp_path / "long" / "0.png")
    row = {"id": "a", "image": "long/0.png", "prompt": "what is it ?", "chosen": "a cat", "rejected": "a dog"}
    row |= {"chosen_reason": "right", "rejected_reason": "wrong"}
    rows = [row, row | {"chosen": "a red cat"}, row | {"id": "b", "image": "long/gone.png"}]
    data = write(tmp_path / "b.jsonl", rows)
    words = ["eval", "rewardbench", str(data), "--model", str(folder), "--critic", "none", "--device", "cpu"]
    words += ["-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "gone.png" in capsys.readouterr().err
    assert main([*words, "--on-bad-row", "skip"]) == 0
    details = json.loads((tmp_path / "out" / "results.json").read_text())["details"]["rewardbench mm_rlhf"]
    scores = details["scores"]
    assert sorted(scores) == ["a#0", "a#1"]
    assert scores["a#0"][1] == scores["a#1"][1]  # the response that both pairs share is scored once
    assert "gone.png" in details["bad_rows"][0]["reason"]
    assert figures_of(tmp_path / "out")["ACC"] == 50 * sum(better > worse for better, worse in scores.values())
    words[words.index("none")] = "given"
    assert main([*words, "--on-bad-row", "skip"]) == 0
    details = json.loads((tmp_path / "out" / "results.json").read_text())["details"]["rewardbench mm_rlhf"]
    assert sorted(details["scores"]) == ["a#0", "a#1"]
    assert details["scores"] != scores


def test_suite_prints_the_way_and_runs_its_own(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    model = ["--model", str(world / "model"), *QUICK, "-o", str(tmp_path)]
    assert main(["eval", "suite", *model, "--print"]) == 0
    out = capsys.readouterr().out
    assert "MMHal-Bench             mmrlhf's own: --mmhal FILE" in out
    assert "no adapter known to work for llava_onevision" in out
    assert main(["eval", "suite", *model, "--dimension", "OCR"]) == 2
    assert "need lmms-eval (0.7), which is not installed" in capsys.readouterr().err
    chair = ["--chair", str(world / "captions.jsonl")]
    assert main(["eval", "suite", *model, "--task", "chair", "--task", "safety", *chair]) == 0
    assert "not run: no file was named for it" in capsys.readouterr().out
    assert "CHAIRs" in figures_of(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["hallucination", "DATA", "--benchmark", "mmhal", "--answers", "x"],
            "MMHal-Bench needs a judge: --judge MODEL",
        ),
        (["hallucination", "no.jsonl", "--benchmark", "chair", "--answers", "x"], "no.jsonl: no such file"),
        (["hallucination", "DATA", "--benchmark", "chair", "--answers", "EMPTY"], "lacks 4 answers: 1, 2, 3, 4"),
        (["hallucination", "DATA", "--benchmark", "chair", "--model", "/no/where"], "/no/where is neither a folder"),
        (["suite", "--answers", "x", "--task", "chair"], "the suite asks a model itself"),
        (["suite", "--model", "x", "--mmhal", "DATA"], "MMHal-Bench needs a judge"),
        (["compare", "DATA", "DATA"], "is not JSON"),
        (
            ["hallucination", "DATA", "--benchmark", "chair", "--answers", "EMPTY", "--judge-template", "x=y"],
            "--judge-template is KIND=FILE with one of extract",
        ),
    ],
)
def test_what_users_get_wrong_is_one_line(words, message, world, tmp_path, capsys):
    empty = write(tmp_path / "one.jsonl", [{"id": 0, "answer": ""}])
    named = {"DATA": str(world / "captions.jsonl"), "EMPTY": str(empty)}
    assert main(["eval", *[named.get(word, word) for word in words]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_another_model_at_the_same_place_is_another_model(world, tmp_path):
    """A folder that was trained on has other files: its old answers are refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    before = answers.model_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(b"22")
    assert answers.model_fingerprint(folder) != before
    assert answers.model_fingerprint("org/name") == "org/name"
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        answers.answer_questions([Question("a", "b")], tmp_path / "x", lambda: (0, 0), model_name="m", batch_size=0)
