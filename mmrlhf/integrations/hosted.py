"""Pairs that a host has tokenised already: from its rows to one flat batch, and from its trainer to ours.

LLaMA-Factory and ms-swift keep their templates, data sets, loop, PEFT and losses. What changes is the way from two
rows of token ids a pair to two scores: the prompt both rows begin with runs once, its pictures go through the tower
once, and only scored tokens meet the lm_head. The host's own loss follows, with weights on corrected segments inside
the scores and, where pairs have margins, a beta for each.

A pair whose sides do not begin alike (another picture, an earlier turn that differs) runs as two prompts of one
answer each. Not covered: packing, sequence parallelism, ZeRO-3, LD-DPO.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrlhf import ops
from mmrlhf.batch import GroupBatch, layout_of
from mmrlhf.data.collate import EncodedGroup, collate
from mmrlhf.data.schema import BadRow
from mmrlhf.data.segments import STYLES, segment_weights
from mmrlhf.integrations import trl_support as support
from mmrlhf.integrations.forward import add_forward, tower_is_shared
from mmrlhf.integrations.objective import BETA_MODES
from mmrlhf.integrations.rows import BATCH, PackedRows
from mmrlhf.models.parts import image_token_ids, inner_model
from mmrlhf.ops import checks
from mmrlhf.ops.sequence_score import REDUCTIONS

IGNORED = -100  # label of a token that is not scored, in both hosts


@dataclass(frozen=True)
class PairOptions:
    """What mmrlhf adds to a host's options; beta and the loss stay the host's. Raises ValueError naming the option."""

    segments: str | None = None  # weigh corrected tokens by gamma: "paper", "muffin", or None: all weigh 1
    gamma: float = 5.0
    reduction: str = "sum"  # score of a response: "sum", or "mean" over the weights (RLHF-V)
    beta_mode: str = "fixed"  # or "margin": beta(margin) a pair (MM-RLHF), with beta_w and beta_k
    beta_w: float = 0.5
    beta_k: float = 0.5
    share_prefix: bool = True  # one pass over a prompt for both responses
    self_check: bool = True  # compare the first batch with separate rows
    token_metrics: bool = True  # log logits/*: one more pass over the vocabulary

    def __post_init__(self) -> None:
        if self.segments is not None:
            checks.one_of("segments", self.segments, STYLES)
        checks.positive("gamma", self.gamma)
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.one_of("beta_mode", self.beta_mode, BETA_MODES)
        checks.not_negative("beta_w", self.beta_w)
        checks.positive("beta_k", self.beta_k)
        for name in ("share_prefix", "self_check", "token_metrics"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")


def options_from(given: Mapping[str, Any]) -> PairOptions:
    """PairOptions by name. Raises TypeError for an unknown one, ValueError for a bad value."""
    known = [f.name for f in dataclasses.fields(PairOptions)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"unknown mmrlhf options {', '.join(unknown)}; known: {', '.join(known)}")
    return PairOptions(**given)


@dataclass(frozen=True)
class Row:
    """One side of a pair as its host made it."""

    input_ids: Sequence[int]
    labels: Sequence[int]  # IGNORED where a token is not scored; not shifted
    vision: dict[str, Tensor] = field(default_factory=dict)  # the processor's outputs for this row's media
    images: int = 0


def pack(
    pairs: Sequence[tuple[Row, Row]],
    options: PairOptions,
    *,
    margins: Sequence[float | None] | None = None,
    media_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """(chosen, rejected) rows -> {"prefix_len": [G], "input_ids": [1, T], "mmrlhf_batch": PackedRows}.

    Tokens after the last scored one are dropped; one that is not scored between two that are weighs 0. Raises BadRow
    naming the pair for a side without a scored token, or with a token of `media_ids` among those that follow the
    prompt.
    """
    groups: list[EncodedGroup] = []
    listed: list[tuple[int, int]] = []
    at = 0
    for number, (chosen, rejected) in enumerate(pairs):
        name = f"pair {number + 1} of the batch"
        parts = [_split(chosen, f"{name}, chosen", media_ids), _split(rejected, f"{name}, rejected", media_ids)]
        weights = _weights(parts, options)
        together = torch.equal(parts[0][0], parts[1][0]) and _same_media(chosen.vision, rejected.vision)
        for sides in ((0, 1),) if together else ((0,), (1,)):
            row = (chosen, rejected)[sides[0]]
            groups.append(
                EncodedGroup(
                    id=f"{name}{'' if together else ', chosen' if sides == (0,) else ', rejected'}",
                    prefix_ids=parts[sides[0]][0],
                    response_ids=tuple(parts[side][1] for side in sides),
                    weights=tuple(weights[side] for side in sides),
                    responses=sides,
                    pairs=torch.empty(0, 2, dtype=torch.int64),
                    margin=torch.empty(0),
                    vision=dict(row.vision),
                    images=row.images,
                )
            )
        listed.append((at, at + 1))
        at += 2
    values = [math.nan if value is None else float(value) for value in margins or [None] * len(pairs)]
    missing = next((index for index, value in enumerate(values) if math.isnan(value)), None)
    batch = collate(groups).replace(pairs=torch.tensor(listed), margin=torch.tensor(values))
    return {
        "prefix_len": batch.prefix_len,
        "input_ids": batch.input_ids[None],
        BATCH: PackedRows(batch, layout_of(batch), None if missing is None else f"pair {missing + 1} of the batch"),
    }


def _split(row: Row, name: str, media_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(prefix ids [L], response ids [n], whether each of those is scored [n])."""
    ids = torch.as_tensor(row.input_ids, dtype=torch.int64)
    scored = torch.as_tensor(row.labels, dtype=torch.int64) != IGNORED
    scored[:1] = False  # nothing predicts the first token
    where = scored.nonzero().flatten()
    if not where.numel():
        raise BadRow(name, "no token is scored: the answer is empty, or the length limit left nothing of it")
    first, last = int(where[0]), int(where[-1]) + 1
    response = ids[first:last]
    if media_ids and torch.isin(response, torch.tensor(list(media_ids))).any():
        raise BadRow(name, "a picture or video stands in or after the first scored turn, where it cannot be shared")
    return ids[:first], response, scored[first:last]


