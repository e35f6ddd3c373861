"""The ten dimensions, lmms-eval through its API (a stand-in with its names), results files and comparisons."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from mmrlhf.evaluation import lmms, results, suite
from mmrlhf.evaluation.results import Figure, Results
from mmrlhf.models import generate


def test_the_ten_dimensions_of_the_paper():
    """28 benchmarks by section 5.1, each run by somebody; task names as lmms-eval 0.7.3 registers them."""
    benchmarks = [benchmark for group in suite.DIMENSIONS.values() for benchmark in group]
    assert len(suite.DIMENSIONS) == 10
    assert len(benchmarks) == 28
    assert all(bool(benchmark.tasks) != bool(benchmark.own) for benchmark in benchmarks)
    assert {benchmark.own for benchmark in benchmarks if benchmark.own} == set(suite.OWN)
    tasks = [task for benchmark in benchmarks for task in benchmark.tasks]
    assert len(set(tasks)) == len(tasks) == 31


def test_choosing():
    assert len(suite.choose()) == 28
    assert [b.name for _, b in suite.choose(["ocr", "Safety"])] == [
        "OCRBench",
        "TextVQA",
        "WebSRC",
        "MM-RLHF-SafetyBench",
    ]
    assert suite.choose(tasks=["pope_adv", "CHAIR", "mme"]) == [
        ("General", suite.Benchmark("MME", ("mme",))),
        ("Hallucination", suite.Benchmark("POPE", ("pope_adv",))),
        ("Hallucination", suite.Benchmark("Object HalBench", own="chair")),
    ]
    with pytest.raises(ValueError, match=r"dimensions are Conversation, .*; got 'speech'"):
        suite.choose(["Speech"])
    with pytest.raises(ValueError, match="no benchmark or task 'pope_adv' in Video"):
        suite.choose(["Video"], ["pope_adv"])


def test_the_command():
    chosen = suite.choose(["hallucination", "OCR"])
    line = suite.command(chosen, "my models/q", model_type="qwen2_5_vl", output="out")
    assert line == (
        "python -m lmms_eval --model qwen2_5_vl --model_args 'pretrained=my models/q' --tasks "
        "ocrbench,textvqa_val,websrc_val,pope_adv,pope_pop,pope_random --batch_size 1 --output_path out"
    )
    with pytest.raises(ValueError, match="no adapter known to work for gemma3"):
        suite.command(chosen, "m", model_type="gemma3")
    with pytest.raises(ValueError, match="none of the chosen benchmarks is lmms-eval's"):
        suite.command(suite.choose(["safety"]), "m", model_type="llava")


def test_without_lmms_eval_it_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError, match=r"lmms-eval \(0.7\), which is not installed"):
        suite.run(suite.choose(["OCR"]), lambda: pytest.fail("a model was loaded"), own=lambda name: pytest.fail(name))


def test_own_measures_need_no_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    asked = []

    def own(name: str) -> list[Figure]:
        asked.append(name)
        return [Figure("Hallucination", name, "x", 1.0)]

    chosen = suite.choose(tasks=["chair", "mmhal"])
    figures, notes = suite.run(chosen, lambda: pytest.fail("loaded"), own=own, available=("chair", "safety"))
    assert (asked, notes) == (["chair"], [])
    assert [(f.benchmark, f.value, f.note) for f in figures] == [
        ("MMHal-Bench", None, "no file was named for it (--mmhal)"),
        ("chair", 1.0, ""),
    ]


@dataclass
class Instance:
    args: tuple


class Task:
    """What a task of lmms-eval gives for each document: text, options, pictures."""

    def __init__(self, name: str, context: str, options: dict[str, Any], pictures: list[Any]):
        self.request = (context, options, lambda document: document, 0, name, "test")
        self.documents = {"test": [pictures]}


@pytest.fixture
def lmms_eval(monkeypatch):
    """lmms_eval 0.7.3's names that the adapter touches; `evaluate` asks the model as its evaluator does."""

    class Base:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.task_dict = 0, 1, {}

        @property
        def rank(self):  # without a setter, as there
            return self._rank

        @property
        def world_size(self):
            return self._world_size

    class TaskManager:
        def __init__(self, include_path=None):
            self.all_tasks = sorted(tasks)

    def simple_evaluate(model, tasks: list[str], **options):
        calls.append(options)
        chosen = {name: known[name] for name in tasks}
        model.task_dict.update({name: task.documents for name, task in chosen.items()})
        said = model.generate_until([Instance(task.request) for task in chosen.values()])
        answers.update(zip(chosen, said, strict=True))
        return {
            "results": {name: {"alias": name, "acc,none": 0.5, "acc_stderr,none": 0.1} for name in tasks},
            "higher_is_better": {name: {"acc": True} for name in tasks},
        }

    picture = Image.new("L", (4, 4))
    tasks = ("pope_adv", "ocrbench", "mmstar", "video_dc499")
    known = {
        "pope_adv": Task("pope_adv", "Is it?", {"max_new_tokens": 4, "until": "\n"}, [picture]),
        "ocrbench": Task("ocrbench", "<image> what <image>", {"max_new_tokens": 8, "num_beams": 3}, [picture] * 2),
        "mmstar": Task("mmstar", "text", {"max_new_tokens": 4, "do_sample": True, "temperature": 0.5}, []),
        "video_dc499": Task("video_dc499", "x", {}, ["film.mp4"]),
    }
    calls: list[dict] = []
    answers: dict[str, str] = {}
    modules = {
        name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.tasks")
    }
    modules["lmms_eval.api.model"].lmms = Base
    modules["lmms_eval.tasks"].TaskManager = TaskManager
    modules["lmms_eval.evaluator"] = ModuleType("lmms_eval.evaluator")
    modules["lmms_eval"].evaluator = modules["lmms_eval.evaluator"]
    modules["lmms_eval.evaluator"].simple_evaluate = simple_evaluate
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls, answers


