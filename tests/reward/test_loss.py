"""The loss of a packed batch against the published one: a row a response and pair, whole logits, float64."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from mmrlhf.config import RewardConfig
from mmrlhf.data.collate import collate
from mmrlhf.data.images import open_image
from mmrlhf.models import load
from mmrlhf.models.generate import to_messages
from mmrlhf.reward import head as heads
from mmrlhf.reward.critique import pair_losses, reward_loss
from mmrlhf.reward.encode import CritiqueEncoder, asking, tied_pairs, with_places
from mmrlhf.train.scoring import response_rows
from numerics import assert_no_worse
from rewarddata import with_critiques
from tiny import tiny_model
from tinyrun import make_groups


def test_terms_are_the_published_ones():
    """Ties, margins and a pair without one, by the formulas written out."""
    generator = torch.Generator().manual_seed(0)
    scores, nll = torch.randn(5, generator=generator).double(), torch.rand(5, generator=generator).double()
    pairs = torch.tensor([[0, 1], [2, 1], [3, 4]])
    ties = torch.tensor([False, False, True])
    margin = torch.tensor([0.5, math.nan, math.nan]).double()
    terms = pair_losses(scores, nll, pairs, ties, margin=margin)
    r, n = scores.tolist(), nll.tolist()
    want = {
        "score": [math.log1p(math.exp(-(r[0] - r[1] - 0.5))), math.log1p(math.exp(-(r[2] - r[1]))), 0.0],
        "tie": [0.0, 0.0, (r[3] - r[4]) ** 2],
        "center": [(r[0] + r[1]) ** 2, (r[2] + r[1]) ** 2, (r[3] + r[4]) ** 2],
        "critic": [n[0] + n[1], n[2] + n[1], n[3] + n[4]],
    }
    for name, values in want.items():
        torch.testing.assert_close(terms[name], torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    without = pair_losses(scores, nll, pairs, ties)["score"]
    want = math.log1p(math.exp(-(r[0] - r[1])))
    torch.testing.assert_close(without[0], torch.tensor(want, dtype=torch.float64))


class Rows:
    """Each response as the processor itself encodes its whole conversation, through the model's own forward."""

    def __init__(self, model, processor, head, root, settings: RewardConfig):
        self.model, self.processor, self.head, self.root, self.settings = model, processor, head, root, settings

    def loss(self, groups) -> torch.Tensor:
        total, count = torch.zeros((), dtype=self.model.dtype), 0
        for group in groups:
            pairs = [(p.better, p.worse, False) for p in group.preference_pairs()]
            pairs += [(i, j, True) for i, j in tied_pairs(group)]
            spoken = all(response.critique for response in group.responses)
            rows = [self.row(group, index, spoken) for index in range(len(group.responses))]
            for better, worse, tied in pairs:
                (r_b, nll_b), (r_w, nll_w) = rows[better], rows[worse]
                ranking = self.settings.tie_weight * (r_b - r_w) ** 2 if tied else -F.logsigmoid(r_b - r_w)
                total = total + self.settings.score_weight * ranking + self.settings.center_weight * (r_b + r_w) ** 2
                total = total + self.settings.critic_weight * (nll_b + nll_w)
                count += 1
        return total / count

    def row(self, group, index: int, spoken: bool):
        """(score, token-mean NLL of the critique) of one response."""
        response = group.responses[index]
        prompt = asking(group.prompt, response.text, "") if spoken else group.prompt
        asked = to_messages(prompt)
        said = {
            "role": "assistant",
            "content": [{"type": "text", "text": response.critique if spoken else response.text}],
        }
        before = self.encoded(group, asked, generation=True)["input_ids"].shape[1]
        inputs = self.encoded(group, [*asked, said], generation=False)
        out = self.model(**inputs, output_hidden_states=True)
        score = self.score(out.hidden_states[-1][0, -1])
        if not spoken:
            return score, torch.zeros((), dtype=score.dtype)
        ids = inputs["input_ids"][0]
        stop = len(ids) - ids.tolist()[::-1].index(self.processor.tokenizer.eos_token_id)  # end of turn included
        return score, F.cross_entropy(out.logits[0, before - 1 : stop - 1], ids[before:stop])

    def encoded(self, group, messages, *, generation: bool):
        text = self.processor.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False)
        pictures = [open_image(ref, self.root) for ref in group.images]
        inputs = self.processor(text=[text], return_tensors="pt", **({"images": [pictures]} if pictures else {}))
        return inputs.to(self.model.dtype)

    def score(self, hidden):
        """The released head: linear, tanh, linear."""
        rows = torch.tanh(hidden @ self.head.dense.weight.T + self.head.dense.bias)
        return (rows @ self.head.out_proj.weight.T + self.head.out_proj.bias)[0]


