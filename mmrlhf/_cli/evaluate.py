"""`mmrlhf eval`: measure a model, a reward model or a file of answers, and compare two of them.

    mmrlhf eval rewardbench DATA --model REWARD_MODEL | --scores FILE
    mmrlhf eval hallucination DATA --benchmark chair|pope|mmhal --model MODEL | --answers FILE
    mmrlhf eval safety DATA --model MODEL | --answers FILE
    mmrlhf eval suite --model MODEL --chair FILE --mmhal FILE --safety FILE
    mmrlhf eval compare BEFORE AFTER

Each writes into a folder: results.json (a measurement takes the place of the one before it, others stay),
answers-*.jsonl and judge.jsonl, which a stopped command goes on with. All run in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mmrlhf._cli import measure


def add(commands: Any, debug: argparse.ArgumentParser) -> None:
    """The command `eval` and its five."""
    own = commands.add_parser("eval", help="measure models on benchmarks").add_subparsers(
        required=True, metavar="COMMAND"
    )
    asked = (_data, _answered, _judge)
    for name, function, text, parts in (
        ("rewardbench", measure.rewardbench, "does a reward model prefer what people preferred?", (_data, _reward)),
        ("hallucination", measure.hallucination, "what does a model say that is not there?", asked),
        ("safety", measure.safety, "is a model safe? the eleven rows of MM-RLHF's SafetyBench", asked),
        ("suite", measure.suite, "MM-RLHF's ten dimensions, by lmms-eval where it has the benchmark", asked[1:]),
        ("compare", measure.compare, "two results side by side", ()),
    ):
        command = own.add_parser(name, help=text, description=text, parents=[debug], allow_abbrev=False)
        command.set_defaults(run=function if name == "compare" else _alone(name, function))
        for part in parts:
            part(command)
        if name == "hallucination":
            _hallucination_options(command)
        elif name == "safety":
            text = "what a refusal is: mmrlhf's own rule, or the released lists of words (default: strict)"
            command.add_argument("--style", choices=("strict", "released"), default="strict", help=text)
        elif name == "suite":
            _suite_options(command)
        elif name == "compare":
            command.add_argument("before", help="a results.json, or the folder of one")
            command.add_argument("after", help="the same of the other model")


def _alone(name: str, function: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, refused under torchrun: its copies would ask, pay and write the same side by side."""

    def run(arguments: argparse.Namespace) -> int:
        from mmrlhf.train import setup

        setup.single_process(f"mmrlhf eval {name}")
        return function(arguments)

    return run


def _data(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", help="the benchmark's rows: a .jsonl, .json or .parquet file, or a folder of them")


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", help="the commit of a hub id given as --model")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with --model")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto: as saved)")
    command.add_argument("--root", help="folder the pictures are looked up in; default: that of the data")
    command.add_argument("--on-bad-row", choices=("raise", "skip"), default="raise", help="default: raise")
    command.add_argument("--name", help="the model's name in the results; default: the folder, or the file of answers")
    command.add_argument("-o", "--output", help="folder (default runs/eval/NAME)")


def _reward(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a reward model that mmrlhf trained: a folder")
    source.add_argument("--scores", help="rewards instead of a model: rows of {id, rewards: [better, worse]}")
    command.add_argument("--benchmark", choices=("mm_rlhf", "vl"), default="mm_rlhf", help="default: mm_rlhf")
    text = "what a score is based on: a critique the model writes, the data's own, or none (default: generated)"
    command.add_argument("--critic", choices=("generated", "given", "none"), default="generated", help=text)
    _common(command)


def _answered(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a model to answer: a folder or hub id")
    source.add_argument("--answers", help="answers instead of a model: rows of {id, answer}")
    command.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default 512)")
    command.add_argument("--batch-size", type=int, default=8, help="questions at a time (default 8)")
    _common(command)


def _judge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--judge", help="a model behind an endpoint that speaks OpenAI's protocol, or local:FOLDER")
    command.add_argument("--judge-url", help="the endpoint (default: OPENAI_BASE_URL, else OpenAI's)")
    text = "environment variable that holds the key (default OPENAI_API_KEY)"
    command.add_argument("--judge-key-env", default="OPENAI_API_KEY", help=text)
    command.add_argument("--judge-workers", type=int, default=8, help="requests at a time (default 8)")
    text = "a prompt of your own for the judge: extract (chair), rate (mmhal), states, noise, harm, risk (safety)"
    command.add_argument("--judge-template", action="append", default=[], metavar="KIND=FILE", help=text)


def _hallucination_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--benchmark", choices=("chair", "pope", "mmhal"), required=True)
    text = "chair: count a word once an answer, or every mention (default: words)"
    command.add_argument("--count", choices=("words", "mentions"), default="words", help=text)
    text = "chair: COCO's instances_*.json, which say what is in the pictures; default: the rows' objects"
    command.add_argument("--coco-instances", nargs="+", default=[], metavar="FILE", help=text)
    text = "chair: COCO's captions_*.json, whose objects count as there too"
    command.add_argument("--coco-captions", nargs="+", default=[], metavar="FILE", help=text)
    text = "pope: how yes and no are read (default: strict; released: the published script)"
    command.add_argument("--style", choices=("strict", "released"), default="strict", help=text)


def _suite_options(command: argparse.ArgumentParser) -> None:
    for name in ("chair", "mmhal", "safety"):
        command.add_argument(f"--{name}", metavar="FILE", help=f"rows of {name}, measured by mmrlhf itself")
    command.add_argument("--dimension", action="append", default=[], help="one of the ten; may be repeated")
    text = "a benchmark, an lmms-eval task, chair, mmhal or safety; may be repeated"
    command.add_argument("--task", action="append", default=[], help=text)
    command.add_argument("--limit", type=int, help="lmms-eval: documents a task, for a trial")
    command.add_argument("--include-path", help="lmms-eval: a folder with tasks of your own")
    text = "print lmms-eval's own command and what each benchmark needs, and do nothing else"
    command.add_argument("--print", dest="show", action="store_true", help=text)
    command.set_defaults(count="words", coco_instances=[], coco_captions=[], style="strict")
