"""Segment weights, beta(margin) and K responses through the TRL drop-in, against a float64 loop written out here.

The loop knows nothing of prefixes or packing: one row a response through the model's ordinary forward in float64, log
softmax of all logits, difflib's changed runs, the formulas of the papers, AdamW and clipping as Trainer does them.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl", "1.15", reason="TRL 1.15 or later is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from dporows import logged, model_and_processor, run, sentence, trl_rows  # noqa: E402
from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer  # noqa: E402
from tiny import tiny_image  # noqa: E402

pytestmark = pytest.mark.hosts
LR, STEPS = 1e-3, 8


def ranked_rows(count: int = 6) -> list[dict]:
    rng = random.Random(4)
    rows = []
    for index in range(count):
        start = sentence(rng)
        texts = [f"{start} {sentence(rng)} {i}" for i in range(3)]
        rows.append(
            {
                "id": f"r{index}",
                "images": [tiny_image(28, 28 * (1 + index % 2), seed=index)],
                "prompt": f"what is in {start} ?",
                "responses": texts,
                "scores": [3.0, 3.0 - rng.random(), 1.0 - rng.random()],
            }
        )
    return rows


class Loop:
    """The float64 truth for rows with `texts`, `scores` and one picture each."""

    def __init__(self, model, processor, *, gamma, reduction, beta, w, k, style):
        self.model = copy.deepcopy(model).double()
        self.frozen = copy.deepcopy(self.model)
        self.processor, self.style = processor, style
        self.gamma, self.reduction, self.beta, self.w, self.k = gamma, reduction, beta, w, k
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def logp(self, model, row, text):
        """Log-probabilities of a response's tokens, end of turn included, from one ordinary row."""
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        turns = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=[row["images"]], return_tensors="pt")
        answer = self.processor.tokenizer(f"{text}<|im_end|>", return_tensors="pt")["input_ids"]
        start = inputs["input_ids"].shape[1]
        given = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        for name, filler in (("input_ids", answer), ("attention_mask", torch.ones_like(answer))):
            given[name] = torch.cat((given[name], filler), 1)
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = F.pad(given["mm_token_type_ids"], (0, answer.shape[1]))
        logits = model(**given, use_cache=False).logits[0, start - 1 : -1]
        return answer[0].tolist(), logits.log_softmax(-1).gather(-1, answer[0][:, None])[:, 0]

    def weights(self, better, worse):
        """Token weights of both sides; the runs are those that turn the worse one into the better one."""
        out = {"b": [1.0] * len(better), "w": [1.0] * len(worse)}
        if self.style is not None:
            for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, worse, better, autojunk=False).get_opcodes():
                if tag != "equal":
                    out["w"][i1:i2] = [self.gamma] * (i2 - i1)
                    out["b"][j1:j2] = [self.gamma] * (j2 - j1)
        return [torch.tensor(values, dtype=torch.float64) for values in out.values()]

    def pair(self, row, better, worse, margin):
        """(loss, beta) of one pair."""
        (ids_b, b), (ids_w, w) = (self.logp(self.model, row, text) for text in (better, worse))
        with torch.no_grad():
            (_, ref_b), (_, ref_w) = (self.logp(self.frozen, row, text) for text in (better, worse))
        weight_b, weight_w = self.weights(ids_b, ids_w)

        def score(logp, weight):
            total = (weight * logp).sum()
            return total / weight.sum() if self.reduction == "mean" else total

        ratio = score(b - ref_b, weight_b) - score(w - ref_w, weight_w)
        beta = self.beta if margin is None else self.beta * (1 + self.w * (1 - math.exp(-self.k * margin)))
        return -F.logsigmoid(beta * ratio), beta

    def step(self, rows):
        losses = []
        for row in rows:
            for i, j in itertools.permutations(range(len(row["responses"])), 2):
                margin = row["scores"][i] - row["scores"][j]
                if margin > 0:
                    texts = row["responses"][i], row["responses"][j]
                    losses.append(self.pair(row, *texts, margin if self.w else None)[0])
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        # RLHF-V: segment weights, the weighted mean, a fixed beta
        (
            {"segments": "paper", "gamma": 5.0, "reduction": "mean", "beta": 0.5},
            {"gamma": 5.0, "reduction": "mean", "beta": 0.5, "w": 0.0, "k": 0.0, "style": "paper"},
        ),
        # MM-RLHF: beta(margin), sums, all pairs of three responses
        (
            {"beta_mode": "margin", "beta": 0.1, "beta_w": 0.5, "beta_k": 0.5},
            {"gamma": 1.0, "reduction": "sum", "beta": 0.1, "w": 0.5, "k": 0.5, "style": None},
        ),
        # both at once
        (
            {"segments": "paper", "gamma": 3.0, "reduction": "mean", "beta_mode": "margin", "beta": 0.3, "beta_w": 1.0},
            {"gamma": 3.0, "reduction": "mean", "beta": 0.3, "w": 1.0, "k": 0.5, "style": "paper"},
        ),
    ],
    ids=["ddpo", "mm_dpo", "both"],
)
def test_runs_equal_the_float64_loop(family, ours, theirs, tmp_path, monkeypatch):
    model, processor = model_and_processor(family)
    rows = ranked_rows()
    loop = Loop(model, processor, **theirs)
    seen = _record_rows(monkeypatch)
    got, trainer = run(
        PreferenceTrainer,
        PreferenceConfig,
        model,
        processor,
        datasets.Dataset.from_list(rows),
        tmp_path,
        steps=STEPS,
        **ours,
    )
    by_id = {row["id"]: row for row in rows}
    want = [loop.step([by_id[name] for name in names]) for names in seen[:STEPS]]
    assert want[-1] != want[0]
    assert got == pytest.approx(want, rel=2e-4, abs=2e-5)
    if "beta_mode" in ours:
        low, high = ours["beta"], ours["beta"] * (1 + ours.get("beta_w", 0.5))
        for name in ("beta/min", "beta/mean", "beta/max"):
            assert all(low < value < high for value in logged(trainer, name))


