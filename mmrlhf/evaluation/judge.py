"""Judges: a model that reads a text and answers in a form that can be parsed, and what keeps its verdicts honest.

    requests -> judge_all(judge, requests, parse, cache) -> Verdicts: values, unparsable, failed

A judge is anything callable that takes a text and returns one: `ChatJudge` (an endpoint that speaks OpenAI's chat
protocol), `LocalJudge` (a model folder), or a function. Every reply is appended to the cache file as it comes, keyed by
judge and text, so that a stopped run goes on and nothing is paid for twice; equal texts are one question. A reply that
does not parse is no zero: it is listed, and the measures say over how many verdicts they are. A request that fails
after its retries is listed too, not cached, and asked again by the next run; a refused key or an unknown model stops
the run at once, and keeps the replies that were under way.
Not covered: judges that look at pictures (the benchmarks here give them texts).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmrlhf.data.fields import want
from mmrlhf.data.resumable import ResumableLines

T = TypeVar("T")
Judge = Callable[[str], str]
logger = logging.getLogger(__name__)


class JudgeStopped(RuntimeError):
    """No further request can succeed: the key was refused, the model is unknown, the package is too old."""


class Unparsable(ValueError):
    """A judge's reply is not of the form that was asked for."""


@dataclass(frozen=True)
class Request:
    id: str
    text: str


@dataclass
class Verdicts(Generic[T]):
    """What a judge said, by id; and the ids it said nothing usable of, each with the reply or the error."""

    values: dict[str, T] = field(default_factory=dict)
    unparsable: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    asked: int = 0  # texts that were not in the cache

    @property
    def missing(self) -> int:
        return len(self.unparsable) + len(self.failed)

    def as_dict(self) -> dict[str, Any]:
        """For a results file: how many, and which have no verdict."""
        return {
            "judged": len(self.values),
            "unparsable": [{"id": name, "reply": reply[:500]} for name, reply in self.unparsable],
            "failed": [{"id": name, "error": error[:500]} for name, error in self.failed],
        }


class ChatJudge:
    """A model behind an endpoint that speaks OpenAI's chat protocol; needs the `openai` package (mmrlhf[eval]).

    `base_url` and `api_key` default to OPENAI_BASE_URL and OPENAI_API_KEY; an endpoint of one's own needs no key.
    Timeouts, lost connections, 408, 409, 429 and 5xx are retried `retries` times with growing waits, or after as long
    as the answer says. `temperature` or `max_tokens` of None are not sent; `extra` goes into every request as it is.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        timeout: float = 120.0,
        retries: int = 6,
        extra: dict[str, Any] | None = None,
    ):
        try:
            import openai
        except ImportError as error:
            raise ImportError("a judge behind an endpoint needs openai: pip install mmrlhf[eval]") from error
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        api_key = api_key or os.environ.get("OPENAI_API_KEY")
        if not api_key:
            if not base_url:
                raise ValueError(f"the judge {model} needs a key: set OPENAI_API_KEY, or name an endpoint of your own")
            api_key = "none"
        self._openai = openai
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries)
        self._request: dict[str, Any] = {"model": model}
        if temperature is not None:
            self._request["temperature"] = temperature
        if max_tokens is not None:
            self._request["max_tokens"] = max_tokens
        if extra:
            self._request["extra_body"] = extra
        # the key is no part of it: two keys give the same verdicts
        self.name = json.dumps([base_url, self._request], sort_keys=True)

    def __call__(self, text: str) -> str:
        fatal = (
            self._openai.AuthenticationError,
            self._openai.PermissionDeniedError,
            self._openai.NotFoundError,
        )
        try:
            reply = self._client.chat.completions.create(messages=[{"role": "user", "content": text}], **self._request)
        except fatal as error:
            raise JudgeStopped(f"the judge {self._request['model']} refuses every request: {error}") from error
        if not getattr(reply, "choices", None):
            raise RuntimeError("the endpoint's answer holds no choices")
        return reply.choices[0].message.content or ""


class LocalJudge:
    """A model folder or hub id, loaded as any other and answering greedily; a text-only one will do."""

    workers = 1

    def __init__(self, path: str, *, device: str = "cpu", dtype: str = "auto", max_new_tokens: int = 512):
        from mmrlhf.evaluation.answers import model_fingerprint
        from mmrlhf.models.load import load_model, load_processor

        self.name = json.dumps(["local", model_fingerprint(path), max_new_tokens])
        self._model = load_model(path, device=device, dtype=dtype)
        processor = load_processor(path)
        self._text_only = not hasattr(processor, "tokenizer")
        self._processor = _TextProcessor(processor) if self._text_only else processor
        self._length = max_new_tokens

    def __call__(self, text: str) -> str:
        from mmrlhf.models import generate

        # a tokenizer's own template takes plain strings, a processor's parts
        content: Any = text if self._text_only else [{"type": "text", "text": text}]
        prompt: generate.Prompt = ([{"role": "user", "content": content}], [])
        return generate.answer(self._model, self._processor, [prompt], max_new_tokens=self._length)[0]


class _TextProcessor:
    """A tokenizer with a processor's face: what it returns goes to a device and a dtype in one call."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, text: list[str], **options: Any) -> Any:
        from transformers import BatchFeature

        return BatchFeature(dict(self.tokenizer(text, **options)))


