"""Every field that TRL's DPOConfig has: honoured with TRL's value and gradient, or refused by name.

TRL's own `_compute_loss` runs here on made-up token log-probabilities, so that each loss and option costs milliseconds;
`test_trl.py` runs whole trainers.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="TRL 1.15 or later is not installed")

from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from mmrlhf.integrations.objective import DIFFERENCES, F_DIVERGENCES, LOSS_TYPES, SORTED, LossSettings, objective
from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer
from mmrlhf.integrations.trl_support import FIELDS, check_settings

pytestmark = pytest.mark.hosts
SMOOTHING = {"exo_pair": 0.05, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.2}
LENGTHS = ((3, 5), (6, 2), (4, 4), (1, 7))  # chosen, rejected: equal, longer, shorter, a single token


def arguments(**options) -> PreferenceConfig:
    return PreferenceConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **options)


def test_every_field_of_trls_config_is_decided_on():
    """A field that a later TRL adds makes this fail: it may change the loss, so somebody has to decide."""
    added = {field.name for field in dataclasses.fields(DPOConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    assert added == set(FIELDS)
    losses = {"loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "beta"}
    losses |= {"label_smoothing", "use_weighting", "discopop_tau"}
    assert {name for name, who in FIELDS.items() if who == "mmrlhf"} >= losses
    assert losses <= {field.name for field in dataclasses.fields(LossSettings)}


def test_a_field_of_a_later_trl_raises_where_it_is_set(monkeypatch):
    args = arguments()
    monkeypatch.setattr(
        "mmrlhf.integrations.trl_support.FIELDS", {k: v for k, v in FIELDS.items() if k not in ("beta", "loss_type")}
    )
    check_settings(args, None, None)
    args.beta = 0.2
    with pytest.raises(ValueError, match="does not know this field of DPOConfig"):
        check_settings(args, None, None)
    args.beta, args.loss_type = 0.1, ["ipo"]  # its default is made by a function
    with pytest.raises(ValueError, match=r"loss_type = \['ipo'\]"):
        check_settings(args, None, None)


REFUSED = {
    "truncation_mode": {"truncation_mode": "keep_end", "max_length": 64},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
}


def test_refused_fields_raise_by_name():
    """router_aux_loss_coef needs a mixture of experts: test_trl.test_hosts_that_cannot_be_honoured."""
    assert {name for name, who in FIELDS.items() if who == "refused"} == {*REFUSED, "router_aux_loss_coef"}
    for name, options in REFUSED.items():
        with pytest.raises(ValueError, match=f"^{name} = .* is not supported by mmrlhf: "):
            check_settings(arguments(**options), None, None)


def made_up(seed: int = 0):
    """TRL's padded tensors and our flat ones for the same numbers: (padded, flat)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [a for a, _ in LENGTHS] + [b for _, b in LENGTHS]  # chosen rows first
    width, prompt = max(lengths), 2
    mask = torch.zeros(len(lengths), prompt + width, dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[prompt : prompt + length] = 1
    padded = {"mask": mask}
    for name in ("logp", "kept", "log_sum_sq"):
        values = -torch.rand(len(lengths), prompt + width - 1, generator=generator, dtype=torch.float64) * 2
        padded[name] = (values * mask[:, 1:]).float()
    flat = {name: padded[name][mask[:, 1:].bool()].clone() for name in ("logp", "kept", "log_sum_sq")}
    count = len(LENGTHS)
    batch = SimpleNamespace(
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]),
        pairs=torch.stack((torch.arange(count), torch.arange(count) + count), 1),
        token_weight=torch.ones(sum(lengths)),
        margin=None,
    )
    return padded, flat, SimpleNamespace(batch=batch, without_margin=None)


def trls(padded, args):
    """(loss, gradient of the log-probabilities, logged metrics) of TRL's own code."""
    mask = padded["mask"]
    logp = padded["logp"].clone().requires_grad_()
    zeros = torch.zeros_like(logp)
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False

    def policy(**inputs):
        others = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return SimpleNamespace(log_probs=logp, log_sum_sq_probs=padded["log_sum_sq"], **others)

    host = SimpleNamespace(
        model=model,
        ref_model=lambda **inputs: SimpleNamespace(log_probs=padded["kept"]),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=args,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=args.loss_type,
        loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
        _metrics={"train": {name: [] for name in LOGGED}},
        _total_train_tokens=0,
        _tp_size=1,
    )
    for name in (
        "beta",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "label_smoothing",
        "use_weighting",
    ):
        setattr(host, name, getattr(args, name))
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    loss = DPOTrainer._compute_loss(host, policy, inputs, False)
    loss.backward()
    return loss.detach(), logp.grad[mask[:, 1:].bool()], host._metrics["train"]


REWARDS = {"rewards/chosen": "chosen_rewards", "rewards/rejected": "rejected_rewards"}
LOGPS = {"logps/chosen": "chosen_logps", "logps/rejected": "rejected_logps"}
LOGGED = (*REWARDS, *LOGPS, "rewards/accuracies", "rewards/margins", "entropy", "num_tokens", "logits/chosen")
LOGGED += ("logits/rejected", "mean_token_accuracy")


def ours(flat, packed, args):
    from mmrlhf.integrations.trl import _loss_settings, _options

    logp = flat["logp"].clone().requires_grad_()
    settings = _loss_settings(args, _options(args))
    result = objective(logp, packed, flat["kept"], settings, log_sum_sq=flat["log_sum_sq"])
    result.loss.backward()
    return result.loss.detach(), logp.grad, result


