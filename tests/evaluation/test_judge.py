"""Judges: retries, errors, the cache that pays nothing twice, and replies that cannot be read."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from fakejudge import serve
from mmrlhf.evaluation import judge as judges
from mmrlhf.evaluation.judge import JudgeStopped, Request, Unparsable, fill, judge_all, parse_yes_no
from tiny import tiny_folder, tiny_model

pytest.importorskip("openai", reason="the openai package is not installed: pip install mmrlhf[eval]")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    logging.getLogger("openai").setLevel(logging.ERROR)


def requests(*texts: str) -> list[Request]:
    return [Request(f"r{index}", text) for index, text in enumerate(texts)]


def test_an_endpoint_is_asked_as_it_should_be():
    with serve(lambda text, attempt: "Yes." if "dog" in text else "no") as endpoint:
        judge = judges.ChatJudge("m", base_url=endpoint.url, api_key="secret", extra={"seed": 3})
        verdicts = judge_all(judge, requests("a dog", "a cat"), parse_yes_no)
    assert list(verdicts.values.items()) == [("r0", True), ("r1", False)]
    assert (verdicts.asked, verdicts.missing) == (2, 0)
    assert sorted(endpoint.texts()) == ["a cat", "a dog"]
    body = endpoint.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("m", 0.0, 1024, 3)
    assert endpoint.headers[0]["authorization"] == "Bearer secret"
    assert "secret" not in judge.name


def test_busy_and_broken_answers_are_tried_again():
    """429, 500, 503 and a dead line on the first tries; the reply counts once it comes."""
    first = {"a": (429, {}), "b": (500, {}), "c": (503, {}), "d": None}
    with serve(lambda text, attempt: first[text] if attempt == 0 else "yes") as endpoint:
        judge = judges.ChatJudge("m", base_url=endpoint.url, retries=2)
        verdicts = judge_all(judge, requests(*"abcd"), parse_yes_no)
    assert verdicts.values == dict.fromkeys(("r0", "r1", "r2", "r3"), True)
    assert sorted(endpoint.texts()) == [*"aabbccdd"]


def test_one_request_that_fails_is_named_and_asked_again_next_time(tmp_path):
    """The others' replies are kept; a bad request (400) is not retried, and never cached."""
    cache = tmp_path / "deep" / "judge.jsonl"

    def answer(text, attempt):
        return (400, {"error": {"message": "content filter"}}) if text == "b" and attempt == 0 else "no"

    with serve(answer) as endpoint:
        judge = judges.ChatJudge("m", base_url=endpoint.url, retries=3)
        first = judge_all(judge, requests("a", "b"), parse_yes_no, cache=cache)
        assert first.values == {"r0": False}
        ((name, error),) = first.failed
        assert name == "r1"
        assert "content filter" in error
        assert first.as_dict()["failed"][0]["id"] == "r1"
        second = judge_all(judge, requests("a", "b"), parse_yes_no, cache=cache)
    assert (second.values, second.asked) == ({"r0": False, "r1": False}, 1)
    assert sorted(endpoint.texts()) == ["a", "b", "b"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_an_unknown_model_stops_the_run(status, tmp_path):
    """Every further request would fail the same way: not 100 failures, but one error."""
    with serve(lambda text, attempt: (status, {"error": {"message": "no such thing"}})) as endpoint:
        judge = judges.ChatJudge("m", base_url=endpoint.url)
        with pytest.raises(JudgeStopped, match=r"the judge m refuses every request: .*no such thing"):
            judge_all(judge, requests(*map(str, range(100))), parse_yes_no, cache=tmp_path / "c.jsonl", workers=2)
    assert len(endpoint.requests) < 20
    assert (tmp_path / "c.jsonl").read_text() == ""


def test_a_timeout_is_a_failure_with_a_name():
    gate = threading.Event()
    with serve(lambda text, attempt: "yes" if gate.wait(20) else "no") as endpoint:
        judge = judges.ChatJudge("m", base_url=endpoint.url, timeout=0.2, retries=0)
        verdicts = judge_all(judge, requests("a"), parse_yes_no)
        gate.set()
    assert verdicts.values == {}
    assert "Timeout" in verdicts.failed[0][1]


def test_replies_that_cannot_be_read_are_listed_and_paid_once(tmp_path):
    """Also an empty reply and one whose content is null; the next run reads them from the cache."""
    cache = tmp_path / "judge.jsonl"
    said = {"a": "yes", "b": "It depends", "c": "", "d": ...}
    with serve(lambda text, attempt: said[text]) as endpoint:
        judge = judges.ChatJudge("m", base_url=endpoint.url)
        for asked in (4, 0):
            verdicts = judge_all(judge, requests(*"abcd"), parse_yes_no, cache=cache)
            assert verdicts.values == {"r0": True}
            assert verdicts.unparsable == [("r1", "It depends"), ("r2", ""), ("r3", "")]
            assert (verdicts.asked, verdicts.missing) == (asked, 3)
    assert len(endpoint.requests) == 4


def test_cache_is_of_one_judge_and_one_text_and_survives_a_kill(tmp_path):
    cache, calls = tmp_path / "judge.jsonl", []

    def one(text):
        calls.append(text)
        return "yes"

    judge_all(one, requests("a", "b"), parse_yes_no, cache=cache, workers=1)
    judge_all(one, [Request("other id", "a")], parse_yes_no, cache=cache)
    assert calls == ["a", "b"]
    judge_all(lambda text: "no", requests("a"), parse_yes_no, cache=cache)  # another judge
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    cache.write_bytes(lines[0] + lines[1][:20])  # killed while writing
    judge_all(one, requests("a", "b"), parse_yes_no, cache=cache)
    assert calls == ["a", "b", "b"]
    assert [json.loads(line)["id"] for line in cache.read_text().splitlines()] == ["r0", "r1"]
    cache.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"judge.jsonl:1: not a line of a judge's cache"):
        judge_all(one, requests("a"), parse_yes_no, cache=cache)


