"""The command `mmrlhf`: train, reference, reward, trl, eval, data check, data view, demo, doctor.

What a user can get wrong (a setting, a path, a row, a missing package) is one line on stderr and exit code 2; a run
that fails on its way is exit code 1; one stopped by a signal is 128 + the signal's number. `--debug` shows the
traceback. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrlhf._cli import evaluate, reward

USER_ERROR, FAILURE, BROKEN_PIPE = 2, 1, 128 + 13  # SIGPIPE


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    # argparse gives settings up at the first option: those after it (train RECIPE --plan key=value) come back here.
    if rest and (not hasattr(arguments, "settings") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "urllib3", "filelock", "fsspec", "matplotlib", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        return BROKEN_PIPE if _unread() else _fail(error, arguments.debug, FAILURE)
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, FileExistsError, ImportError) as error:
        return _fail(error, arguments.debug, USER_ERROR)
    except (RuntimeError, OSError, MemoryError) as error:
        return _fail(error, arguments.debug, FAILURE)
    except KeyboardInterrupt:
        return 130


def _unread() -> bool:
    """Whether nobody reads stdout any more (`mmrlhf … | head`), which is no failure; then it leads nowhere."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file of the system's
        return False
    poller = select.poll()
    poller.register(stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0)):
        return False
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stdout)  # or the interpreter's own flush at exit would fail
    return True


def _fail(error: BaseException, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"mmrlhf: {str(error) or type(error).__name__}", file=sys.stderr)
    if not debug and code == FAILURE:
        print("mmrlhf: --debug shows where it happened", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Every command and option there is."""
    from mmrlhf import __version__

    parser = argparse.ArgumentParser(
        prog="mmrlhf", description="Align multimodal LLMs with human preferences.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mmrlhf {__version__}")
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, function, text in (
        ("train", _train, "train a model on preferences"),
        ("reference", _reference, "compute and keep the reference of a recipe, and nothing else"),
    ):
        command = commands.add_parser(name, help=text, description=text, parents=[debug], allow_abbrev=False)
        text = "a YAML file, or the name of a recipe: dpo, rlhf_v, rlhf_v_released or mm_dpo (mm_rlhf_reward is for "
        command.add_argument("recipe", nargs="?", help=f"{text}`mmrlhf reward train`)")
        command.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as optim.lr=1e-6")
        if name == "train":
            text = "say what the run would do and how much memory it would take, and do nothing else"
            command.add_argument("--plan", action="store_true", help=text)
        command.set_defaults(run=function)

    text = "train as `trl dpo --config` does, on mmrlhf's collator, forward and losses"
    hosted = commands.add_parser("trl", help=text, description=text, parents=[debug], allow_abbrev=False)
    hosted.add_argument("config", help="a YAML file with the keys of `trl dpo` and of PreferenceConfig")
    hosted.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="--key value", help="arguments that override the file's"
    )
    hosted.set_defaults(run=_trl)

    data = commands.add_parser("data", help="look at preference data").add_subparsers(required=True, metavar="COMMAND")
    check = data.add_parser("check", help="say what a file holds, and what is wrong with it", parents=[debug])
    check.add_argument("--model", help="count tokens with the processor of this folder or hub id")
    check.add_argument("--revision", help="the commit of a hub id given as --model")
    check.add_argument("--trust-remote-code", action="store_true", help="run code that comes with --model")
    check.add_argument("--pairs", default="all", choices=("all", "adjacent", "best_vs_rest"), help="default: all")
    check.set_defaults(run=_check)
    view = data.add_parser("view", help="write a page that shows the first groups", parents=[debug])
    view.add_argument("-o", "--output", help="the page; default: beside the data")
    view.add_argument("--limit", type=int, default=100, help="groups shown (default 100)")
    view.set_defaults(run=_view)
    for command in (check, view):
        command.add_argument("path", help="a .jsonl, .json or .parquet file, or a folder of them")
        command.add_argument("--format", default="auto", help="default: recognised by the first rows")
        command.add_argument("--root", help="folder the pictures are looked up in; default: that of the data")

    evaluate.add(commands, debug)
    reward.add(commands, debug, settings=_settings)

    demo = commands.add_parser(
        "demo", help="train a small model end to end on made data, and write the report", parents=[debug]
    )
    demo.add_argument("-o", "--output", default="runs/demo", help="folder (default runs/demo)")
    demo.add_argument("--quick", action="store_true", help="smaller and faster; shows the way, not the effect")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say what this machine and installation can do", parents=[debug])
    doctor.set_defaults(run=_doctor)
    return parser


def _settings(arguments: argparse.Namespace) -> Any:
    """The recipe (a file, a name, or neither) and the key=value words."""
    from mmrlhf import config

    recipe, words = arguments.recipe, list(arguments.settings)
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        recipe, words = None, [recipe, *words]
    odd = [word for word in words if "=" not in word]
    if odd:
        raise ValueError(f"settings are written key=value, got {odd[0]!r}")
    if recipe in config.RECIPES and not Path(recipe).is_file():
        return config.load(None, [f"recipe={recipe}", *words])
    if recipe is not None and not Path(recipe).is_file():
        raise ValueError(f"{recipe} is neither a file nor a recipe; recipes: {', '.join(config.RECIPES)}")
    return config.load(recipe, words)


def _train(arguments: argparse.Namespace) -> int:
    from mmrlhf.train.loop import train

    settings = _settings(arguments)
    if arguments.plan:
        from mmrlhf.train.plan import plan

        told = plan(settings).text()
        if os.environ.get("RANK", "0") == "0":
            print(told)
        return 0
    folder = train(settings)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks
        return 0
    print(f"the model lies in {folder / 'model'}")
    if settings.report:
        from mmrlhf.report import write_report

        try:
            print(f"the report lies in {write_report(folder)}")
        except ImportError as error:
            print(f"no report: {error}", file=sys.stderr)
    return 0


def _reference(arguments: argparse.Namespace) -> int:
    from mmrlhf.train.prepare import cache_only

    print(f"the reference lies in {cache_only(_settings(arguments))}")
    return 0


def _trl(arguments: argparse.Namespace) -> int:
    from mmrlhf.integrations.trl_yaml import run

    print(f"the model lies in {run(arguments.config, arguments.words)}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from mmrlhf.data.check import check

    processor = None
    if arguments.model:
        from mmrlhf.models.load import load_processor

        processor = load_processor(
            arguments.model, trust_remote_code=arguments.trust_remote_code, revision=arguments.revision
        )
    report = check(
        arguments.path, format=arguments.format, root=arguments.root, processor=processor, pairs=arguments.pairs
    )
    print(report.text())
    return report.status


def _view(arguments: argparse.Namespace) -> int:
    from mmrlhf.data.view import view

    page = view(arguments.path, arguments.output, format=arguments.format, root=arguments.root, limit=arguments.limit)
    print(f"the page lies in {page}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from mmrlhf import demo

    return demo.run(Path(arguments.output), quick=arguments.quick)


def _doctor(_: argparse.Namespace) -> int:
    from mmrlhf.doctor import describe

    print(describe())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