# TRL multiplies the losses by WPO's weights in place, at which the backward of these two stops with an error.
WEIGHTED_IN_PLACE = ("hinge", "sft")
CASES = [
    *({"loss_type": [kind]} for kind in LOSS_TYPES),
    *(
        {"loss_type": [kind], "f_divergence_type": divergence}
        for kind in DIFFERENCES
        for divergence in F_DIVERGENCES[1:]
    ),
    *(
        {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": c}
        for c in (1, 3)
    ),
    *({"loss_type": [kind], "ld_alpha": 0.3} for kind in LOSS_TYPES),
    *({"loss_type": [kind], "use_weighting": True} for kind in LOSS_TYPES if kind not in WEIGHTED_IN_PLACE + SORTED),
    {"loss_type": ["sigmoid"], "ld_alpha": 0.0},
    {"loss_type": ["sigmoid"], "ld_alpha": 1.0},
    {"loss_type": ["ipo", "exo_pair"], "loss_weights": [0.5, 2.0], "ld_alpha": 0.5, "use_weighting": True},
    {"loss_type": ["hinge", "sigmoid_norm"], "f_divergence_type": "js_divergence", "ld_alpha": 0.5, "beta": 2.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_value_gradient_and_metrics_equal_trls(case):
    smoothing = max(SMOOTHING.get(kind, 0.0) for kind in case["loss_type"])
    args = arguments(**{"beta": 0.4, **case}, label_smoothing=smoothing)
    padded, flat, packed = made_up()
    want, slope, metrics = trls(padded, args)
    got, gradient, result = ours(flat, packed, args)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=2e-5, atol=1e-7)
    for name, field in {**REWARDS, **LOGPS}.items():
        assert float(getattr(result, field).mean()) == pytest.approx(metrics[name][0], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("kind", WEIGHTED_IN_PLACE)
def test_weighting_of_the_losses_that_trl_stops_at(kind):
    """Each pair's loss by the product of its two weights, exp of the mean of log p - log sum p^2."""
    _, flat, packed = made_up()
    lengths = packed.batch.cu_seqlens.diff().tolist()
    aligned = torch.stack([part.mean() for part in (flat["logp"] - flat["log_sum_sq"]).split(lengths)])
    weight = aligned[packed.batch.pairs].sum(1).exp()
    ratio = torch.stack([part.sum() for part in (flat["logp"] - flat["kept"]).split(lengths)])[packed.batch.pairs]
    chosen = sum(lengths[: len(LENGTHS)])
    plain = torch.relu(1 - 0.4 * (ratio[:, 0] - ratio[:, 1])) if kind == "hinge" else -flat["logp"][:chosen].mean()
    got, gradient, _ = ours(flat, packed, arguments(loss_type=[kind], use_weighting=True, beta=0.4))
    torch.testing.assert_close(got, (plain * weight).mean())
    assert gradient.abs().sum() > 0


def test_extreme_log_ratios_stay_finite():
    """f'(t) of forward KL is 1 - 1/t: a response the policy gives up has an infinite one in float32."""
    _, flat, packed = made_up()
    for divergence in F_DIVERGENCES:
        logp = (flat["logp"] - 80.0).requires_grad_()
        settings = LossSettings(loss_type=("hinge", "sigmoid"), f_divergence_type=divergence)
        loss = objective(logp, packed, flat["kept"], settings).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logp.grad).all()


def test_ld_alpha_of_ranked_rows_goes_by_each_pair():
    """A response's tail begins where the other one of the pair ends: three responses, two pairs of the longest."""
    lengths = [2, 5, 3]
    logp = torch.arange(1.0, 11.0).neg()
    batch = SimpleNamespace(
        cu_seqlens=torch.tensor([0, 2, 7, 10]),
        pairs=torch.tensor([[0, 1], [1, 2]]),
        token_weight=torch.ones(10),
        margin=None,
    )
    settings = LossSettings(ld_alpha=0.25)
    result = objective(logp, SimpleNamespace(batch=batch, without_margin=None), torch.zeros(10), settings)
    parts = logp.split(lengths)
    short, long = parts[1][:2].sum() + 0.25 * parts[1][2:].sum(), parts[1][:3].sum() + 0.25 * parts[1][3:].sum()
    torch.testing.assert_close(result.chosen_logps, torch.stack((parts[0].sum(), long)))
    torch.testing.assert_close(result.rejected_logps, torch.stack((short, parts[2].sum())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["kto"]}, "loss_type must be one of"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be None or in \[0, 1\]"),
        ({"f_divergence_type": "hellinger"}, "f_divergence_type must be one of"),
        ({"f_alpha_divergence_coef": float("nan")}, "f_alpha_divergence_coef must be finite"),
        ({"f_divergence_type": "forward_kl", "loss_type": ["nca_pair"]}, "no meaning for nca_pair.*use reverse_kl"),
        ({"loss_type": ["aot"], "beta_mode": "margin"}, "beta_mode must be 'fixed'"),
        ({"loss_type": ["aot_unpaired"], "use_weighting": True}, "use_weighting must be False"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1, but none of sigmoid has one"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"loss_type": ["exo_pair"]}, "needs label_smoothing above 0"),
    ],
)
def test_combinations_without_a_meaning_raise_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer("no/such/model", args=arguments(**options), train_dataset=[{}], processing_class=object())
