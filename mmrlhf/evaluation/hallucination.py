"""What a model says that is not there: CHAIR and Object HalBench, and POPE. (MMHal-Bench, with a judge: `mmhal`.)

CHAIR (arXiv 1809.02156) names the objects of a caption (`coco`) and counts those the picture lacks. Object HalBench
(arXiv 2312.00849, appendix D.2) reports two of its figures over 300 pictures and 8 prompts: the share of captions with
such an object among those that name any object (`chair_s_refine`, its response level), and the share of such mentions
(`chair_i`, its mention level), a word counted once a caption. It lets a language model list the objects of an answer;
`extract_objects` does so with a judge. A model that says less errs less: recall and length stand beside, always.

POPE (arXiv 2305.10355) asks whether an object is there. Shares are in [0, 1], None where there is nothing to divide by.
Not covered: AMBER (lmms-eval has it as amber_g), MHumanEval (people judge).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrlhf.data.schema import BadRow
from mmrlhf.evaluation import coco
from mmrlhf.evaluation.judge import Judge, Request, Unparsable, Verdicts, fill, judge_all
from mmrlhf.evaluation.rows import Question, first, id_of, question_of, read

DESCRIBE = "Provide a thorough description of the given image."  # the first of Object HalBench's prompts


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Caption:
    """A picture to describe, and the COCO classes that are in it."""

    id: str
    question: Question
    objects: frozenset[str]


@dataclass(frozen=True)
class ChairResult:
    captions: int
    with_objects: int  # captions that name any object
    chair_s: float | None  # captions that name an absent object, of all captions
    chair_s_refine: float | None  # ... of the captions that name any object
    chair_i: float | None  # mentions of absent objects, of all mentions
    recall: float | None  # classes named, of the classes that are there
    mentions: int
    words_per_caption: float | None
    absent: dict[str, tuple[str, ...]] = field(repr=False)  # caption -> the words that name what is not there


def read_captions(
    path: str | Path,
    *,
    objects: Mapping[str, Iterable[str]] | None = None,
    prompt: str = DESCRIBE,
    on_bad_row: str = "raise",
) -> tuple[list[Caption], list[BadRow]]:
    """Rows {"id", "image", "objects": [...]} with an optional "prompt" (or "question").

    Objects are classes or synonyms, singular or plural; one that is neither is a bad row. With `objects`, by image id
    (see `coco_objects`), rows take theirs from there, by "image_id", else "id".
    """

    def parse(row: Mapping[str, Any]) -> Caption:
        if objects is None:
            named = row.get("objects")
            if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
                raise ValueError("'objects' must be a list of texts: the objects in the picture")
        else:
            image = str(first(row, ("image_id", "id", "question_id")))
            if image not in objects:
                raise ValueError(f"image {image!r} is not in the annotations")
            named = list(objects[image])
        known = coco.vocabulary()
        classes = {name: known.object_of(name) for name in named}
        unknown = [name for name, found in classes.items() if found is None]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of the 80 COCO classes and no synonym of one")
        return Caption(
            id_of(row), question_of(row, default_prompt=prompt), frozenset(name for name in classes.values() if name)
        )

    return read(path, parse, on_bad_row=on_bad_row)


def coco_objects(instances: Sequence[str | Path], captions: Sequence[str | Path] = ()) -> dict[str, set[str]]:
    """Image id -> COCO classes in the picture, from COCO's annotation files (instances_val2014.json, captions_…).

    The instances' categories, and the objects that people named in their captions: what CHAIR takes for the truth, for
    which both files are needed. A picture that no file of instances lists is left out. Raises ValueError for a file of
    another form.
    """
    known = coco.vocabulary()
    found: dict[str, set[str]] = {}
    for path in instances:
        data = _json(path)
        try:
            names = {entry["id"]: known.object_of(entry["name"]) for entry in data["categories"]}
            for entry in data["images"]:
                found.setdefault(str(entry["id"]), set())
            for entry in data["annotations"]:
                name = names[entry["category_id"]]
                if name is None:
                    raise ValueError(f"{path}: category {entry['category_id']} is none of the 80 COCO classes")
                found.setdefault(str(entry["image_id"]), set()).add(name)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of COCO instances: it lacks {error}") from error
    for path in captions:
        data = _json(path)
        try:
            for entry in data["annotations"]:
                image, caption = str(entry["image_id"]), entry["caption"]
                if image in found:  # captions alone are half the truth of a picture
                    found[image] |= {mention.object for mention in coco.mentions(caption)}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of COCO captions: it lacks {error}") from error
    return found


def _json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def chair(
    captions: Sequence[Caption],
    answers: Mapping[str, str],
    *,
    phrases: Mapping[str, Sequence[str]] | None = None,
    count: str = "words",
) -> ChairResult:
    """CHAIR of one answer a picture.

    `count`: "words" counts a word once a caption, as Object HalBench does; "mentions" counts each, as CHAIR does.
    `phrases`, by id, are the objects that a judge found in each answer (see `coco.named`); without them, every word of
    it is looked at.
    Raises ValueError for a caption without an answer, or without phrases where some are given.
    """
    if count not in ("words", "mentions"):
        raise ValueError(f"count must be words or mentions, got {count!r}")
    for name, given in (("answer", answers), ("list of objects", phrases)):
        lacking = [c.id for c in captions if given is not None and c.id not in given]
        if lacking:
            raise ValueError(f"{len(lacking)} captions have no {name}: {', '.join(lacking[:5])}")
    absent: dict[str, tuple[str, ...]] = {}
    with_objects = mentions = wrong = recalled = there = length = 0
    for caption in captions:
        text = answers[caption.id]
        said = coco.mentions(text) if phrases is None else coco.named(phrases[caption.id])
        if count == "words":
            said = list(dict.fromkeys(said))
        missing = tuple(m.word for m in said if m.object not in caption.objects)
        if missing:
            absent[caption.id] = missing
        with_objects += bool(said)
        mentions += len(said)
        wrong += len(missing)
        recalled += len({m.object for m in said} & caption.objects)
        there += len(caption.objects)
        length += len(text.split())
    return ChairResult(
        captions=len(captions),
        with_objects=with_objects,
        chair_s=ratio(len(absent), len(captions)),
        chair_s_refine=ratio(len(absent), with_objects),
        chair_i=ratio(wrong, mentions),
        recall=ratio(recalled, there),
        mentions=mentions,
        words_per_caption=ratio(length, len(captions)),
        absent=absent,
    )


EXTRACT = """List every physical object, animal and person that the following description of a picture says is in it.
Write each as a short noun phrase in the singular, as the description calls it. Leave out what it says is not there, \
places, weather, colours, feelings and parts of objects.
Answer with a JSON list of strings and nothing else, for example ["dog", "traffic light"]. If there is none, answer [].