def test_replies_under_way_are_kept_when_the_run_stops(tmp_path):
    """The endpoint refuses one request while another is being answered: that answer is paid for."""
    stopped = threading.Event()

    def judge(text):
        if text == "refused":
            stopped.set()
            raise JudgeStopped("no such model")
        stopped.wait(10)
        return "yes"

    cache = tmp_path / "judge.jsonl"
    with pytest.raises(JudgeStopped):
        judge_all(judge, requests("a", "refused"), parse_yes_no, cache=cache, workers=2)
    assert [json.loads(line)["reply"] for line in cache.read_text().splitlines()] == ["yes"]


def test_equal_texts_are_one_question(tmp_path):
    """Refusals read alike, and some prompts show nothing but the answer: one reply serves them all."""
    calls = []

    def judge(text):
        calls.append(text)
        return "no" if text == "a" else None

    verdicts = judge_all(judge, requests("a", "b", "a", "b"), parse_yes_no, cache=tmp_path / "c.jsonl", workers=1)
    assert (calls, verdicts.asked) == (["a", "b"], 2)
    assert verdicts.values == {"r0": False, "r2": False}
    why = "TypeError: the judge must return text, got NoneType"
    assert verdicts.failed == [("r1", why), ("r3", why)]


def test_what_a_judge_cannot_do_without(monkeypatch):
    with pytest.raises(ValueError, match="needs a key: set OPENAI_API_KEY"):
        judges.ChatJudge("m")
    with pytest.raises(ValueError, match="request id 'r0' appears twice"):
        judge_all(lambda text: "yes", requests("a") * 2, parse_yes_no)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        judge_all(lambda text: "yes", requests("a"), parse_yes_no, workers=0)
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install mmrlhf\[eval\]"):
        judges.ChatJudge("m", api_key="k")


def test_a_local_model_judges_with_its_cache(tmp_path):
    """A tiny model's reply is no yes or no: what counts is that it is asked once, and listed."""
    folder = tiny_folder("llava_onevision", tmp_path / "model")
    judge = judges.LocalJudge(str(folder), max_new_tokens=2)
    for asked in (1, 0):
        verdicts = judge_all(judge, requests("what is in the image ?"), parse_yes_no, cache=tmp_path / "c.jsonl")
        assert (len(verdicts.values) + len(verdicts.unparsable), verdicts.failed, verdicts.asked) == (1, [], asked)


def test_a_local_model_without_eyes_judges_too(tmp_path):
    """A tokenizer alone instead of a processor: the usual judge is a language model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    _, processor = tiny_model("llava_onevision")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ends)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    verdicts = judge_all(judges.LocalJudge(str(tmp_path), max_new_tokens=2), requests("a dog ?"), lambda reply: reply)
    assert verdicts.failed == []
    assert isinstance(verdicts.values["r0"], str)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("Yes.", True), ("**No**", False), ('"yes"', True), ("NO, because", False), ("Yesterday", None), ("Not", None)],
)
def test_yes_and_no_stand_first(reply, verdict):
    if verdict is None:
        with pytest.raises(Unparsable):
            parse_yes_no(reply)
    else:
        assert parse_yes_no(reply) is verdict


def test_templates_leave_braces_of_texts_alone():
    assert fill("{a} and {b}, {a}", a="{b}", b="{x} {}") == "{b} and {x} {}, {b}"
    assert fill("{} / {}", a="{}", b="{b}") == "{} / {b}"
    with pytest.raises(ValueError, match=r"template lacks \{b\}"):
        fill("{a} {c}", a="", b="")
