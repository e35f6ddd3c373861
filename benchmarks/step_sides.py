"""Who takes the step: TRL's trainer, ours, TRL's with mmrlhf dropped in, and ours with one thing after another off.

Every side is built from the same model, processor and records, and `run(steps)` gives a `Run`. Optimiser, learning rate
and clipping are the same on all sides: fused AdamW without weight decay, 1e-5, gradient norm 1, beta 0.1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.peers import trl as trl_head
from mmrlhf.batch import GroupBatch, Layout, layout_of, score_rows
from mmrlhf.data.collate import EncodedGroup, Encoder, collate
from mmrlhf.data.schema import ImageRef, Message, Part, PreferenceGroup, Response
from mmrlhf.models.load import lm_head
from mmrlhf.models.shared_prefix import packed_inputs, prepare, response_hidden
from mmrlhf.models.vision import decoder_inputs, encode
from mmrlhf.ops import fused_preference_loss, linear_logp, preference_loss, sequence_score
from mmrlhf.train.feed import feed

BETA, LEARNING_RATE, CLIP = 0.1, 1e-5, 1.0


@dataclass
class Run:
    """Clock readings before the first step and after each, and the loss of each step."""

    marks: list[float] = field(default_factory=list)  # time.perf_counter()
    cpu_marks: list[float] = field(default_factory=list)  # time.process_time(), all threads
    losses: list[float] = field(default_factory=list)

    def mark(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.marks.append(time.perf_counter())
        self.cpu_marks.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        """Of each step."""
        return [after - before for before, after in pairwise(self.marks)]

    @property
    def cpu_seconds(self) -> list[float]:
        return [after - before for before, after in pairwise(self.cpu_marks)]


class Side(Protocol):
    """A trainer: `model` and `reference` (None: no second model) are what it runs."""

    model: Any
    reference: Any

    def run(self, steps: int) -> Run: ...


@dataclass(frozen=True)
class Options:
    """How our step is taken. The defaults are the library's; each one turned off is a cause of the speed-up less."""

    cached: bool = False  # reference scores from before the run, instead of a reference model in the step
    share_prefix: bool = True
    vision_once: bool = True  # off: tower and image processing once a row, for the policy and for the reference
    answers_once: bool = True  # off: a row for each answer of each pair, as two-answer records
    fused_head: bool = True  # off: TRL's chunked head
    response_rows: bool = True  # off: every row of prompt and answer is scored


OPTIONS = {
    "live reference": Options(),
    "cached reference": Options(cached=True),
    "separate rows": Options(share_prefix=False),
}
OPTIONS["answers once"] = replace(OPTIONS["separate rows"], vision_once=False)
OPTIONS["fused head"] = replace(OPTIONS["answers once"], answers_once=False)
OPTIONS["response rows"] = replace(OPTIONS["fused head"], fused_head=False)
OPTIONS["all rows, apart"] = replace(OPTIONS["response rows"], response_rows=False)


def build_side(
    name: str, model: Any, processor: Any, records: list[dict], *, lora: bool = False, workers: int = 0
) -> Side:
    """The contestant of that name, on `model` itself; with `lora`, `model` is the base that adapters are put on.

    `workers` processes read and tokenise ahead of the step, on every side alike; 0: the step does it.
    """
    from benchmarks.step_models import with_lora

    if name in OPTIONS:
        return OurStep(with_lora(model) if lora else model, processor, records, OPTIONS[name], workers=workers)
    from benchmarks.peers.trl_step import TrlStep

    kinds = {"trl": (False, False), "trl + mmrlhf": (True, False), "trl + mmrlhf, cached": (True, True)}
    if name not in kinds:
        raise ValueError(f"no side is called {name!r}; there are {', '.join((*kinds, *OPTIONS))}")
    drop_in, cached = kinds[name]
    return TrlStep(model, processor, records, lora=lora, drop_in=drop_in, cached=cached, workers=workers)