class Model:
    config = None

    def parameters(self):
        import torch

        return iter([torch.zeros(1)])


def test_lmms_eval_asks_our_model(lmms_eval, monkeypatch):
    """Lengths, pictures and their places reach `generate.answer`; ends of answers are cut; the rest is said aloud."""
    calls, answers = lmms_eval
    seen = []

    def answer(model, processor, prompts, *, max_new_tokens, batch_size):
        seen.extend((max_new_tokens, messages[0]["content"], [i.mode for i in images]) for messages, images in prompts)
        return [f"yes\nno {max_new_tokens}"] * len(prompts)

    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr(lmms, "parameter_device", lambda model: "cpu")
    chosen = suite.choose(tasks=["pope_adv", "ocrbench", "mmstar"])
    figures, notes = suite.run(chosen, lambda: (Model(), None), batch_size=2, limit=5)
    image, text = {"type": "image"}, {"type": "text", "text": "Is it?"}
    assert sorted(seen, key=str) == sorted(
        [
            (4, [image, text], ["RGB"]),
            (8, [image, {"type": "text", "text": " what "}, image], ["RGB", "RGB"]),
            (4, [{"type": "text", "text": "text"}], []),
        ],
        key=str,
    )
    assert answers == {"mmstar": "yes\nno 4", "ocrbench": "yes\nno 8", "pope_adv": "yes"}
    assert calls[0]["limit"] == 5
    assert [(f.benchmark, f.metric, f.value, f.better) for f in figures] == [
        ("MMStar", "mmstar acc", 0.5, "higher"),
        ("OCRBench", "ocrbench acc", 0.5, "higher"),
        ("POPE", "pope_adv acc", 0.5, "higher"),
    ]
    assert sorted(notes) == [
        "mmstar asks for temperature 0.5; answers here are greedy",
        "ocrbench asks for 3 beams; answers here are greedy",
    ]


def test_what_lmms_eval_asks_and_we_cannot(lmms_eval, monkeypatch):
    monkeypatch.setattr(lmms, "parameter_device", lambda model: "cpu")
    with pytest.raises(
        NotImplementedError, match=r"video_dc499 gives str where a picture should be \(a video file\?\)"
    ):
        lmms.run_tasks(Model(), None, ["video_dc499"])
    with pytest.raises(ValueError, match="lmms-eval knows no task nothing"):
        lmms.run_tasks(Model(), None, ["nothing"])
    ours = lmms.adapter(Model(), None)
    with pytest.raises(NotImplementedError, match="mmbench ranks continuations"):
        ours.loglikelihood([Instance((0, 1, 2, 3, "mmbench"))])
    with pytest.raises(NotImplementedError, match="several rounds"):
        ours.generate_until_multi_round([])


