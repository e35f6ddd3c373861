"""The one table of preference losses: a kind is a row, and a row is one term.

A term takes the log-ratios of a pair's better and worse response, `b` and `w` [P] (policy score minus reference score;
the score itself for a kind without a reference), `beta` (a float or [P]), and the options, and gives losses [P]. Both
`ops.reference` and the fast path run these terms, on vectors as short as the number of pairs.

Every term is finite, with finite gradients, for any finite log-ratio within the range of its dtype.
Not covered: the SFT term (every kind can have one, `sft_weight`) and losses that sort across pairs (AOT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossOptions:
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.5
    discopop_tau: float = 0.05


@dataclass(frozen=True)
class LossKind:
    term: Callable[[Tensor, Tensor, float | Tensor, LossOptions], Tensor]
    source: str
    reference: bool = True  # compares with a reference model
    smoothing: bool = False  # label_smoothing means something
    coupled: bool = False  # a pair's loss depends on the other pairs
    per_token: bool = False  # defined by its paper on the mean log-probability of a token


def _sigmoid(b, w, beta, o):
    x = beta * (b - w)
    return -(1 - o.label_smoothing) * F.logsigmoid(x) - o.label_smoothing * F.logsigmoid(-x)


def _robust(b, w, beta, o):
    x, eps = beta * (b - w), o.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)


def _exo_pair(b, w, beta, o):
    x, eps = beta * (b - w), o.label_smoothing
    better = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-eps))
    return better + (-x).sigmoid() * (F.logsigmoid(-x) - math.log(eps))


def _nca_pair(b, w, beta, o):
    return -F.logsigmoid(beta * b) - 0.5 * F.logsigmoid(-beta * b) - 0.5 * F.logsigmoid(-beta * w)


def _bco_pair(b, w, beta, o):
    reward_b, reward_w = beta * b, beta * w
    delta = ((reward_b + reward_w) / 2).detach().mean() if b.numel() else 0.0
    return -F.logsigmoid(reward_b - delta) - F.logsigmoid(-(reward_w - delta))


def _sppo_hard(b, w, beta, o):
    return (b - 0.5 / beta) ** 2 + (w + 0.5 / beta) ** 2


def _apo_zero(b, w, beta, o):
    return (-beta * b).sigmoid() + (beta * w).sigmoid()


def _apo_down(b, w, beta, o):
    return (beta * b).sigmoid() + (-beta * (b - w)).sigmoid()


def _discopop(b, w, beta, o):
    x = beta * (b - w)
    mix = x / o.discopop_tau
    # sigmoid(mix) * exp(-x) as one exponential: apart, a margin of -1000 gives 0 * inf.
    return -F.logsigmoid(x) * (-mix).sigmoid() + (F.logsigmoid(mix) - x).exp()


def _simpo(b, w, beta, o):
    return _sigmoid(b - o.gamma_beta_ratio, w, beta, o)


def _log_odds(logp):
    # A mean log-probability above -1e-7 (an empty response scores 0) is held there: the odds of 1 are infinite.
    logp = logp.clamp(max=-1e-7)
    return logp - torch.log(-torch.expm1(logp))


LOSSES: dict[str, LossKind] = {
    "sigmoid": LossKind(_sigmoid, "DPO 2305.18290 Eq. 7; smoothed: cDPO, Mitchell 2023", smoothing=True),
    "hinge": LossKind(lambda b, w, beta, o: torch.relu(1 - beta * (b - w)), "SLiC 2305.10425; RSO 2309.06657"),
    "ipo": LossKind(lambda b, w, beta, o: (b - w - 0.5 / beta) ** 2, "IPO 2310.12036 Eq. 17", per_token=True),
    "robust": LossKind(_robust, "rDPO 2403.00409", smoothing=True),
    "exo_pair": LossKind(_exo_pair, "EXO 2402.00856 Eq. 16; needs label_smoothing > 0", smoothing=True),
    "nca_pair": LossKind(_nca_pair, "NCA 2402.05369, two responses"),
    "bco_pair": LossKind(_bco_pair, "BCO 2404.04656; delta: mean reward over this call's pairs", coupled=True),
    "sppo_hard": LossKind(_sppo_hard, "SPPO 2405.00675 Eq. 4.7, hard probabilities"),
    "apo_zero": LossKind(_apo_zero, "APO 2408.06266 Eq. 7"),
    "apo_down": LossKind(_apo_down, "APO 2408.06266 Eq. 8"),
    "discopop": LossKind(_discopop, "DiscoPOP 2406.08414 Eq. 5 (LRML)"),
    "simpo": LossKind(_simpo, "SimPO 2405.14734 Eq. 6", reference=False, smoothing=True, per_token=True),
    "orpo": LossKind(
        lambda b, w, beta, o: -beta * F.logsigmoid(_log_odds(b) - _log_odds(w)),
        "ORPO 2403.07691 Eq. 7, beta is its lambda; the NLL term is sft_weight",
        reference=False,
        per_token=True,
    ),
}

LOSS_KINDS = tuple(LOSSES)
