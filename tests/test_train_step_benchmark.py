"""The whole-step benchmark on a model of a few thousand weights: that all sides train alike, that what it counts is
what went through the model, and that a file of results is resumed, split into causes and drawn."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import step_parts, step_plot, train_step
from benchmarks.step_case import LADDER, PAIR, SWEEPS, WITH_CAUSES, Case
from benchmarks.step_flops import ceilings, decoder_weights, tower_flops, work
from benchmarks.step_models import SHAPES, build_model, build_processor, build_records, with_lora
from benchmarks.step_sides import OPTIONS, build_side
from benchmarks.step_worker import measure

TINY = Case(model="tiny", prefix=60, response=12, steps=1, sides=WITH_CAUSES)
OURS = ("live reference", "cached reference")


def in_process(case, side, device):
    return measure(case, side, device)


@pytest.fixture(scope="module")
def pair():
    pytest.importorskip("trl", minversion="1.15")
    return train_step.run_case(dataclasses.replace(TINY, groups=1), "cpu", in_process)


# --- The sides ----------------------------------------------------------------------------------------------------


def test_sides_of_a_pair_agree(pair):
    """Every rung of the ladder, TRL and the drop-in take the same step; what they ran is what their names say."""
    assert pair["faults"] == []
    figures = pair["figures"]
    assert list(figures) == [side for side in WITH_CAUSES if side != "answers once"]
    losses = [figure["losses"] for figure in figures.values()]
    assert all(one == pytest.approx(losses[0], abs=1e-5) for one in losses)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0][1] < losses[0][0]  # and the weights moved
    images = {name: figure["images"] for name, figure in figures.items()}
    assert images == {
        **dict.fromkeys(("trl", "all rows, apart", "response rows", "fused head"), 4),
        **dict.fromkeys(("separate rows", "live reference", "cached reference", "trl + mmrlhf, cached"), 1),
        "trl + mmrlhf": images["trl + mmrlhf"],
    }
    assert images["trl + mmrlhf"] in (1, 2)  # 2 where the reference model keeps a tower of its own
    ours, trl = figures["live reference"], figures["trl"]
    assert ours["policy_tokens"] == ours["reference_tokens"] < trl["policy_tokens"] == trl["reference_tokens"]
    assert figures["cached reference"]["reference_tokens"] == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"k": 3, "groups": 1}, "three pairs a prompt: ranked rows for the drop-in, 'answers once' on the ladder"),
        ({"lora": True, "groups": 1}, "adapters drawn alike; the reference is the model without them"),
    ],
    ids=["k=3", "lora"],
)
def test_sides_agree(changes, why):
    pytest.importorskip("trl", minversion="1.15")
    pytest.importorskip("peft")
    sides = ("trl", "fused head", "answers once", *OURS, "trl + mmrlhf")
    record = train_step.run_case(dataclasses.replace(TINY, sides=sides, **changes), "cpu", in_process)
    assert record["faults"] == [], why


def test_our_sides_follow_the_options():
    processor = build_processor()
    records = build_records(1, image_tokens=25, response_tokens=12, k=3)
    side = build_side("fused head", build_model("tiny", processor), processor, records)
    assert len(side.groups) == side.pairs == 3  # a record for each pair of three answers
    assert OPTIONS["live reference"].share_prefix
    assert [name for name, _ in LADDER] == [name for name, _ in LADDER if name in OPTIONS]
    with pytest.raises(ValueError, match="no side is called 'fast'; there are trl, trl \\+ mmrlhf"):
        build_side("fast", side.model, processor, records)


def test_a_side_that_disagrees_gets_no_ratio():
    def figure(losses, seconds):
        return {"losses": losses, "seconds": seconds}

    figures = {
        "trl": figure([0.69, 0.60], 2.0),
        "live reference": figure([0.69, 0.6001, 0.5], 1.0),  # more steps than TRL: compared as far as both go
        "cached reference": figure([0.69, 0.61], 0.5),
        "separate rows": {"error": "out of memory"},
    }
    faults = train_step.compare(TINY, figures)
    assert [fault.partition(":")[0] for fault in faults] == ["cached reference", "separate rows"]
    assert figures["live reference"]["ratio"] == 2.0
    assert "ratio" not in figures["cached reference"]
    nan = {"trl": figure([0.69], 1.0), "live reference": figure([float("nan")], 1.0)}
    assert len(train_step.compare(TINY, nan)) == 1


@pytest.mark.slow
def test_a_side_in_a_process_of_its_own(subprocess_python):
    """The figures come back; so does a failure, and a side over its time is stopped."""
    said = subprocess_python(
        "from benchmarks.step_case import Case\n"
        "from benchmarks.step_worker import measure_apart\n"
        "case = Case(model='tiny', prefix=60, response=12, steps=1)\n"
        "if __name__ == '__main__':\n"
        "    found = measure_apart(case, 'cached reference')\n"
        "    assert found['seconds'] > 0 and found['peak_bytes'] != 0, found\n"
        "    assert measure_apart(case, 'nobody')['error'].startswith('ValueError: no side is called')\n"
        "    assert measure_apart(case, 'live reference', limit=0.01) == {'error': 'stopped after 0 s'}\n"
        "    print('came back')\n",
        timeout=400,
    )
    assert "came back" in said


# --- Flops and ceilings -------------------------------------------------------------------------------------------


def test_tokens_are_those_that_were_counted(pair):
    """The ceiling is made of nominal lengths; the hooks saw the real ones, which differ by the answers' spread."""
    for side in ("trl", *OURS):
        nominal, counted = work(dataclasses.replace(TINY, groups=1), side), pair["figures"][side]
        assert counted["policy_tokens"] == pytest.approx(nominal.policy_tokens, rel=0.1)
        assert counted["reference_tokens"] == pytest.approx(nominal.reference_tokens, rel=0.1)