def test_tasks_without_figures_are_not_left_out():
    found = {"results": {"vqav2_val_lite": {"alias": "x", "submission,none": None, "bad,none": float("nan")}}}
    assert lmms.read_results(found) == {}
    (figure,) = suite.task_figures("General", "VQAv2", "vqav2_val_lite", {})
    assert (figure.value, figure.note) == (None, "lmms-eval gave no figure (an answer file to submit?)")


def test_results_are_merged_and_read_back(tmp_path):
    one = Results("m", [Figure("A", "a", "y", 2.0), Figure("A", "b", "x", 1.0, "lower", 3)], {"a": {"settings": {}}})
    two = Results("m", [Figure("C", "d", "z", None, "", note="why"), Figure("A", "b", "x", 5.0, "lower", 4)], {"d": 1})
    path = results.save(one, tmp_path / "deep" / "results.json")
    results.save(two, path)
    found = results.load(tmp_path / "deep")
    assert [(f.metric, f.value, f.count) for f in found.figures] == [("y", 2.0, None), ("x", 5.0, 4), ("z", None, None)]
    assert set(found.details) == {"a", "d"}
    text = results.table(found)
    assert "x ↓" in text
    assert "d, z: why" in text
    with pytest.raises(ValueError, match="results file is of 'm', the new figures of 'other'"):
        results.save(Results("other", [], {}), path)
    for content, message in (
        ("[", "is not JSON"),
        ('{"format": 9}', "bad.json .* has format 9"),
        ("{}", "no results file"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            results.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="must be finite or None, got inf"):
        Figure("A", "b", "x", float("inf"))
    assert json.loads(path.read_text())["figures"][1]["better"] == "lower"


def test_a_measurement_that_is_made_again_takes_the_place_of_all_it_had(tmp_path):
    """POPE by three categories, then by one: the other two, of the first run's settings, must not stand beside it."""
    first = [Figure("H", "POPE", name, 1.0, measurement="pope") for name in ("accuracy", "random F1", "popular F1")]
    others = [Figure("H", "POPE", "pope_adv f1", 2.0, measurement="lmms-eval pope_adv"), Figure("S", "s", "rate", 3.0)]
    settings = {"pope": {"settings": {"style": "strict"}, "neither": ["q"]}, "lmms-eval pope_adv": {"settings": {}}}
    path = results.save(Results("m", [*first, *others], settings), tmp_path / "results.json")
    again = Figure("H", "POPE", "accuracy", 9.0, measurement="pope")
    results.save(Results("m", [again], {"pope": {"settings": {"style": "released"}}}), path)
    found = results.load(path)
    assert {f.metric: f.value for f in found.figures} == {"accuracy": 9.0, "pope_adv f1": 2.0, "rate": 3.0}
    assert found.details == {"pope": {"settings": {"style": "released"}}, "lmms-eval pope_adv": {"settings": {}}}


@pytest.mark.parametrize(("old", "new"), [("", "pope"), ("pope", ""), ("", ""), ("one", "two")])
def test_figures_without_a_measurement_go_with_their_benchmark(old, new, tmp_path):
    """As older files have them. And of two measurements with one name for a figure, the new one alone stays."""
    figures = [Figure("H", "POPE", name, 1.0, measurement=old) for name in ("accuracy", "random F1")]
    path = results.save(Results("m", figures, {"one": 1}), tmp_path / "results.json")
    results.save(Results("m", [Figure("H", "POPE", "accuracy", 9.0, measurement=new)], {new: 2}), path)
    assert [(f.metric, f.value) for f in results.load(path).figures] == [("accuracy", 9.0)]


def test_figures_of_two_states_of_one_model_do_not_meet(tmp_path):
    """A folder that was trained on keeps its name. What replaces all there is needs no other file."""
    pope, safety = (Figure("H", name, "x", 1.0, measurement=name) for name in ("pope", "safety"))
    path = results.save(Results("m", [pope], {}, weights="old"), tmp_path / "results.json")
    with pytest.raises(ValueError, match="figures of other weights of 'm', such as pope's: name another output"):
        results.save(Results("m", [safety], {}, weights="new"), path)
    results.save(Results("m", [pope], {}, weights="new"), path)
    results.save(Results("m", [safety], {}), path)  # of a file of answers: nobody knows whose
    assert results.load(path).weights == "new"
    assert len(results.load(path).figures) == 2


def test_what_a_task_of_lmms_eval_was_run_with_is_compared():
    """A trial over 10 documents beside the whole: the figures have no count that would tell."""
    notes = ["ocrbench asks for 3 beams", "a part of mmstar asks for more"]
    trial = suite.task_details(["ocrbench", "mmstar"], notes, limit=10)
    assert trial["lmms-eval ocrbench"] == {"settings": {"limit": 10}, "notes": notes}
    assert trial["lmms-eval mmstar"]["notes"] == notes[1:]
    whole = suite.task_details(["ocrbench"], [])
    (figure,) = suite.task_figures("OCR", "OCRBench", "ocrbench", {"acc": (0.5, True)})
    assert figure.measurement in trial
    said = results.compare(Results("a", [figure], trial), Results("b", [figure], whole))
    assert "lmms-eval ocrbench, limit: 10 before, - after" in said


def test_a_benchmark_is_not_run_and_run_in_one_file(tmp_path):
    """`eval suite` without a file for MMHal-Bench, and `eval hallucination` for it, in either order: it was run."""
    missing, _ = suite.run(suite.choose(tasks=["mmhal", "safety"]), lambda: pytest.fail("loaded"), own=pytest.fail)
    suites, own = Results("m", missing, {}), Results("m", [Figure("Hallucination", "MMHal-Bench", "score", 3.0)], {})
    for name, order in (("a.json", (suites, own)), ("b.json", (own, suites))):
        for found in order:
            path = results.save(found, tmp_path / name)
        kept = {(f.benchmark, f.metric, f.value) for f in results.load(path).figures}
        assert kept == {("MMHal-Bench", "score", 3.0), ("MM-RLHF-SafetyBench", "not run", None)}


def test_an_answer_ends_before_the_first_mark():
    """As lmms-eval cuts: at the first of the marks, also where the answer begins with one."""
    assert lmms.cut("a cat\nQ: what", ["Q:", "\n"]) == "a cat"
    assert lmms.cut("Q: what", ["Q:"]) == ""
    assert lmms.cut("a cat", ["", "Q:"]) == "a cat"


def test_two_models_side_by_side():
    """Direction decides what is better; one-sided figures, other counts and other settings are said."""
    old = Results(
        "base",
        [
            Figure("A", "b", "rate", 40.0, "lower", 9),
            Figure("A", "b", "acc", 50.0, count=9),
            Figure("A", "b", "len", 9.0, ""),
        ],
        {"b": {"settings": {"judge": "gpt-4o", "count": "words"}}},
    )
    new = Results(
        "tuned",
        [
            Figure("A", "b", "rate", 30.5, "lower", 9),
            Figure("A", "b", "acc", 48.0, count=7),
            Figure("A", "b", "len", 8.0, ""),
            Figure("C", "d", "new", 1.0),
        ],
        {"b": {"settings": {"judge": "mine", "count": "words"}}},
    )
    lines = [" ".join(line.split()) for line in results.compare(old, new).splitlines()]
    assert lines[:2] == ["before base", "after tuned"]
    assert lines[4:8] == [
        "A b rate ↓ 40.00 30.50 -9.50 better",
        "acc 50.00 48.00 -2.00 worse (over 9, then 7)",
        "len 9.00 8.00 -1.00",
        "C d new - 1.00",
    ]
    assert lines[9:] == [
        "1 figures are better, 1 worse",
        "NOT COMPARABLE where settings differ:",
        "b, judge: gpt-4o before, mine after",
    ]
    assert "NOT COMPARABLE" not in results.compare(old, old)