class OurStep:
    """A training step of the library: picture bytes to update, one prompt a micro-batch."""

    def __init__(
        self, model: Any, processor: Any, records: list[dict], options: Options | None = None, *, workers: int = 0
    ):
        self.model, self.options, self.workers = model, options or Options(), workers
        self.device = next(model.parameters()).device
        self.encoder = Encoder(processor, root=Path("."), max_group_tokens=1 << 20)
        records = records if self.options.answers_once else [pair for record in records for pair in split(record)]
        self.groups = [to_group(record) for record in records]
        self.pairs = sum(len(group.preference_pairs()) for group in self.groups)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)  # as TRL's
        self.reference = None
        if self.options.cached:
            self.kept = [self.reference_logp(*self.batch(group)) for group in self.groups]
        elif not hasattr(model, "peft_config"):  # an adapter's reference is the model without it
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    def batch(self, group: PreferenceGroup) -> tuple[GroupBatch, Layout]:
        """One prompt on the device; the layout is read before, so that no device is waited for."""
        batch = self.made(group)
        return batch.to(self.device), layout_of(batch)

    def made(self, group: PreferenceGroup) -> GroupBatch:
        """One prompt on the CPU, positions filled in."""
        encoded = [self.encoder.encode(group)]
        if not self.options.vision_once:  # the picture is read and processed for each row
            encoded += [self.encoder.encode(group) for _ in group.responses[1:]]
            encoded = [only(each, index) for index, each in enumerate(encoded)]
        batch = collate(encoded)
        pairs = torch.tensor([(pair.better, pair.worse) for pair in group.preference_pairs()])
        return prepare(self.model, batch.replace(pairs=pairs, margin=None))

    def reference_logp(self, batch: GroupBatch, layout: Layout, vision: Any = None) -> Tensor:
        """[N] under the reference model, or the model as it is before training."""
        model = self.model if self.reference is None else self.reference
        without = model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()
        with torch.no_grad(), without:
            return self.logp(model, batch, layout, vision)

    def logp(self, model: Any, batch: GroupBatch, layout: Layout, vision: Any = None) -> Tensor:
        """[N], by the head that the options say."""
        weight = lm_head(model).weight
        if not self.options.response_rows:
            return all_rows_logp(model, batch, layout, weight)
        hidden = self.hidden(model, batch, layout, vision)
        head = linear_logp if self.options.fused_head else trl_head.chunked_logp
        return head(hidden, weight, batch.targets)

    def hidden(self, model: Any, batch: GroupBatch, layout: Layout, vision: Any) -> Tensor:
        """[N, H]"""
        share = self.options.share_prefix
        return response_hidden(model, batch, vision=vision, share_prefix=share, layout=layout)

    def loss(self, batch: GroupBatch, layout: Layout, reference: Tensor, vision: Any) -> Tensor:
        """The micro-batch's share of the step's mean over pairs."""
        scores = sequence_score(reference, batch.cu_seqlens)
        if not self.options.fused_head:
            policy = sequence_score(self.logp(self.model, batch, layout, vision), batch.cu_seqlens)
            loss = preference_loss(policy, scores, batch.pairs, beta=BETA).loss
            return loss * (batch.pairs.shape[0] / self.pairs)
        hidden = self.hidden(self.model, batch, layout, vision)
        arguments = (hidden, lm_head(self.model).weight, batch.targets, batch.cu_seqlens, batch.pairs)
        return fused_preference_loss(*arguments, reference_scores=scores, beta=BETA, num_pairs=self.pairs).loss

    def run(self, steps: int) -> Run:
        run = Run()
        self.model.train()
        jobs = (group for _ in range(steps) for group in self.groups)
        with closing(feed(jobs, self.made, workers=self.workers)) as batches:
            run.mark(self.device)
            for _ in range(steps):
                losses = []
                for index, _group in enumerate(self.groups):
                    made = next(batches)
                    batch, layout = made.to(self.device), layout_of(made)
                    vision = encode(self.model, batch) if self.options.vision_once else None  # None: each its own
                    reference = self.kept[index] if self.options.cached else self.reference_logp(batch, layout, vision)
                    loss = self.loss(batch, layout, reference, vision)
                    loss.backward()
                    losses.append(loss.detach())
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
                self.optimiser.step()
                self.optimiser.zero_grad(set_to_none=True)
                run.mark(self.device)
                run.losses.append(float(torch.stack(losses).sum()))
        return run


def all_rows_logp(model: Any, batch: GroupBatch, layout: Layout, weight: Tensor) -> Tensor:
    """[N] from a head over every row, for groups of one response: row t of [T] is scored against token t + 1."""
    assert batch.position_ids is not None
    module, inputs = decoder_inputs(model, batch.input_ids[None], encode(model, batch))
    inputs |= packed_inputs(model, batch.input_ids, layout, batch.position_ids)
    hidden = module(**inputs, use_cache=False).last_hidden_state[0]  # [T, H]
    return trl_head.chunked_logp(hidden, weight, batch.input_ids.roll(-1))[score_rows(layout).to(hidden.device)]


def only(encoded: EncodedGroup, index: int) -> EncodedGroup:
    """A group of one of the responses, with the prompt and its picture to itself."""
    return replace(
        encoded,
        response_ids=encoded.response_ids[index : index + 1],
        weights=encoded.weights[index : index + 1],
        responses=encoded.responses[index : index + 1],
        pairs=encoded.pairs[:0],
        margin=encoded.margin[:0],
    )


def split(record: dict) -> list[dict]:
    """A record of two answers for each pair of a record's, better first."""
    pairs = combinations(record["responses"], 2)
    return [record | {"id": f"{record['id']}.{n}", "responses": list(pair)} for n, pair in enumerate(pairs)]


def to_group(record: dict) -> PreferenceGroup:
    """The same record as a PreferenceGroup; its picture as PNG bytes."""
    data = io.BytesIO()
    record["image"].save(data, format="PNG")
    return PreferenceGroup(
        id=record["id"],
        prompt=(Message("user", (Part("image"), Part("text", record["prompt"]))),),
        responses=tuple(Response(text, rank=rank + 1) for rank, text in enumerate(record["responses"])),
        images=(ImageRef(data=data.getvalue()),),
    )


def builders(
    model: Any, processor: Any, records: list[dict], names: tuple[str, ...], *, lora: bool = False, workers: int = 0
) -> dict[str, Callable[[], Side]]:
    """{name: function that builds the side on its own copy of the model}."""

    def builder(name: str) -> Callable[[], Side]:
        return lambda: build_side(name, copy.deepcopy(model), processor, records, lora=lora, workers=workers)

    return {name: builder(name) for name in names}