def test_decoder_weights_and_tower_flops_are_the_models():
    processor = build_processor()
    with torch.device("meta"):
        model = build_model("small", processor)
    inner = model.model.language_model.layers
    assert decoder_weights(SHAPES["small"]) == sum(p.numel() for p in inner.parameters() if p.dim() == 2)
    shape, tokens = SHAPES["small"], 64
    linear = sum(
        p.numel() for n, p in model.model.visual.named_parameters() if p.dim() > 1 and not n.startswith("merger")
    )
    merger = sum(p.numel() for p in model.model.visual.merger.parameters() if p.dim() == 2)
    patches = 4 * tokens
    attention = 4 * shape.tower_hidden * patches * (patches + 3 * 64)  # one full block, three of windows of 64 patches
    assert tower_flops(shape, tokens) == 2 * patches * linear + 2 * tokens * merger + attention


@pytest.mark.parametrize(
    ("k", "prefix", "response", "expected"),
    [
        (2, 1350, 200, 1.77),  # 2 (P + R) / (P + 2 R), both sides with a reference
        (5, 1350, 200, 13.2),  # 20 (P + R) / (P + 5 R)
    ],
)
def test_token_ceiling(k, prefix, response, expected):
    case = Case(prefix=prefix, response=response, k=k)
    assert ceilings(case, "live reference")["tokens"] == pytest.approx(expected, rel=0.02)
    assert ceilings(case, "cached reference")["tokens"] == pytest.approx(expected * 4 / 3, rel=0.02)


def test_trl_with_triton_scores_response_rows():
    case = Case()
    assert work(case, "trl", triton=True).head < work(case, "trl").head / 3
    assert ceilings(case, "live reference", triton=True)["flops"] < ceilings(case, "live reference")["flops"]


def test_parts_of_a_step(capsys):
    """Every part of both sizes is printed; those that multiply have a floor."""
    words = ["--model", "tiny", "--prefix", "60", "--response", "12", "--k", "2", "3", "--rounds", "1"]
    assert step_parts.main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines].count("reference") == 2
    assert [len(line) for line in lines if line[0] in ("tower", "decoder", "head", "reference")] == [4] * 8


# --- Models -------------------------------------------------------------------------------------------------------


def test_the_7b_shape_is_the_published_one():
    """Built without memory: 8.29 G parameters (7.62 G of text, lm_head included), as published."""
    processor = build_processor()
    with torch.device("meta"):
        model = build_model("qwen2_5_vl_7b", processor, dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(8.292e9, rel=1e-3)
    assert model.dtype == torch.bfloat16
    tower = model.config.vision_config
    assert tower.fullatt_block_indexes == [7, 15, 23, 31]
    assert not any(p.requires_grad for p in model.model.visual.parameters())
    assert model.config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_adapters_are_drawn_alike():
    pytest.importorskip("peft")
    processor = build_processor()
    first, second = (with_lora(build_model("tiny", processor, seed=seed)) for seed in (0, 1))
    drawn = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (first, second)]
    assert drawn[0].keys() == drawn[1].keys()
    assert all("language_model" in name and ".lora_" in name for name in drawn[0])
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


# --- Sweeps, results, pictures ------------------------------------------------------------------------------------


