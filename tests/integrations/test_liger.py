"""The Liger-shaped and CCE-shaped losses: against float64 truth written out here, and against Liger itself.

The grid is the one Liger's own tests promise (a round and a ragged shape, bias, reference, NLL, every loss type), with
their bf16 tolerance (rtol 5e-1, atol 5e-2) cut tenfold and their fp32 one kept as it is small already.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from mmrlhf.integrations.liger import LOSS_TYPES, FusedLinearDPOLoss, linear_cross_entropy
from numerics import worst

SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}
SHAPES = ((2, 16, 64, 128), (3, 11, 31, 123))  # pairs, positions, hidden, vocabulary


def term(kind, b, w, beta, eps, tau):
    """The losses as the papers write them, on log-ratios [B] in float64."""
    x = beta * (b - w)
    if kind == "robust":
        return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)
    if kind == "exo_pair":
        left = x.sigmoid() * (F.logsigmoid(x) - torch.log1p(torch.tensor(-eps)))
        return left + (-x).sigmoid() * (F.logsigmoid(-x) - torch.log(torch.tensor(eps)))
    mix = torch.sigmoid(x / tau)
    return {
        "sigmoid": lambda: -F.logsigmoid(x),
        "hinge": lambda: torch.relu(1 - x),
        "ipo": lambda: (b - w - 0.5 / beta) ** 2,
        "nca_pair": lambda: -F.logsigmoid(beta * b) - 0.5 * F.logsigmoid(-beta * b) - 0.5 * F.logsigmoid(-beta * w),
        "bco_pair": lambda: -F.logsigmoid(beta * b) - F.logsigmoid(-beta * w),
        "sppo_hard": lambda: (b - 0.5 / beta) ** 2 + (w + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * b) + torch.sigmoid(beta * w),
        "apo_down": lambda: torch.sigmoid(beta * b) + 1 - torch.sigmoid(x),
        "discopop": lambda: -F.logsigmoid(x) * (1 - mix) + torch.exp(-x) * mix,
    }[kind]()


def truth(case, kind, *, beta=0.1, average=False, alpha=None, eps=0.0, tau=0.05, dtype=torch.float64):
    """Loss, the seven outputs and the gradients, straight from the [2B, T, V] logits in float64."""
    leaves = {
        k: v.detach().to(dtype).requires_grad_()
        for k, v in case.items()
        if k in ("weight", "hidden", "bias") and v is not None
    }
    target, mask = case["target"], case["target"] != -100
    half = target.shape[0] // 2

    def scores(hidden, weight, bias):
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        logp = logits.log_softmax(-1).gather(-1, torch.where(mask, target, 0)[..., None])[..., 0] * mask
        return logits, logp, logp.sum(1), logp.sum(1) / mask.sum(1).clamp(min=1)

    logits, logp, total, mean = scores(leaves["hidden"], leaves["weight"], leaves.get("bias"))
    ref_total = ref_mean = torch.zeros_like(total)
    if case["ref_hidden"] is not None:
        ref_bias = None if case["ref_bias"] is None else case["ref_bias"].to(dtype)
        _, _, ref_total, ref_mean = scores(case["ref_hidden"].to(dtype), case["ref_weight"].to(dtype), ref_bias)
    ratio = (mean - ref_mean) if average or kind == "ipo" else (total - ref_total)
    loss = term(kind, ratio[:half], ratio[half:], beta, eps, tau).mean()
    nll = -logp[:half].sum() / mask[:half].sum().clamp(min=1)
    loss = loss if alpha is None else loss + alpha * nll
    loss.backward()
    score, shown = (mean, mean - ref_mean) if average else (total, total - ref_total)
    outputs = [score[:half], score[half:], logits[:half].mean(), logits[half:].mean()]
    outputs += [nll if alpha is not None else torch.zeros(()), beta * shown[:half], beta * shown[half:]]
    return loss, outputs, {k: v.grad for k, v in leaves.items()}


def make(shape, *, dtype=torch.float32, bias=True, reference=True, seed=0):
    pairs, length, width, vocab = shape
    g = torch.Generator().manual_seed(seed)

    def random(*size, scale=1.0):
        return (torch.randn(*size, generator=g) * scale).to(dtype)

    target = torch.randint(0, vocab, (2 * pairs, length), generator=g)
    target[0, : length // 2] = -100  # a prompt
    target[-1, 2:5] = -100  # holes
    return {
        "hidden": random(2 * pairs, length, width),
        "weight": random(vocab, width, scale=width**-0.5),
        "bias": random(vocab) if bias else None,
        "target": target,
        "ref_hidden": random(2 * pairs, length, width) if reference else None,
        "ref_weight": random(vocab, width, scale=width**-0.5) if reference else None,
        "ref_bias": random(vocab) if reference and bias else None,
    }


def run(case, loss_type, upstream=1.0, **options):
    leaves = {k: case[k].detach().clone().requires_grad_() for k in ("weight", "hidden", "bias") if case[k] is not None}
    module = FusedLinearDPOLoss(use_ref_model=case["ref_hidden"] is not None, loss_type=loss_type, **options)
    loss, outputs = module(
        leaves["weight"],
        leaves["hidden"],
        case["target"],
        leaves.get("bias"),
        case["ref_hidden"],
        case["ref_weight"],
        case["ref_bias"],
    )
    (loss * upstream).backward()
    return loss, outputs, {k: v.grad for k, v in leaves.items()}


def compare(got, want, *, rtol, atol):
    loss, outputs, grads = got
    true_loss, true_outputs, true_grads = want
    torch.testing.assert_close(loss.double(), true_loss.detach().double(), rtol=rtol, atol=atol)
    assert len(outputs) == len(true_outputs) == 7
    for value, true in zip(outputs, true_outputs, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), true.detach().double(), rtol=rtol, atol=atol)
    assert set(grads) == set(true_grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), true_grads[name].double(), rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("average", [False, True])
def test_value_and_gradients_equal_float64(kind, shape, average):
    """Every loss type, with bias, reference and NLL term, on a round and a ragged shape."""
    eps = SMOOTHING.get(kind, 0.0)
    case = make(shape)
    got = run(case, kind, average_log_prob=average, compute_nll_loss=True, alpha=0.7, label_smoothing=eps)
    compare(got, truth(case, kind, average=average, alpha=0.7, eps=eps), rtol=5e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("nll", [False, True])
def test_every_combination_of_bias_reference_and_nll(bias, reference, nll):
    case = make(SHAPES[1], bias=bias, reference=reference)
    got = run(case, "sigmoid", compute_nll_loss=nll, beta=0.3)
    compare(got, truth(case, "sigmoid", beta=0.3, alpha=1.0 if nll else None), rtol=5e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_bf16_within_a_tenth_of_ligers_tolerance(kind):
    eps = SMOOTHING.get(kind, 0.0)
    case = make(SHAPES[1], dtype=torch.bfloat16)
    got = run(case, kind, average_log_prob=True, compute_nll_loss=True, label_smoothing=eps)
    compare(got, truth(case, kind, average=True, alpha=1.0, eps=eps), rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("kind", ["sigmoid", "bco_pair", "sppo_hard"])
def test_the_upstream_gradient_scales(kind):
    case = make(SHAPES[1])
    _, _, plain = run(case, kind)
    _, _, scaled = run(case, kind, upstream=-2.5)
    for name in plain:
        torch.testing.assert_close(scaled[name], -2.5 * plain[name])


@pytest.mark.parametrize("kind", LOSS_TYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("rows", [[0], [3], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_a_row_without_targets_is_never_nan(kind, average, rows):
    eps = SMOOTHING.get(kind, 0.0)
    case = make(SHAPES[1])
    case["target"][rows] = -100
    got = run(case, kind, average_log_prob=average, compute_nll_loss=True, label_smoothing=eps)
    compare(got, truth(case, kind, average=average, alpha=1.0, eps=eps), rtol=5e-4, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in (got[0], *got[1], *got[2].values()))


def test_ignored_positions_may_hold_anything():
    case = make(SHAPES[1])
    want = run(case, "sigmoid")
    case["hidden"][case["target"] == -100] = 7.0
    got = run(case, "sigmoid")
    assert got[0] == want[0]
    assert torch.equal(got[2]["weight"], want[2]["weight"])


def test_a_frozen_head_gets_no_gradient():
    case = make(SHAPES[1])
    hidden = case["hidden"].clone().requires_grad_()
    module = FusedLinearDPOLoss(use_ref_model=False)
    loss, _ = module(case["weight"], hidden, case["target"], case["bias"])
    loss.backward()
    case |= {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    torch.testing.assert_close(hidden.grad.double(), truth(case, "sigmoid")[2]["hidden"], rtol=5e-4, atol=1e-5)


@pytest.mark.hosts
@pytest.mark.parametrize("kind", [kind for kind in LOSS_TYPES if kind != "ipo"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("average", [False, True])
def test_equal_to_liger_itself(kind, shape, average):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    case, eps = make(shape), SMOOTHING.get(kind, 0.0)
    options = {"loss_type": kind, "label_smoothing": eps, "compute_nll_loss": True, "alpha": 0.7}
    options |= {"compiled": False, "average_log_prob": average}
    theirs = liger.LigerFusedLinearDPOLoss(**options)
    leaves = {k: case[k].clone().requires_grad_() for k in ("weight", "hidden", "bias")}
    loss, outputs = theirs(
        leaves["weight"],
        leaves["hidden"],
        case["target"],
        leaves["bias"],
        case["ref_hidden"],
        case["ref_weight"],
        case["ref_bias"],
    )
    loss.backward()
    got = run(case, options.pop("loss_type"), **options)
    compare((*got[:2], {}), (loss, outputs, {}), rtol=5e-4, atol=1e-5)
    # Both are float32: where terms cancel they may differ by more than each is off from the truth.
    _, _, exact = truth(case, kind, eps=eps, alpha=0.7, average=average)
    for name, grad in got[2].items():
        for value in (grad, leaves[name].grad):
            assert worst(value, exact[name])[0] < 2e-6 * float(exact[name].abs().max()), name


@pytest.mark.hosts
def test_the_constructor_and_forward_are_ligers():
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(liger.LigerFusedLinearDPOLoss, name)).parameters
        ours = inspect.signature(getattr(FusedLinearDPOLoss, name)).parameters
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "aot"}, "loss_type must be one of"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be above 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"must be in \[0, 0.5\)"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.5}, r"must be in \[0, 0.5\)"),
        ({"label_smoothing": 0.1}, "loss_type 'sigmoid' has none"),
        ({"beta": 0.0}, "beta must be finite and positive"),
        ({"alpha": float("nan")}, "alpha must be finite"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be"),
    ],
)
def test_bad_settings_raise_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss(**options)


def test_bad_calls_name_the_argument():
    case = make(SHAPES[1])
    with pytest.raises(ValueError, match="ref_input and ref_weight are needed"):
        FusedLinearDPOLoss()(case["weight"], case["hidden"], case["target"])
    with pytest.raises(ValueError, match="use_ref_model is False"):
        FusedLinearDPOLoss(use_ref_model=False)(
            case["weight"], case["hidden"], case["target"], None, case["ref_hidden"], case["ref_weight"]
        )
    module = FusedLinearDPOLoss(use_ref_model=False)
    with pytest.raises(ValueError, match=r"_input must have shape \[2B, T, H\]"):
        module(case["weight"], case["hidden"][:3], case["target"][:3])
    with pytest.raises(ValueError, match="target must have shape"):
        module(case["weight"], case["hidden"], case["target"][:, 1:])


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_equals_float64(shift, softcap, reduction):
    case = make(SHAPES[1])
    e, c, bias, targets = (case[k] for k in ("hidden", "weight", "bias", "target"))
    leaves = [t.clone().requires_grad_() for t in (e, c, bias)]
    out = linear_cross_entropy(
        *leaves[:2], targets, leaves[2], softcap=softcap, reduction=reduction, shift=shift, filter_eps=None, impl="cce"
    )
    doubles = [t.double().requires_grad_() for t in (e, c, bias)]
    logits = doubles[0] @ doubles[1].T + doubles[2]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits, labels = logits[:, : logits.shape[1] - shift], targets[:, shift:]
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
    if reduction == "none":
        want = F.pad(want.view(labels.shape), (shift, 0))
        assert out.shape == targets.shape
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    g = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out * g).sum().backward()
    (want * g).sum().backward()
    for ours, true in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(ours.grad.double(), true.grad, rtol=5e-4, atol=1e-5)


def test_cross_entropy_of_ignored_targets_is_zero():
    case = make(SHAPES[1])
    out = linear_cross_entropy(case["hidden"], case["weight"], torch.full_like(case["target"], -100))
    assert out == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of"),
        ({"return_lse": True}, "return_lse is not supported"),
        ({"vocab_parallel_options": object()}, "vocab_parallel_options is not supported"),
        ({"shift": 99}, "shift must be between"),
    ],
)
def test_cross_entropy_names_what_it_does_not_take(options, message):
    case = make(SHAPES[1])
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(case["hidden"], case["weight"], case["target"], **options)
