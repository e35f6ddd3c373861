"""transformers.Trainer with our collator and loss: the float truth of a step, accumulation, references, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from dporows import lora, model_and_processor, record, trl_rows
from mmrlhf.integrations.hf_trainer import PreferenceLossFunction, TrainerCollator, cache_reference
from mmrlhf.integrations.rows import BATCH
from mmrlhf.models import shared_prefix


def ranked(rows):
    """Every other row with a third response: three pairs where the others have one."""
    out = []
    for index, row in enumerate(rows):
        if index % 2:
            out.append(row)
            continue
        texts = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
        content = row["prompt"]
        out.append({"images": row["images"], "prompt": content, "responses": [*texts, "a dog"], "ranks": [1, 2, 3]})
    return out


def train(loss, model, collator, rows, folder, *, steps=3, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:3],
        data_collator=collator,
        compute_loss_func=loss,
    )
    losses = record(trainer)
    trainer.train()
    return losses, trainer


def make(family="llava_onevision", **options):
    model, processor = model_and_processor(family)
    loss = PreferenceLossFunction(model, reference=copy.deepcopy(model), **options)
    return model, TrainerCollator(processor), loss


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """4 rows at once, or 1 at a time with 1 or 3 pairs each: the same steps, since every pair weighs the same."""
    rows = ranked(trl_rows(8))
    model, collator, loss = make()
    want, trainer = train(loss, model, collator, rows, tmp_path, per_device_train_batch_size=4)
    model, collator, loss = make()
    got, _ = train(loss, model, collator, rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    sums = [sum(got[4 * step : 4 * step + 4]) for step in range(3)]
    assert want[0] == pytest.approx(0.6931472, abs=1e-6)
    assert want[1] != want[0]
    assert sums == pytest.approx(want, rel=1e-4)
    trainer.model.eval()
    with torch.no_grad():
        held_out = trainer.compute_loss_func(trainer.model(**trainer.data_collator(rows[:3])), None)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(held_out), rel=1e-5)


@pytest.mark.hosts
def test_equal_to_trls_trainer(tmp_path):
    pytest.importorskip("trl", "1.15", reason="TRL 1.15 or later is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from trl import DPOConfig, DPOTrainer

    from dporows import run

    rows = trl_rows(8)
    model, processor = model_and_processor("qwen2_5_vl")
    other = copy.deepcopy(model)
    want, _ = run(DPOTrainer, DPOConfig, model, processor, datasets.Dataset.from_list(rows), tmp_path, steps=4)
    loss = PreferenceLossFunction(other, reference=copy.deepcopy(other))
    got, _ = train(loss, other, TrainerCollator(processor), rows, tmp_path, steps=4, seed=3)
    assert got == pytest.approx(want, rel=2e-4)


def test_the_adapter_is_its_own_reference(tmp_path):
    from peft import get_peft_model

    model, processor = model_and_processor("llava_onevision")
    adapted = get_peft_model(model, lora())
    losses, _ = train(
        PreferenceLossFunction(adapted, beta=0.3), adapted, TrainerCollator(processor), trl_rows(4), tmp_path
    )
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] != losses[0]


def test_a_cached_reference_changes_nothing(tmp_path):
    rows = ranked(trl_rows(6))
    model, collator, loss = make()
    want, _ = train(loss, model, collator, rows, tmp_path)
    model, processor = model_and_processor("llava_onevision")
    cached = cache_reference(model, rows, TrainerCollator(processor), batch_size=4)
    loss = PreferenceLossFunction(model, reference="cached")
    got, _ = train(loss, model, TrainerCollator(processor), cached, tmp_path)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.hosts
def test_a_reference_cached_in_a_folder_is_the_same_column(tmp_path):
    """The second model has other LoRA weights; its reference is the model without them, so the folder is read."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from peft import get_peft_model

    rows, columns = trl_rows(3), []
    for index, folder in enumerate((None, tmp_path, tmp_path)):
        model, processor = model_and_processor("llava_onevision")
        torch.manual_seed(index)
        adapted = get_peft_model(model, lora())
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        cached = cache_reference(
            adapted, datasets.Dataset.from_list(rows), TrainerCollator(processor), batch_size=2, folder=folder
        )
        columns.append([list(row["reference_logp"]) for row in cached])
        assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert columns[2] == columns[1]
    for one, other in zip(columns[0], columns[1], strict=True):
        assert other == pytest.approx(one, rel=1e-6)
    with pytest.raises(ValueError, match=r"folder needs rows as a datasets.Dataset, got list"):
        cache_reference(adapted, rows, TrainerCollator(processor), folder=tmp_path)


