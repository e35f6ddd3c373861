"""`mmrlhf reward`: train a critique-based reward model, and let one score preference data.

mmrlhf reward train RECIPE key=value …
mmrlhf reward score MODEL DATA -o OUT
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrlhf.config import RECIPES, REWARD_RECIPE

NUMBERS = (
    ("--samples", int, 1, "critiques an answer, whose scores are averaged; the paper found that to hurt"),
    ("--temperature", float, 1.0, "of the samples, where there are several; one critique is greedy"),
    ("--seed", int, 0, "of the samples"),
    ("--max-new-tokens", int, 1024, "of a critique"),
    ("--tokens-per-batch", int, 32768, "critiques to be written counted in full"),
    ("--max-group-tokens", int, 32768, "a longer group is a bad row"),
    ("--video-frames", int, 8, "taken from a video"),
)


def add(commands: Any, debug: argparse.ArgumentParser, *, settings: Callable[[argparse.Namespace], Any]) -> None:
    """The command `reward` and its two. `settings`: what reads a recipe and its key=value words."""
    own = commands.add_parser("reward", help="train a reward model, or score data with one").add_subparsers(
        required=True, metavar="COMMAND"
    )
    text = "train a reward model: critiques, and the scores that follow them"
    train = own.add_parser("train", help=text, description=text, parents=[debug], allow_abbrev=False)
    train.add_argument("recipe", nargs="?", help=f"a YAML file with recipe: {REWARD_RECIPE}, or nothing for its values")
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as optim.lr=1e-6")
    train.set_defaults(run=lambda arguments: _train(arguments, settings))

    text = "write critiques and scores of every answer, and the reward margin of every pair"
    score = own.add_parser("score", help=text, description=text, parents=[debug], allow_abbrev=False)
    score.add_argument("model", help="a folder that `mmrlhf reward train` wrote (RUN/model), or a hub id of one")
    score.add_argument("data", help="a .jsonl, .json or .parquet file, or a folder of them")
    score.add_argument("-o", "--output", required=True, help="the file to write; OUTPUT.journal keeps what is done")
    text = "write critiques (default), take the data's, or score answers alone"
    score.add_argument("--critic", default="generated", choices=("generated", "given", "none"), help=text)
    for name, kind, value, text in NUMBERS:
        score.add_argument(name, type=kind, default=value, help=f"{text} (default {value})")
    score.add_argument("--format", default="auto", help="default: recognised by the first rows")
    score.add_argument("--root", help="folder the pictures are looked up in; default: that of the data")
    score.add_argument("--on-bad-row", default="raise", choices=("raise", "skip"), help="default: raise")
    score.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    score.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto: as saved)")
    score.add_argument("--revision", help="the commit of a hub id given as MODEL")
    score.add_argument("--trust-remote-code", action="store_true", help="run code that comes with MODEL")
    score.set_defaults(run=_score)


def _train(arguments: argparse.Namespace, settings: Callable[[argparse.Namespace], Any]) -> int:
    from mmrlhf.reward.train import train

    recipe, words = arguments.recipe, arguments.settings
    written = recipe is not None and (recipe in RECIPES or Path(recipe).exists() or "=" not in recipe)
    if not written and not any(word.startswith("recipe=") for word in (recipe or "", *words)):
        arguments.recipe, arguments.settings = REWARD_RECIPE, [*([recipe] if recipe else []), *words]
    asked = settings(arguments)
    folder = train(asked)
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks
        print(f"the reward model lies in {folder / 'model'}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from mmrlhf.reward.score import score_file

    names = [name.removeprefix("--").replace("-", "_") for name, *_ in NUMBERS]
    names += ["critic", "format", "root", "on_bad_row", "device", "dtype", "revision", "trust_remote_code"]
    options = {name: getattr(arguments, name) for name in names}
    done = score_file(arguments.model, arguments.data, arguments.output, **options)
    if os.environ.get("RANK", "0") == "0":
        print(done.text())
    return 0