def test_every_pair_of_an_accumulated_step_weighs_the_same(tmp_path):
    """Four rows at once, or one at a time with 1 or 3 pairs each."""
    rows = ranked_rows(8)
    for row in rows[::2]:
        row["responses"], row["scores"] = row["responses"][:2], row["scores"][:2]
    found = []
    for size, options in ((4, {}), (1, {"gradient_accumulation_steps": 4})):
        model, processor = model_and_processor("llava_onevision")
        given = {"steps": 3, "per_device_train_batch_size": size, **options}
        losses, trainer = run(
            PreferenceTrainer, PreferenceConfig, model, processor, datasets.Dataset.from_list(rows), tmp_path, **given
        )
        steps = [sum(losses[at : at + 4 // size]) / (4 // size) for at in range(0, len(losses), 4 // size)]
        found.append((steps, logged(trainer, "grad_norm")))
    assert found[0][0][0] == pytest.approx(0.6931472, abs=1e-6)
    assert found[0][0][1] != found[0][0][0]
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=2e-4)


def _record_rows(monkeypatch) -> list[list[str]]:
    """The ids of the rows of each micro-batch, in the order they are asked for."""
    from mmrlhf.integrations.rows import PreferenceCollator

    seen: list[list[str]] = []
    collate = PreferenceCollator.__call__

    def recorded(self, rows):
        seen.append([row["id"] for row in rows])
        return collate(self, rows)

    monkeypatch.setattr(PreferenceCollator, "__call__", recorded)
    return seen


def test_segments_from_the_data_go_before_the_diff():
    from mmrlhf.integrations.rows import BATCH, PreferenceCollator

    _, processor = model_and_processor("qwen2_5_vl")
    (row,) = trl_rows(1)
    text = row["rejected"][0]["content"][0]["text"]
    collator = PreferenceCollator(processor, segments="paper", gamma=4.0)
    plain = collator([row])[BATCH].batch
    marked = collator([{**row, "chosen_segments": [], "rejected_segments": [[0, len(text)]]}])[BATCH].batch
    chosen = int(marked.cu_seqlens[1])
    assert torch.equal(marked.token_weight[:chosen], torch.ones(chosen))
    end_of_turn = marked.token_weight[-1]
    assert torch.equal(marked.token_weight[chosen:-1], torch.full_like(marked.token_weight[chosen:-1], 4.0))
    assert end_of_turn == 1.0
    assert not torch.equal(plain.token_weight, marked.token_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_segments": [[3, 2]]}, r"rejected_segments must hold \[start, end\)"),
        ({"reference_logp": [0.0]}, "reference_logp has 1 numbers for"),
        (
            {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "a"}]},
            "same",
        ),
        ({"is_tie": True}, "all responses are tied"),
        ({"prompt": 3}, "prompt"),
        ({"tools": [{"name": "x"}]}, "'tools' are not supported"),
    ],
)
def test_a_bad_row_is_named(change, message):
    from mmrlhf.data.schema import BadRow
    from mmrlhf.integrations.rows import PreferenceCollator

    _, processor = model_and_processor("qwen2_5_vl")
    (row,) = trl_rows(1)
    with pytest.raises(BadRow, match=message) as error:
        PreferenceCollator(processor)([{**row, "id": "x7", **change}])
    assert "x7" in str(error.value)