def test_a_model_that_is_given_is_the_reference_whatever_the_rows_hold():
    """Their column may be another model's: it is read where reference is "cached", and nowhere else."""
    model, collator, loss = make()
    counts = [sum(ids.numel() for ids in collator.encode(row).response_ids) for row in trl_rows(2)]
    stale = [{**row, "reference_logp": [-1.0] * count} for row, count in zip(trl_rows(2), counts, strict=True)]
    inputs = collator(stale)
    assert loss(model(**inputs), inputs["labels"]).item() == pytest.approx(0.6931472, abs=1e-6)
    cached = PreferenceLossFunction(model, reference="cached")
    assert cached(model(**inputs), inputs["labels"]).item() != pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("folder", [False, True])
def test_a_reference_that_is_not_finite_is_named_with_its_row(folder, tmp_path, monkeypatch):
    """Cached, it would make every loss of its row NaN."""
    model, processor = model_and_processor("llava_onevision")
    rows = [{**row, "id": f"r{index}"} for index, row in enumerate(trl_rows(2))]
    options = {}
    if folder:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        rows, options = datasets.Dataset.from_list(rows), {"folder": tmp_path}
    monkeypatch.setattr(shared_prefix, "self_check", lambda *_, **__: None)  # it would say so of a first batch
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"row .*r0: the starting model gives log-probabilities that are not finite"):
        cache_reference(model, rows, TrainerCollator(processor), batch_size=1, **options)


def test_labels_count_pairs():
    _, processor = model_and_processor("llava_onevision")
    out = TrainerCollator(processor)(ranked(trl_rows(3)))
    assert out["labels"].shape == (7,)
    assert next(iter(out.values())).shape == (3,)  # what Trainer takes for the number of rows
    assert out[BATCH].batch.num_groups == 3


def test_what_is_missing_or_wrong_is_named():
    model, processor = model_and_processor("llava_onevision")
    with pytest.raises(ValueError, match="reference is needed where no adapter is trained"):
        PreferenceLossFunction(model)
    with pytest.raises(ValueError, match='"adapter", but the model has none'):
        PreferenceLossFunction(model, reference="adapter")
    with pytest.raises(ValueError, match="must be a model"):
        PreferenceLossFunction(model, reference="frozen")
    with pytest.raises(ValueError, match="the model that is trained"):
        PreferenceLossFunction(model, reference=model)
    with pytest.raises(ValueError, match="beta must be finite and positive"):
        PreferenceLossFunction(model, reference="cached", beta=-1.0)
    with pytest.raises(TypeError, match="gama"):
        PreferenceLossFunction(model, reference="cached", gama=1.0)
    loss = PreferenceLossFunction(model, reference="cached")
    inputs = TrainerCollator(processor)(trl_rows(1))
    with pytest.raises(ValueError, match='"cached", but these rows have no reference_logp'):
        loss(model(**inputs), inputs["labels"])


def test_the_models_own_forward_is_untouched():
    model, _ = model_and_processor("qwen2_5_vl")
    ids = torch.tensor([[5, 6, 7]])
    want = model(input_ids=ids, labels=ids)
    PreferenceLossFunction(model, reference="cached")
    got = model(input_ids=ids, labels=ids)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