def packed_loss(model, head, encoder, groups, settings):
    encoded = [encoder.encode(group) for group in groups]
    batch = with_places(collate(encoded), torch.cat([each.ties for each in encoded]))
    batch, hidden = response_rows(model, batch, share_prefix=True)
    return reward_loss(hidden, load.lm_head(model), head, batch, settings, num_pairs=batch.pairs.shape[0])


def gradients(loss, model, head) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that has one, and the loss."""
    named = dict(model.named_parameters()) | {f"head.{name}": p for name, p in head.named_parameters()}
    wanted = {name: p for name, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {"loss": loss.detach()} | {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"], ids=["plain positions", "mRoPE"])
def test_packed_groups_equal_separate_rows(family, tmp_path):
    """Three answers of a picture with a tie among them, two of text, and a group without critiques: the loss and every
    gradient are those of pairs of whole rows, tokens made by the processor itself."""
    model, processor = tiny_model(family)
    model.eval()
    groups = with_critiques(make_groups(tmp_path, 5))[1::3]
    last = groups[1].responses[2]
    tied = dataclasses.replace(groups[1], responses=(*groups[1].responses[:2], dataclasses.replace(last, rank=2)))
    silent = make_groups(tmp_path, 3, k=2)[2]
    groups = [groups[0], tied, dataclasses.replace(silent, id="silent")]
    head = heads.new_head(model, seed=1)
    head.out_proj.weight.data.mul_(20)
    settings = RewardConfig(critic_weight=0.7, score_weight=1.3, tie_weight=0.4, center_weight=0.05)
    encoder = CritiqueEncoder(processor, root=tmp_path)

    out = packed_loss(model, head, encoder, groups, settings)
    ours = gradients(out.loss, model, head)
    plain = gradients(Rows(model, processor, head, tmp_path, settings).loss(groups), model, head)
    exact, exact_head = copy.deepcopy(model).double(), copy.deepcopy(head).double()
    truth = gradients(Rows(exact, processor, exact_head, tmp_path, settings).loss(groups), exact, exact_head)

    assert set(ours) == set(plain)
    for name, values in ours.items():
        # Rounding is that of a sum over some 500 tokens, whose order differs.
        floor = 1e-5 * float(truth[name].abs().max()) + 1e-9
        assert_no_worse(values, plain[name], truth[name], floor=floor, name=name)
    assert out.tie_loss > 0
    assert (out.nll == 0).sum() == 2, "the two answers without critiques"


def test_a_weight_of_zero_leaves_its_part_out(tmp_path):
    """Without the critics' part nothing reaches the lm_head, which the NLL is still reported of."""
    model, processor = tiny_model("llava_onevision")
    groups = with_critiques(make_groups(tmp_path, 1))
    head = heads.new_head(model)
    out = packed_loss(model, head, CritiqueEncoder(processor, root=tmp_path), groups, RewardConfig(critic_weight=0.0))
    assert out.critic_loss > 0
    torch.testing.assert_close(out.loss.detach(), out.score_loss + 0.01 * out.center_loss)
    assert load.lm_head(model).weight.grad is None
    assert torch.autograd.grad(out.loss, load.lm_head(model).weight, allow_unused=True)[0] is None


def test_batches_of_a_step_add_up(tmp_path):
    """A step cut into two micro-batches has the loss of one."""
    model, processor = tiny_model("llava_onevision")
    groups = with_critiques(make_groups(tmp_path, 2))
    head, settings = heads.new_head(model), RewardConfig()
    encoder = CritiqueEncoder(processor, root=tmp_path)
    whole = packed_loss(model, head, encoder, groups, settings).loss
    halves = [packed_loss(model, head, encoder, [group], settings).loss / 2 for group in groups]
    torch.testing.assert_close(whole, halves[0] + halves[1])
