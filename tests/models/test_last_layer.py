"""The last layer's MLP runs on the rows that are read; that values and gradients stay is what test_shared_prefix holds
for every family."""

from __future__ import annotations

import copy

import pytest
import torch

from mmrlhf.batch import Layout, layout_of, score_rows
from mmrlhf.models import last_layer, shared_prefix
from mmrlhf.models.parts import decoder
from tiny import FAMILIES, batch_of, tiny_groups, tiny_model


def mlp_rows(model, run):
    """How many rows each layer's MLP multiplied while `run` ran."""
    seen = []
    handles = []
    for layer in decoder(model).layers:
        first = next(module for module in layer.mlp.modules() if isinstance(module, torch.nn.Linear))
        handles.append(first.register_forward_pre_hook(lambda module, args: seen.append(args[0][..., 0].numel())))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_only_read_rows_in_every_family(family):
    """A family whose last layer has other names would run every row, and lose the saving without a word."""
    model, processor = tiny_model(family)
    batch = batch_of(tiny_groups(processor, (2, 3), seed=2))
    rows = mlp_rows(model, lambda: shared_prefix.response_hidden(model, batch))
    read = last_layer.read_rows(layout_of(batch), torch.device("cpu"))
    assert read.numel() < batch.num_tokens
    assert rows[:-1] == [batch.num_tokens] * (len(rows) - 1)
    assert rows[-1] == read.numel()


def test_rows_that_are_read():
    layout = Layout((10, 9), ((1, 3), (2,)))
    rows = last_layer.read_rows(layout, torch.device("cpu"))
    assert rows.tolist() == [9, 11, 12, 22, 23]  # each prefix's last, each answer but its last
    assert rows.tolist() == sorted(set(score_rows(layout).tolist()))
    assert last_layer.read_rows(Layout((2,), ((20, 20),)), torch.device("cpu")) is None  # nearly all of them


def test_other_forwards_run_every_row():
    """The model's own forward, before and after, and the MLP by itself; nothing is left noted."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = batch_of(tiny_groups(processor, (2,), seed=2, images=(0,)))
    ids = batch.input_ids[None]
    before = model(input_ids=ids).logits
    shared_prefix.response_hidden(model, batch)
    assert mlp_rows(model, lambda: model(input_ids=ids)) == [ids.numel()] * len(decoder(model).layers)
    assert torch.allclose(model(input_ids=ids).logits, before)
    last = decoder(model).layers[-1]
    assert last.mlp(torch.zeros(1, 7, model.config.text_config.hidden_size)).shape[1] == 7


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_same_rows_again(reentrant):
    model, processor = tiny_model("qwen2_5_vl")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    batch = batch_of(tiny_groups(processor, (2, 2), seed=2))
    read = last_layer.read_rows(layout_of(batch), torch.device("cpu")).numel()
    rows = mlp_rows(model, lambda: shared_prefix.response_hidden(model, batch).sum().backward())
    assert rows.count(read) == 2  # forward and recompute


def test_copies_note_rows_of_their_own():
    """A reference model is a deepcopy of the policy: what one notes must not reach the other."""
    model, _ = tiny_model("qwen2_5_vl")
    assert last_layer.install(model)
    other = copy.deepcopy(model)
    assert last_layer.install(other)
    boxes = [
        getattr(part, last_layer._BOX)
        for each in (model, other)
        for part in (decoder(each).layers[-1].self_attn, decoder(each).layers[-1].mlp)
    ]
    assert boxes[0] is boxes[1]
    assert boxes[2] is boxes[3]
    assert boxes[0] is not boxes[2]
    assert len(decoder(other).layers[-1].mlp._forward_hooks) == 1  # not installed twice


def test_layers_that_are_left_alone():
    model, _ = tiny_model("qwen2_5_vl")
    last = decoder(model).layers[-1]
    last.mlp.experts = torch.nn.ModuleList()  # a mixture of experts: which expert takes a row depends on the others
    assert not last_layer.install(model)
    del last.mlp
    assert not last_layer.install(model)
