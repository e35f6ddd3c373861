"""LoRA on the lm_head, through our loop and the drop-in forward: what PEFT's own forward would have trained.

TRL cannot be the other side: its DPOTrainer refuses an adapter there, which it would not train.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from mmrlhf.batch import layout_of
from mmrlhf.config import LossConfig
from mmrlhf.integrations.forward import add_forward
from mmrlhf.integrations.rows import BATCH, PackedRows
from mmrlhf.models.load import load_model
from mmrlhf.models.parts import base_model, lm_head
from mmrlhf.ops import reference
from mmrlhf.train.loop import train
from mmrlhf.train.objective import Objective, Totals
from mmrlhf.train.scoring import response_rows
from ordinary import ordinary_hidden
from runfixtures import data_file, model_folder, one_thread
from tiny import batch_of, tiny_groups, tiny_model
from tinyrun import settings_for

__all__ = ["data_file", "model_folder", "one_thread"]


def scene(family):
    """Two equal models with a LoRA on the lm_head and in the layers, whose b is not zero, and a batch."""
    model, processor = tiny_model(family)
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    groups = tiny_groups(processor, (2, 3))
    batch = batch_of(groups)
    batch = dataclasses.replace(batch, reference_logp=torch.full((batch.num_scored,), -3.0))
    return adapted, copy.deepcopy(adapted), groups, batch


def trained(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def peft_logp(model, groups, targets):
    """[N]: ordinary rows through the model's own forward and PEFT's own head."""
    logits = base_model(model).get_output_embeddings()(ordinary_hidden(model, groups))
    return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def assert_gradients(model, other):
    ours, want = trained(model), trained(other)
    assert sum("lm_head.lora_" in name for name in ours) == 2
    for name in want:
        torch.testing.assert_close(ours[name], want[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_step_of_our_loop_is_that_of_the_merged_model(family):
    model, other, groups, batch = scene(family)
    totals = Totals(pairs=batch.pairs.shape[0], sft_tokens=9)
    settings = LossConfig(beta=0.3, sft_weight=0.25)
    placed, hidden = response_rows(model, batch, share_prefix=True)
    out = Objective(settings)(hidden, lm_head(model), placed, totals)
    out.loss.backward()
    scores = reference.sequence_score(batch.reference_logp, batch.cu_seqlens)
    objective = reference.Objective(
        batch.cu_seqlens,
        batch.pairs,
        reference_scores=scores,
        beta=0.3,
        sft_weight=0.25,
        num_pairs=totals.pairs,
        num_sft_tokens=9,
    )
    want = objective(peft_logp(other, groups, batch.targets))
    want.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    assert_gradients(model, other)


def test_the_drop_in_forward_sees_it():
    """Log-probabilities, their gradients, and the statistics that take the logits themselves."""
    model, other, groups, batch = scene("llava_onevision")
    add_forward(model, self_check=True)
    out = base_model(model)(**{BATCH: PackedRows(batch, layout_of(batch))}, mmrlhf_statistics=("mean_logit",))
    want = peft_logp(other, groups, batch.targets)
    torch.testing.assert_close(out["logp"], want, rtol=1e-4, atol=1e-5)
    out["logp"].sum().backward()
    want.sum().backward()
    assert_gradients(model, other)
    with torch.no_grad():
        logits = base_model(other).get_output_embeddings()(ordinary_hidden(other, groups))
    torch.testing.assert_close(out["mean_logit"], logits.mean(-1), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():  # as the reference of an adapter is scored
        bare = base_model(model)(**{BATCH: PackedRows(batch, layout_of(batch))})["logp"]
    with other.disable_adapter():
        torch.testing.assert_close(bare, peft_logp(other, groups, batch.targets), rtol=1e-4, atol=1e-5)


def test_our_loop_trains_and_saves_it(tmp_path, model_folder, data_file):
    """Also through the self-check, which compares the head taken with the model's own logits."""
    words = ["lora.enabled=true", "lora.targets=[q_proj,lm_head]", "lora.dropout=0", "max_steps=3"]
    run = train(settings_for(tmp_path / "run", data_file, *words, model=model_folder))
    saved = load_file(run / "model" / "adapter_model.safetensors")
    factors = {name.rsplit(".", 2)[-2]: value for name, value in saved.items() if "lm_head.lora_" in name}
    assert set(factors) == {"lora_A", "lora_B"}
    assert factors["lora_B"].abs().max() > 0  # where it starts
    ((a, b, _),) = lm_head(load_model(run / "model")).adapters
    assert torch.equal(a, factors["lora_A"])
    assert torch.equal(b, factors["lora_B"])


def test_dropout_before_it_is_refused(tmp_path, model_folder, data_file):
    words = ["lora.enabled=true", "lora.targets=[lm_head]", "lora.dropout=0.1"]
    with pytest.raises(ValueError, match=r"lm_head .* dropout of 0\.1"):
        train(settings_for(tmp_path / "run", data_file, *words, model=model_folder))
