"""T01, T02: a loss or gradient that is not finite never reaches weights or moments; too many in a row stop the run."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.train import loop
from mmrlhf.train.loop import NonFiniteError, train
from mmrlhf.train.objective import Objective
from mmrlhf.train.optim import Optimizer
from tinyrun import facts_of, metrics_of, settings_for

BAD = {"loss": math.nan, "gradient": math.inf, "one gradient": math.nan}


@pytest.fixture
def spoil(monkeypatch):
    """Makes the micro-batches of some steps bad, through the real loss; records weights and moments at each step."""

    def install(what: str, steps: set[int]) -> list[tuple[bool, dict[str, torch.Tensor]]]:
        seen: list[tuple[bool, dict[str, torch.Tensor]]] = []
        count = {"step": 0}
        zero_grad, call = Optimizer.zero_grad, Objective.__call__

        def snapshot(optimizer):
            weights = {name: p.detach().clone() for name, p in optimizer.stepped.items()}
            return weights | {key: value.clone() for key, value in optimizer.state().items()}

        def counted_zero_grad(self):
            count["step"] += 1
            seen.append((count["step"] in steps, snapshot(self)))
            zero_grad(self)

        def spoiled(self, hidden, head, batch, totals):
            if count["step"] in steps:
                if what == "loss":
                    hidden = hidden * math.nan
                elif what == "gradient":
                    hidden.register_hook(lambda gradient: gradient * math.inf)
                else:
                    hidden.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), math.nan))
            return call(self, hidden, head, batch, totals)

        monkeypatch.setattr(Optimizer, "zero_grad", counted_zero_grad)
        monkeypatch.setattr(Objective, "__call__", spoiled)
        return seen

    return install


@pytest.mark.parametrize("what", BAD)
def test_bad_step_changes_no_bit_and_is_counted(what, spoil, tmp_path, model_folder, data_file):
    seen = spoil(what, {3})
    run = train(settings_for(tmp_path / "run", data_file, "epochs=2", model=model_folder))
    before, after = seen[2], seen[3]
    assert before[0]
    assert not after[0]
    assert set(before[1]) == set(after[1])
    for name, value in before[1].items():
        assert torch.equal(value, after[1][name]), name
    assert not torch.equal(seen[3][1]["lm_head.weight"], seen[4][1]["lm_head.weight"]), "the next step moves again"
    lines = metrics_of(run)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["loss" if what == "loss" else "grad_norm"] is None
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 3)
    assert facts_of(run)["skipped_steps"] == 1
    saved = load_file(run / "model" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


def test_too_many_in_a_row_stop_the_run_and_keep_the_good_checkpoint(spoil, tmp_path, model_folder, data_file):
    spoil("loss", {4, 5, 6})
    settings = settings_for(
        tmp_path / "run", data_file, "epochs=9", "save_every=1", "max_bad_steps=3", model=model_folder
    )
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* loss nan, gradient norm nan, groups g\d, g\d"):
        train(settings)
    facts = facts_of(tmp_path / "run")
    assert facts["status"] == "failed"
    assert "NonFiniteError" in facts["error"]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000005"
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(newest / "model.safetensors").values())
    assert not (tmp_path / "run" / "model").exists()


def test_bad_steps_apart_from_one_another_do_not_stop_it(spoil, tmp_path, model_folder, data_file):
    spoil("loss", {1, 2, 4, 5})
    run = train(settings_for(tmp_path / "run", data_file, "epochs=2", "max_bad_steps=3", model=model_folder))
    assert facts_of(run)["skipped_steps"] == 4


def test_the_check_is_what_protects_the_weights(spoil, tmp_path, model_folder, data_file, monkeypatch):
    """With the check taken out the same fault does reach the weights: the tests above hold something."""
    spoil("loss", {2})
    fake = type("math", (), {"isfinite": staticmethod(lambda value: True)})
    monkeypatch.setattr(loop, "math", fake)
    run = train(settings_for(tmp_path / "run", data_file, model=model_folder))
    saved = load_file(run / "model" / "model.safetensors")
    assert not all(bool(tensor.isfinite().all()) for tensor in saved.values())