Description:
{description}"""


def extract_objects(
    judge: Judge, answers: Mapping[str, str], *, template: str = EXTRACT, **options: Any
) -> Verdicts[list[str]]:
    """The objects that a judge finds in each answer. As in the released code, answers of at most three words hold none
    and are not sent. `options` go to `judge_all`."""
    short = {name: list[str]() for name, text in answers.items() if len(text.split()) <= 3}
    requests = [Request(name, fill(template, description=text)) for name, text in answers.items() if name not in short]
    verdicts = judge_all(judge, requests, parse_list, **options)
    verdicts.values = {**short, **verdicts.values}
    return verdicts


def parse_list(reply: str) -> list[str]:
    """A JSON list of texts, alone or in a code block."""
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", reply.strip())
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Unparsable(str(error)) from error
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Unparsable("the reply must be a JSON list of texts")
    return value


@dataclass(frozen=True)
class Probe:
    id: str
    question: Question
    label: bool
    category: str


@dataclass(frozen=True)
class PopeResult:
    """Precision, recall and F1 of "yes". An answer that says neither is wrong, and neither yes nor no."""

    probes: int
    accuracy: float
    precision: float | None
    recall: float | None
    f1: float | None
    yes: float  # share of answers that say yes
    neither: tuple[str, ...] = field(repr=False, default=())


def read_probes(path: str | Path, *, on_bad_row: str = "raise") -> tuple[list[Probe], list[BadRow]]:
    """Rows {"id" or "question_id", "image", "text" or "question", "label": "yes" | "no"}, optional "category"."""

    def parse(row: Mapping[str, Any]) -> Probe:
        label = str(first(row, ("label", "answer"))).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"'label' must be yes or no, got {label!r}")
        return Probe(id_of(row), question_of(row), label == "yes", str(row.get("category") or "all"))

    return read(path, parse, on_bad_row=on_bad_row)


def says_yes(answer: str, *, style: str = "strict") -> bool | None:
    """Yes, no, or None for neither.

    "strict": the first word where it is yes or no, else the one of the two words that stands in the answer.
    "released": what POPE's script does: of the first sentence, no where "No", "not" or "no" is one of its words, and
    yes otherwise; an empty answer or "There is none" is a yes.
    """
    if style == "released":
        said = answer.split(".")[0].replace(",", "").split(" ")
        return not any(word in said for word in ("No", "not", "no"))
    if style != "strict":
        raise ValueError(f"style must be strict or released, got {style!r}")
    said = re.findall(r"[a-z]+", answer.lower())
    if said[:1] in (["yes"], ["no"]):
        return said[0] == "yes"
    found = {"yes", "no"} & set(said)
    return found == {"yes"} if len(found) == 1 else None


def pope(probes: Sequence[Probe], answers: Mapping[str, str], *, style: str = "strict") -> dict[str, PopeResult]:
    """Figures of all probes under "all", and of each category. Raises ValueError for a probe without an answer, or none
    at all."""
    if not probes:
        raise ValueError("probes must not be empty")
    lacking = [p.id for p in probes if p.id not in answers]
    if lacking:
        raise ValueError(f"{len(lacking)} probes have no answer: {', '.join(lacking[:5])}")
    said = {p.id: says_yes(answers[p.id], style=style) for p in probes}
    categories = sorted({p.category for p in probes} - {"all"})
    chosen = {"all": list(probes), **{c: [p for p in probes if p.category == c] for c in categories}}
    return {name: _pope(rows, said) for name, rows in chosen.items()}


def _pope(probes: Sequence[Probe], said: Mapping[str, bool | None]) -> PopeResult:
    yes = sum(said[p.id] is True for p in probes)
    hits = sum(said[p.id] is True and p.label for p in probes)
    positives = sum(p.label for p in probes)
    precision, recall = ratio(hits, yes), ratio(hits, positives)
    return PopeResult(
        probes=len(probes),
        accuracy=sum(said[p.id] is p.label for p in probes) / len(probes),
        precision=precision,
        recall=recall,
        f1=ratio(2 * hits, yes + positives),
        yes=yes / len(probes),
        neither=tuple(p.id for p in probes if said[p.id] is None),
    )
