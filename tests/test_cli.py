"""The command line: one line and exit code 2 for what a user gets wrong, and every command does its work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmrlhf import cli
from mmrlhf.cli import main
from mmrlhf.config import RECIPES
from mmrlhf.doctor import describe
from tiny import tiny_folder
from tinyrun import facts_of, make_data, metrics_of

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = ["device=cpu", "groups_per_step=2", "tokens_per_batch=256", "max_steps=1", "samples=1", "sample_tokens=3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("cli")
    return f"model.path={tiny_folder('llava_onevision', root / 'model')}", f"data.path={make_data(root / 'data', 3)}"


def test_commands_and_options_are_frozen():
    """Adding one is a decision: change it here too, and tell the users."""
    found = {}

    def walk(prefix, parser):
        choices = [a for a in parser._actions if a.choices is not None and hasattr(a.choices, "items")]
        if not choices:
            found[prefix] = sorted(o for a in parser._actions for o in (a.option_strings or [a.dest]) if o != "-h")
        for action in choices:
            for name, command in action.choices.items():
                walk(f"{prefix} {name}".strip(), command)

    walk("", cli.build_parser())
    common = ["--debug", "--help"]
    scoring = ["--samples", "--temperature", "--seed", "--max-new-tokens", "--tokens-per-batch", "--max-group-tokens"]
    reading = ["-o", "--output", "--video-frames", "--format", "--root", "--on-bad-row", "--device", "--dtype"]
    reading += ["--revision", "--trust-remote-code"]
    loading = ["--model", "--revision", "--trust-remote-code", "--device", "--dtype", "--root", "--on-bad-row"]
    loading += ["--name", "-o", "--output"]
    asking = [*loading, "--answers", "--max-new-tokens", "--batch-size", "--judge", "--judge-url", "--judge-key-env"]
    asking += ["--judge-workers", "--judge-template"]
    suite = ["--chair", "--mmhal", "--safety", "--dimension", "--task", "--limit", "--include-path", "--print"]
    coco = ["--coco-instances", "--coco-captions"]
    assert found == {
        "train": sorted([*common, "--plan", "recipe", "settings"]),
        "reference": sorted([*common, "recipe", "settings"]),
        "trl": sorted([*common, "config", "words"]),
        "reward train": sorted([*common, "recipe", "settings"]),
        "reward score": sorted([*common, "model", "data", "--critic", *scoring, *reading]),
        "data check": sorted(
            [*common, "--model", "--revision", "--trust-remote-code", "--pairs", "--format", "--root", "path"]
        ),
        "data view": sorted([*common, "-o", "--output", "--limit", "--format", "--root", "path"]),
        "demo": sorted([*common, "-o", "--output", "--quick"]),
        "eval rewardbench": sorted([*common, *loading, "data", "--scores", "--benchmark", "--critic"]),
        "eval hallucination": sorted([*common, *asking, "data", "--benchmark", "--count", "--style", *coco]),
        "eval safety": sorted([*common, *asking, "data", "--style"]),
        "eval suite": sorted([*common, *asking, *suite]),
        "eval compare": sorted([*common, "before", "after"]),
        "doctor": common,
    }


def test_train_from_a_file_with_words_writes_model_and_report(world, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"recipe: rlhf_v\noutput: {tmp_path / 'run'}\n")
    assert main(["train", str(recipe), *world, *QUICK]) == 0
    out = capsys.readouterr().out
    assert f"the model lies in {tmp_path / 'run' / 'model'}" in out
    assert f"the report lies in {tmp_path / 'run' / 'report.html'}" in out
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    assert facts_of(tmp_path / "run")["recipe"] == "rlhf_v"
    assert len(metrics_of(tmp_path / "run")) == 1


def test_recipe_by_name_or_none(world, tmp_path):
    assert main(["train", "mm_dpo", f"output={tmp_path / 'a'}", "report=false", *world, *QUICK]) == 0
    assert facts_of(tmp_path / "a")["recipe"] == "mm_dpo"
    assert not (tmp_path / "a" / "report.html").exists()
    assert main(["train", f"output={tmp_path / 'b'}", "report=false", *world, *QUICK]) == 0
    assert facts_of(tmp_path / "b")["recipe"] == "dpo"


def test_plan_prints_tables_and_leaves_nothing_behind(world, tmp_path, capsys):
    assert main(["train", "mm_dpo", "--plan", f"output={tmp_path / 'run'}", *world, *QUICK]) == 0
    out = capsys.readouterr().out
    for word in ("steps", "utilization", "AdamW's moments", "exponentials of the loss", "peak", "fit"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_report_without_matplotlib_says_which_extra(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["train", f"output={tmp_path / 'run'}", *world, *QUICK]) == 0
    captured = capsys.readouterr()
    assert "no report: " in captured.err
    assert "mmrlhf[report]" in captured.err
    assert "the model lies in" in captured.out


def test_reference_fills_the_cache_that_train_reads(world, tmp_path, capsys):
    words = ["mm_dpo", f"output={tmp_path / 'run'}", "report=false", *world, *QUICK]
    assert main(["reference", *words]) == 0
    assert f"the reference lies in {tmp_path / 'run' / 'reference'}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "run.json").exists()
    assert main(["train", *words]) == 0
    assert facts_of(tmp_path / "run")["reference"]["shards_computed"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml is neither a file nor a recipe; recipes: dpo, rlhf_v,"),
        (["train", "dpo", "lr"], "settings are written key=value, got 'lr'"),
        (["train", "dpo", "optim.lr=-1"], "optim.lr must be finite and positive, got -1.0"),
        (["train", "dpo", "output=OUT"], "model.path must name a local folder or a hub id"),
        (["train", "dpo", "output=OUT", "MODEL"], "data.path must name a file or a folder"),
        (["train", "dpo", "output=OUT", "MODEL", "data.path=no.jsonl"], "data.path: no.jsonl does not exist"),
        (["train", "dpo", "output=OUT", "model.path=/no/where"], "/no/where is neither a folder nor a hub id"),
        (["train", "mm_rlhf_reward"], "is trained by `mmrlhf reward train`, not by `mmrlhf train`"),
        (["train", "mm_rlhf_reward", "--plan"], "is trained by `mmrlhf reward train`, not by `mmrlhf train`"),
        (["reference", "mm_rlhf_reward"], "is trained by `mmrlhf reward train`, not by `mmrlhf reference`"),
        (["reward", "train", "dpo"], "recipe dpo is trained by `mmrlhf train`, not by `mmrlhf reward train`"),
        (["reference", "dpo", "loss.kind=simpo", "output=OUT"], "loss.kind simpo compares with no reference"),
        (["data", "view", "no.jsonl"], "no.jsonl"),
    ],
)
def test_what_users_get_wrong_is_one_line(words, message, world, tmp_path, capsys):
    words = [word.replace("OUT", str(tmp_path / "run")).replace("MODEL", world[0]) for word in words]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().splitlines()[-1].startswith("mmrlhf: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["train", "reference"])
def test_help_names_every_recipe_and_who_trains_it(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(recipe in told for recipe in RECIPES)
    assert "mm_rlhf_reward is for `mmrlhf reward train`" in told


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "nowhere.yaml", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "_settings" in error


def test_unknown_options_and_commands_are_argparse_errors(capsys):
    for words in (["train", "--quick"], ["fly"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    capsys.readouterr()


def test_failing_run_is_exit_code_1(world, tmp_path, capsys, monkeypatch):
    from mmrlhf.train import loop

    def fail(settings):
        raise loop.NonFiniteError("3 steps in a row")

    monkeypatch.setattr(loop, "train", fail)
    assert main(["train", "dpo", f"output={tmp_path / 'run'}", *world]) == 1
    assert "mmrlhf: 3 steps in a row\nmmrlhf: --debug shows where it happened" in capsys.readouterr().err


def test_data_check_and_view(world, tmp_path, capsys):
    path = world[1].removeprefix("data.path=")
    assert main(["data", "check", path]) == 0
    assert "groups" in capsys.readouterr().out
    assert main(["data", "check", path, "--model", world[0].removeprefix("model.path=")]) == 0
    assert "tokens" in capsys.readouterr().out
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{not json\n")
    assert main(["data", "check", str(bad)]) != 0
    assert main(["data", "view", path, "--output", str(tmp_path / "page.html"), "--limit", "2"]) == 0
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_data_check_passes_its_options_on(world, capsys, monkeypatch):
    from mmrlhf.models import load

    path, asked = world[1].removeprefix("data.path="), []
    monkeypatch.setattr(load, "load_processor", lambda model, **options: asked.append((model, options)))
    words = ["data", "check", path, "--model", "a/b", "--revision", "c0ffee", "--trust-remote-code"]
    assert main([*words, "--pairs", "adjacent"]) == 0
    assert asked == [("a/b", {"trust_remote_code": True, "revision": "c0ffee"})]
    adjacent = capsys.readouterr().out
    assert main(words) == 0
    assert capsys.readouterr().out != adjacent


def test_a_reader_that_goes_away_is_no_failure(world):
    """As `mmrlhf … | head` does: no message, and the exit code a program that SIGPIPE ends has."""
    command = [sys.executable, "-m", "mmrlhf", "data", "check", world[1].removeprefix("data.path=")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_broken_pipe_is_a_failure(capsys, monkeypatch):
    def cut(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_doctor", cut)
    assert main(["doctor"]) == 1
    assert "mmrlhf: [Errno 32] Broken pipe" in capsys.readouterr().err


def test_demo_gets_its_arguments(tmp_path, monkeypatch):
    from mmrlhf import demo

    calls = []
    monkeypatch.setattr(demo, "run", lambda output, *, quick: calls.append((output, quick)) or 0)
    assert main(["demo", "--output", str(tmp_path), "--quick"]) == 0
    assert calls == [(tmp_path, True)]


def test_doctor_names_every_part_and_why(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("machine", "packages", "torchvision", "extension", "backends", "torch ", "linear_logp on cpu: "):
        assert part in text
    for name in ("cuda", "triton", "reference"):
        assert f"  {name}: " in text


def test_doctor_survives_a_broken_part(monkeypatch):
    from mmrlhf import doctor

    def broken():
        raise OSError("libfoo.so: cannot open")

    monkeypatch.setattr(doctor, "_extension", broken)
    text = describe()
    assert "cannot be asked: OSError: libfoo.so: cannot open" in text
    assert "backends" in text


def test_the_module_is_the_command_and_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['mmrlhf', '--version']; import runpy\n"
        "try: runpy.run_module('mmrlhf', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, env=dict(os.environ), timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1].split(maxsplit=1)[1].replace("'", '"')) == []
    assert done.stdout.startswith("mmrlhf ")
