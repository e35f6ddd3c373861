"""nn.Module drop-ins over `mmrlhf.ops`: settings are checked when the module is made, tensors when it is called.

`LinearLogp` takes the place of lm_head + log_softmax + gather; `PreferenceLoss` of everything from the hidden rows to
the loss. Neither holds parameters: the lm_head stays the model's. Not covered: segment weights (`data.segments`),
running the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmrlhf.ops import FusedPreferenceOutput, checks, dynamic_beta, fused_preference_loss, implicit_beta, linear_logp
from mmrlhf.ops.adapter import Adapters
from mmrlhf.ops.preference import check_kind
from mmrlhf.ops.sequence_score import REDUCTIONS
from mmrlhf.ops.sharded import VocabShard

BETA_MODES = ("fixed", "margin", "implicit")


class LinearLogp(nn.Module):
    """`ops.linear_logp` with its settings: (hidden [..., H], weight [V, H], targets [...], bias [V]) -> [...] nats."""

    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        backend: str | None = None,
    ):
        super().__init__()
        checks.positive("logit_scale", logit_scale)
        if softcap is not None:
            checks.positive("softcap", softcap)
        self.logit_scale, self.softcap = logit_scale, softcap
        self.ignore_index, self.backend = ignore_index, backend

    def forward(
        self,
        hidden: Tensor,  # [..., H]
        weight: Tensor,  # [V, H]
        targets: Tensor,  # [...]
        bias: Tensor | None = None,  # [V]
        *,
        adapter: Adapters = None,
        shard: VocabShard | None = None,
    ) -> Tensor:
        return linear_logp(
            hidden,
            weight,
            targets,
            bias=bias,
            adapter=adapter,
            shard=shard,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"logit_scale={self.logit_scale}, softcap={self.softcap}, ignore_index={self.ignore_index}"


class PreferenceLoss(nn.Module):
    """`ops.fused_preference_loss` with its settings, and where beta comes from.

    beta_mode: "fixed"; "margin", MM-RLHF's Dynamic Reward Scaling, which needs `margin` [P] at the call; "implicit",
    what its released code does instead (see `ops.implicit_beta`: the paper found it not to help). The paper's recipes:
    RLHF-V `PreferenceLoss(beta=0.5, reduction="mean")` with segment weights gamma = 5 as `token_weight`;
    MM-RLHF `PreferenceLoss(beta_mode="margin", sft_weight=0.25)`.

    Raises ValueError or TypeError, at construction, for a setting out of range.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        kind: str = "sigmoid",
        reduction: str = "sum",
        beta_mode: str = "fixed",
        w: float = 0.5,
        k: float = 0.5,
        label_smoothing: float = 0.0,
        gamma_beta_ratio: float = 0.5,
        discopop_tau: float = 0.05,
        sft_weight: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        memory_budget: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        checks.positive("beta", beta)
        checks.one_of("reduction", reduction, REDUCTIONS)
        checks.one_of("beta_mode", beta_mode, BETA_MODES)
        checks.not_negative("w", w)
        checks.positive("k", k)
        check_kind(kind, label_smoothing, gamma_beta_ratio, discopop_tau)
        checks.not_negative("sft_weight", sft_weight)
        self.beta, self.beta_mode, self.w, self.k = beta, beta_mode, w, k
        self.settings: dict[str, Any] = {
            "kind": kind,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "gamma_beta_ratio": gamma_beta_ratio,
            "discopop_tau": discopop_tau,
            "sft_weight": sft_weight,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "memory_budget": memory_budget,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        targets: Tensor,  # [N]
        cu_seqlens: Tensor,  # [R + 1]
        pairs: Tensor,  # [P, 2]
        *,
        token_weight: Tensor | None = None,  # [N]
        reference_scores: Tensor | None = None,  # [R]
        margin: Tensor | None = None,  # [P]
        pair_weight: Tensor | None = None,  # [P]
        bias: Tensor | None = None,  # [V]
        adapter: Adapters = None,
        shard: VocabShard | None = None,
        num_pairs: float | Tensor | None = None,
        num_sft_tokens: float | Tensor | None = None,
    ) -> FusedPreferenceOutput:
        return fused_preference_loss(
            hidden,
            weight,
            targets,
            cu_seqlens,
            pairs,
            token_weight=token_weight,
            reference_scores=reference_scores,
            beta=self._beta(pairs, margin),
            pair_weight=pair_weight,
            bias=bias,
            adapter=adapter,
            shard=shard,
            num_pairs=num_pairs,
            num_sft_tokens=num_sft_tokens,
            **self.settings,
        )

    def _beta(self, pairs: Tensor, margin: Tensor | None):
        if self.beta_mode == "fixed":
            return self.beta
        if self.beta_mode == "margin":
            if margin is None:
                raise ValueError("margin is None, but beta_mode 'margin' makes each pair's beta from it")
            return dynamic_beta(margin, beta=self.beta, w=self.w, k=self.k)

        def from_scores(scores: Tensor, reference_scores: Tensor | None) -> Tensor:
            ratio = scores if reference_scores is None else scores - reference_scores
            return implicit_beta(ratio[pairs[:, 0].long()] - ratio[pairs[:, 1].long()], beta=self.beta, w=self.w)

        return from_scores

    def extra_repr(self) -> str:
        kind, reduction = self.settings["kind"], self.settings["reduction"]
        return f"kind={kind}, beta={self.beta}, beta_mode={self.beta_mode}, reduction={reduction}"