def judge_all(
    judge: Judge,
    requests: Sequence[Request],
    parse: Callable[[str], T],
    *,
    cache: str | Path | None = None,
    workers: int = 8,
    say: Callable[[str], None] | None = None,
) -> Verdicts[T]:
    """Ask a judge about every request, at most `workers` at a time (one for a local model), and parse its replies.

    `parse` raises `Unparsable`. `cache` is a JSON Lines file of replies; those of the same judge (its `name`, or the
    function's) and text are reused, and one run at a time may write it. Verdicts come in the order of the requests.
    Raises ValueError for an id that appears twice or `workers` below 1, JudgeStopped where every further request would
    fail.
    """
    twice = [name for name, count in Counter(request.id for request in requests).items() if count > 1]
    if twice:
        raise ValueError(f"request id {twice[0]!r} appears twice")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers!r}")
    name = getattr(judge, "name", None) or getattr(judge, "__qualname__", type(judge).__name__)
    verdicts: Verdicts[T] = Verdicts()
    failed: dict[str, str] = {}  # by text
    with nullcontext() if cache is None else ResumableLines(cache, what="a judge's cache") as lines:
        store = _Cache(lines, str(name))

        def ask(request: Request) -> None:
            try:
                reply = judge(request.text)
                if not isinstance(reply, str):
                    raise TypeError(f"the judge must return text, got {type(reply).__name__}")
            except JudgeStopped:
                raise
            except Exception as error:  # whatever one request met, the others go on and this one is named
                failed[request.text] = f"{type(error).__name__}: {error}"
                logger.warning("no verdict on %s: %s", request.id, failed[request.text])
            else:
                store.put(request, reply)  # in this thread: also where the run stops meanwhile

        pending: dict[str, Request] = {}
        for request in requests:
            if store.get(request.text) is None:
                pending.setdefault(request.text, request)
        verdicts.asked = len(pending)
        with ThreadPoolExecutor(max_workers=min(workers, getattr(judge, "workers", workers))) as pool:
            running = [pool.submit(ask, request) for request in pending.values()]
            try:
                for count, future in enumerate(as_completed(running), 1):
                    future.result()
                    if say is not None and (count % 50 == 0 or count == len(running)):
                        say(f"{count} of {len(running)} verdicts")
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        replies = {request.id: store.get(request.text) for request in requests}
    for request in requests:
        reply = replies[request.id]
        if reply is None:
            verdicts.failed.append((request.id, failed[request.text]))
            continue
        try:
            verdicts.values[request.id] = parse(reply)
        except Unparsable:
            verdicts.unparsable.append((request.id, reply))
    return verdicts


class _Cache:
    """Replies by judge and text: {"key", "id", "reply"} a line of the file, or (`lines` None) in memory alone."""

    def __init__(self, lines: ResumableLines | None, judge_name: str):
        self._lines, self._judge = lines, judge_name
        self._known = {} if lines is None else dict(lines.read(_key_and_reply))
        self._lock = threading.Lock()

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._judge}\0{text}".encode()).hexdigest()

    def get(self, text: str) -> str | None:
        return self._known.get(self._key(text))

    def put(self, request: Request, reply: str) -> None:
        key = self._key(request.text)
        with self._lock:
            self._known[key] = reply
            if self._lines is not None:
                self._lines.append({"key": key, "id": request.id, "reply": reply})


def _key_and_reply(row: dict[str, Any]) -> tuple[str, str]:
    return want(row, "key", str), want(row, "reply", str)


def parse_yes_no(reply: str) -> bool:
    """The first word, which must be yes or no; marks around it are no part of it."""
    head = re.match(r"[\s\"'*_`#>(\[]*([A-Za-z]+)", reply)
    word = head.group(1).lower() if head else ""
    if word not in ("yes", "no"):
        raise Unparsable(f"the reply must begin with yes or no, got {reply[:80]!r}")
    return word == "yes"


def fill(template: str, **values: str) -> str:
    """A template's {names} replaced, each wherever it stands; braces in the values are left alone.

    A template with none of the names, but as many bare {} as there are values, takes them in the order given: the form
    of published judge prompts. Raises ValueError for a name that the template lacks.
    """
    names = [f"{{{name}}}" for name in values]
    if template.count("{}") == len(values) and not any(name in template for name in names):
        pieces = template.split("{}")
        return "".join(piece + value for piece, value in zip(pieces, (*values.values(), ""), strict=True))
    missing = [name for name in names if name not in template]
    if missing:
        raise ValueError(f"the judge's template lacks {', '.join(missing)}")
    pattern = re.compile("|".join(map(re.escape, names)))
    return pattern.sub(lambda found: values[found.group(0)[1:-1]], template)