def made_up(case, side, device):
    """Figures as `measure` gives them, a second for a teraflop."""
    spent = work(case, side).total / 1e12
    names = ("policy_tokens", "reference_tokens", "images")
    return {"seconds": spent, "losses": [0.69], "peak_bytes": 1 << 30, **dict.fromkeys(names, 1)}


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    path = tmp_path / "sweep.json"
    words = ["--sweep", "tiny", "--write", str(path), "--device", "cpu"]
    assert train_step.main([*words, "--only", "k=3"], measure=made_up) == 0
    assert "there already" not in capsys.readouterr().out
    assert train_step.main(words, measure=made_up) == 0
    assert capsys.readouterr().out.count("there already") == 1
    known = json.loads(path.read_text())["cases"]
    assert len(known) == len(SWEEPS["tiny"])
    assert {"command", "commit", "machine", "versions", "date", "figures", "causes"} <= set(known[0])
    assert train_step.main([*words, "--limit", "1"], measure=made_up) == 0  # nothing is begun that cannot end in time
    assert "not reached" not in capsys.readouterr().out
    monkeypatch.setattr(train_step, "commit", lambda: "another")
    assert train_step.main([*words, "--limit", "1"], measure=made_up) == 0
    assert capsys.readouterr().out.count("not reached") == len(SWEEPS["tiny"])
    assert train_step.main([*words, "--only", "lora"], measure=made_up) == 0
    cases = json.loads(path.read_text())["cases"]
    assert [case["commit"] for case in cases].count("another") == 1
    assert len(cases) == len(known)


def test_a_failed_side_is_kept_and_told(tmp_path, capsys):
    def failing(case, side, device):
        return {"error": "RuntimeError: no"} if side == "live reference" else made_up(case, side, device)

    path = tmp_path / "one.json"
    words = ["--model", "tiny", "--device", "cpu", "--write", str(path)]
    assert train_step.main(words, measure=failing) == 1
    assert "FAULT live reference: RuntimeError: no" in capsys.readouterr().out
    (record,) = json.loads(path.read_text())["cases"]
    assert record["figures"]["live reference"] == {"error": "RuntimeError: no"}
    assert record["figures"]["cached reference"]["ratio"] > 1


def test_causes_multiply_to_the_ratio():
    for k in (2, 3):
        case = dataclasses.replace(TINY, k=k, sides=WITH_CAUSES)
        record = train_step.run_case(case, "cpu", made_up)
        factors = record["causes"]
        named = ["trainer", "rows scored", "kernel", *(["pairs"] if k > 2 else []), "vision", "prefix", "reference"]
        assert list(factors) == named
        assert math.prod(factors.values()) == pytest.approx(record["figures"]["cached reference"]["ratio"])
        assert "the ratio to the cached reference, split" in train_step.table(record)
    assert train_step.run_case(dataclasses.replace(TINY, sides=PAIR), "cpu", made_up)["causes"] is None


def test_every_sweep_can_be_listed(capsys):
    for name in SWEEPS:
        assert train_step.main(["--sweep", name, "--list"]) == 0
    with pytest.raises(SystemExit, match="no case of cpu holds k=9"):
        train_step.main(["--sweep", "cpu", "--only", "k=9"])
    assert len(capsys.readouterr().out.splitlines()) == sum(map(len, SWEEPS.values())) + len(SWEEPS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "large"}, "model must be one of tiny, mini, small, qwen2_5_vl_7b, got 'large'"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16"),
        ({"prefix": 30}, "prefix must be at least 31, got 30"),
        ({"k": 1}, "k must be at least 2, got 1"),
        ({"peer_steps": 0}, "peer_steps must be at least 1, got 0"),
    ],
)
def test_bad_cases(given, message):
    with pytest.raises(ValueError, match=message):
        Case(**given)


def test_pictures(tmp_path, capsys):
    """A picture of each kind from the cpu sweep's cases, and none from a single pair."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "cpu.json"
    assert train_step.main(["--sweep", "cpu", "--write", str(path), "--device", "cpu"], measure=made_up) == 0
    records = json.loads(path.read_text())["cases"]
    panels = step_plot.panels(records)
    assert [(title, along, [len(line) for line in group]) for title, along, group in panels] == [
        ("K = 2, trained whole, answers of 100", "prefix", [4, 3]),
        ("prompt of 320, trained whole, answers of 100", "k", [3]),
    ]
    capsys.readouterr()
    assert step_plot.main([str(path)]) == 0
    names = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()]
    assert names == ["cpu_speedup.svg", "cpu_scaling.svg", "cpu_causes.svg"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    single = tmp_path / "single.json"
    single.write_text(json.dumps({"cases": [record for record in records if record["case"]["lora"]]}))
    assert step_plot.main([str(single)]) == 0
    assert "nothing to draw" in capsys.readouterr().out


def test_points_leave_out_sides_without_a_ratio():
    records = [train_step.run_case(case, "cpu", made_up) for case in SWEEPS["cpu"] if case.model == "mini"]
    del records[1]["figures"]["live reference"]["ratio"]
    (line,) = step_plot.lines(records, "prefix")
    x, _ = step_plot.points(line, "prefix", "live reference", step_plot.prompt_seconds)
    assert x == [1300, 4000]