def _weights(parts: Sequence[tuple[Tensor, Tensor, Tensor]], options: PairOptions) -> list[Tensor]:
    """Token weights of both sides, chosen first; 0 where a token is not scored."""
    scored = [part[2].float() for part in parts]
    if options.segments is None:
        return scored
    chosen, rejected = (part[1].tolist() for part in parts)
    w_rejected, w_chosen = segment_weights(rejected, chosen, gamma=options.gamma, style=options.segments)
    return [mask * torch.tensor(w) for mask, w in zip(scored, (w_chosen, w_rejected), strict=True)]


def _same_media(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a is b or (
        a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)
    )


def check_args(args: Any, refused: Mapping[str, tuple[bool, str]]) -> None:
    """Raise ValueError naming the first of `refused` (option -> (asked for, why and what instead)), or of the usual."""
    plugin = getattr(args, "deepspeed_plugin", None)
    usual = {
        "torch_compile": (
            bool(args.torch_compile),
            "the packed forward changes shape with each batch; set it to false",
        ),
        "deepspeed": (
            getattr(plugin, "zero_stage", 0) == 3,
            "ZeRO-3 shards the lm_head, which is read outside its module; use ZeRO-1 or 2, or FSDP2",
        ),
    }
    for name, (asked, why) in {**refused, **usual}.items():
        if asked:
            raise ValueError(f"{name} is not supported by mmrlhf: {why}")


class PairMethods:
    """Ahead of a host's DPO trainer among a class's bases; the class sets `pair_options`."""

    pair_options: PairOptions
    aux_loss_enabled = False  # a host that has it sets its own
    # The host's, which this half of the class reads.
    model: Any
    ref_model: Any
    accelerator: Any
    beta: Any
    _one_tower: bool

    def prepare_pairs(self) -> None:
        """Everything that needs the finished trainer; raises ValueError for what its model cannot do."""
        support.check_trainer(self)
        whole = self.accelerator.unwrap_model(self.model)
        inner_model(whole)
        models = [whole]
        if self.ref_model is not None and self.ref_model is not self.model:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        options = self.pair_options
        for model in models:
            add_forward(model, share_prefix=options.share_prefix, self_check=options.self_check)
        self._one_tower = len(models) == 2 and tower_is_shared(*models)

    def score_pairs(self, model: Any, packed: PackedRows, *, reference: bool, reduction: str) -> dict[str, Tensor]:
        """What both hosts' `concatenated_forward` is made of, chosen and rejected apart.

        `*_logps` [P] are scores (weighted, reduced), `*_weight` [P] the sums of their weights, `*_mean` [P] the plain
        log-probability a scored token, `nll` [] that of all chosen tokens; `*_logits` [] the mean logit over the
        vocabulary and a side's scored tokens, NaN without `token_metrics` and for a reference.
        """
        if reference and model is self.ref_model and self._one_tower and packed.features is not None:
            packed.tower = id(inner_model(self.accelerator.unwrap_model(model)))
        statistics = self.pair_options.token_metrics and not reference
        out = model(**{BATCH: packed, "mmrlhf_statistics": ("mean_logit",) if statistics else ()})
        batch: GroupBatch = packed.batch
        logp, cu = out["logp"], batch.cu_seqlens
        scored = (batch.token_weight > 0).to(logp.dtype)
        score = ops.sequence_score(logp, cu, token_weight=batch.token_weight, reduction=reduction)
        weight = ops.sequence_score(batch.token_weight, cu)
        total, count = ops.sequence_score(logp, cu, token_weight=scored), ops.sequence_score(scored, cu)
        logits = torch.full_like(score, math.nan)
        if statistics:
            logits = ops.sequence_score(out["mean_logit"].to(logp.dtype), cu, token_weight=scored)
        found: dict[str, Tensor] = {}
        for side, index in zip(("chosen", "rejected"), batch.pairs.unbind(1), strict=True):
            found[f"{side}_logps"] = score[index]
            found[f"{side}_weight"] = weight[index]
            found[f"{side}_mean"] = total[index] / count[index]
            found[f"{side}_logits"] = logits[index].sum() / count[index].sum()
        better = batch.pairs[:, 0]
        found["nll"] = -total[better].sum() / count[better].sum()
        return found

    @contextlib.contextmanager
    def pair_betas(self, packed: PackedRows) -> Iterator[Tensor | float]:
        """Inside, the host's `beta` is that of each pair, [P]: its losses multiply by it, pair by pair."""
        options, beta = self.pair_options, self.beta
        if options.beta_mode == "margin":
            if packed.without_margin is not None:
                raise ValueError(
                    f"{packed.without_margin}: beta_mode is 'margin', but it has no margin; give every row of the data "
                    "set a margin, or set beta_mode to 'fixed'"
                )
            assert packed.batch.margin is not None
            margin = packed.batch.margin.to(self.accelerator.device)
            self.beta = ops.dynamic_beta(margin, beta=beta, w=options.beta_w, k=options.beta_k)
        try:
            yield self.beta
        finally:
            self.beta = beta

    def own_metrics(self, metrics: dict[str, Any], betas: Tensor | float) -> dict[str, Any]:
        """The host's metrics without what was not computed, and with the mean beta where it varies."""
        if not self.pair_options.token_metrics:
            metrics = {name: value for name, value in metrics.items() if "logits/" not in name}
        if isinstance(betas, Tensor):
            prefix = "eval_" if any(name.startswith("eval_") for name in metrics) else ""
            metrics[f"{prefix}beta/mean"] = float(betas.mean())
        return metrics


def media_ids_of(model: Any) -> tuple[int, ...]:
    """Ids of the placeholder tokens of a model's pictures and videos."""
    return tuple(image_token_ids(inner_model(model).config).values())
