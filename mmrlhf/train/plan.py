"""`mmrlhf train RECIPE --plan`: what a run will do and how much memory it will take, before it does anything.

The batches are the run's own: the data is read and encoded, and the steps are cut as training cuts them. The model is
a skeleton (its config, no weights), made trainable by the run's own code; what its decoder keeps for the backward is
counted by sending the largest batch through it without computing (`models.footprint`). The rest is arithmetic over
weights, gradients, AdamW's moments, float32 masters, the loss's exponentials and the vision tower (by formula).

With `shard: full` they are those of one of WORLD_SIZE processes, which the environment names; none has to be there.

Live bytes, not what the allocator reserves: leave 10-20% of a GPU free. Not covered: a reference model of its own
(there is none: the policy scores it before it changes), the answers written before and after, workers' memory.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmrlhf.batch import GroupBatch, Layout, layout_of
from mmrlhf.config import TrainConfig
from mmrlhf.data.collate import collate
from mmrlhf.models import footprint, load
from mmrlhf.ops.linear_logp import MEMORY_BUDGET
from mmrlhf.train import distributed, setup, shard
from mmrlhf.train.distributed import World
from mmrlhf.train.objective import Objective
from mmrlhf.train.run import RunFolder


@dataclass(frozen=True)
class Batches:
    """The batch plan of the whole run."""

    groups: int
    steps: int
    steps_per_epoch: int
    micro_batches: int  # in all steps
    most_per_step: int  # micro-batches of the largest step
    tokens: int  # through the decoder, in all steps
    pairs: int
    images: int
    largest: int  # tokens of the largest micro-batch
    utilization: tuple[float, float, float]  # tokens of a micro-batch / tokens_per_batch: least, mean, most
    dropped: int  # groups left out


@dataclass(frozen=True)
class Memory:
    """Bytes, for the micro-batch that needs most. Activations: without and with gradient checkpointing."""

    weights: int
    masters: int  # float32 copies of trained weights that are not float32
    moments: int  # AdamW's two, float32
    gradients: int
    activations: tuple[int, int]
    working: int  # of one decoder layer's backward
    exponentials: int  # E of the loss, at most its budget; 0 where the head is frozen
    head: int  # the rest of the loss: gradients of hidden and head in float32
    vision: tuple[int, int]  # kept for the backward; in use while the tower runs
    accumulates: bool  # whether the gradients of an earlier micro-batch of the step are there
    cut: Cut | None = None  # what comes to it where weights, masters, moments and gradients are one process's share

    def peak(self, *, checkpointing: bool) -> int:
        """The largest of a few moments: tower, loss, backward, the last gradients' sum, update."""
        cut = self.cut or Cut(waiting=self.gradients)
        held = self.weights + self.masters + self.moments
        before = held + cut.gathered + (cut.waiting if self.accumulates else 0)
        kept = self.activations[checkpointing] + self.vision[0]
        head_gradient = 0 if self.accumulates else self.head
        return max(
            before + self.vision[1],
            before + kept + self.exponentials + self.head,
            before + kept + self.working + head_gradient + cut.passing,
            before + self.gradients + cut.last if self.cut else 0,
            held + self.gradients + self.working,
        )


@dataclass(frozen=True)
class Cut:
    """Bytes that a sharded model needs whole for a while; see `shard`."""

    gathered: int = 0  # weights: all but the blocks, and three of the largest (in use, on its way, in one piece)
    waiting: int = 0  # gradients of earlier micro-batches of a step, not yet summed over the processes
    passing: int = 0  # gradients in the backward: of all but the blocks, and a block's twice, on their way
    last: int = 0  # those of all but the blocks, twice


@dataclass(frozen=True)
class RunPlan:
    """Both, with the facts a reader needs to judge them."""

    batches: Batches
    memory: Memory
    model: str  # class
    parameters: int
    trained: int
    dtype: str
    device: str
    available: int | None  # bytes free on the device
    checkpointing: bool  # as the settings say
    processes: int = 1

    @property
    def peak(self) -> int:
        """Bytes, as the settings are."""
        return self.memory.peak(checkpointing=self.checkpointing)

    def text(self) -> str:
        """Both as tables."""
        b, m = self.batches, self.memory
        least, mean, most = (f"{100 * share:.0f}%" for share in b.utilization)
        rows: list[tuple[str, str]] = [
            ("groups", f"{b.groups:,}" + (f" ({b.dropped:,} left out)" if b.dropped else "")),
            ("pairs", f"{b.pairs:,} an epoch"),
            ("steps", f"{b.steps:,} ({b.steps_per_epoch:,} an epoch)"),
            ("micro-batches", f"{b.micro_batches:,}, at most {b.most_per_step} a step"),
            ("tokens", f"{b.tokens:,} through the decoder, {b.largest:,} in the largest micro-batch"),
            ("utilization", f"{mean} of tokens_per_batch ({least} to {most})"),
            ("images and videos", f"{b.images:,} through the tower"),
        ]
        lines = [f"{self.model}, {self.parameters:,} parameters, {self.trained:,} trained, {self.dtype}", ""]
        lines += [f"{name:<20}{value}" for name, value in rows]
        chosen = (" *", "") if not self.checkpointing else ("", " *")
        lines += ["", f"{'memory on ' + self.device:<36}{'all kept' + chosen[0]:>16}{'checkpointing' + chosen[1]:>18}"]
        for name, size in (
            (f"weights, 1/{self.processes}" if m.cut else "weights", m.weights),
            ("float32 masters", m.masters),
            ("AdamW's moments", m.moments),
            ("gradients", m.gradients),
            *(
                (("weights, gathered", m.cut.gathered), ("gradients, not yet cut", _whole_gradients(m)))
                if m.cut
                else ()
            ),
            ("activations", m.activations),
            ("backward of one layer", m.working),
            ("exponentials of the loss", m.exponentials),
            ("head gradient and hidden rows", m.head),
            ("vision, kept", m.vision[0]),
            ("vision, while the tower runs", m.vision[1]),
            ("peak", tuple(m.peak(checkpointing=on) for on in (False, True))),
        ):
            pair = size if isinstance(size, tuple) else (size, size)
            lines.append(f"  {name:<34}{_bytes(pair[0]):>16}{_bytes(pair[1]):>18}")
        lines.append("(* as the settings say; not everything is there at once, so the peak is less than the sum)")
        if self.available is not None:
            fits = "fits in" if self.peak <= self.available else "DOES NOT FIT in"
            lines.append(f"the peak of {_bytes(self.peak)} {fits} the {_bytes(self.available)} that are free")
        return "\n".join(lines)


def plan(settings: TrainConfig) -> RunPlan:
    """The plan of a run; reads the data and the model's config, writes nothing, computes nothing.

    Raises ValueError and BadRow for settings and data as `loop.train` does before its first step.
    """
    shard.check(settings)
    if settings.shard == "none":
        setup.single_process("--plan")
    size = distributed.processes()
    setup.check_objective(settings, None)
    wanted = settings.model
    if not wanted.path:
        raise ValueError("model.path must name a local folder or a hub id")
    device = setup.pick_device(settings.device)
    options: dict[str, Any] = {"trust_remote_code": wanted.trust_remote_code, "revision": wanted.revision}
    dataset = setup.read_data(settings, load.load_processor(wanted.path, **options))
    Objective(settings.loss).check_groups(dataset.groups, settings.data.pairs)
    model = footprint.skeleton(wanted.path, dtype=wanted.dtype, **options)
    # Checkpointing hides from the count what it keeps, so it is left off here and reckoned with afterwards.
    bare = dataclasses.replace(settings, model=dataclasses.replace(wanted, gradient_checkpointing=False))
    run = RunFolder(bare)  # never entered: it touches no file
    run.facts["notes"] = []
    shared = setup.prefix_sharing(model, settings, run)
    lengths = setup.decoder_lengths(dataset, settings, share_prefix=shared)
    shares = [setup.Plan(lengths, settings, World(rank, size)) for rank in range(size)]
    first, later = _largest(lengths, shares)
    model = setup.make_trainable(model, bare, run)
    found = [
        _memory(
            *(model, collate([dataset[index] for index in part]), settings, size),
            shared=shared,
            accumulates=part is later,
        )
        for part in (first, later)
        if part
    ]
    facts = run.facts["model"]
    return RunPlan(
        batches=_batches(dataset, shares, settings),
        memory=max(found, key=lambda memory: memory.peak(checkpointing=wanted.gradient_checkpointing)),
        model=facts["class"],
        parameters=facts["parameters"],
        trained=facts["trained"],
        dtype=facts["dtype"],
        device=str(device),
        available=_available(device),
        checkpointing=wanted.gradient_checkpointing,
        processes=size,
    )


def _largest(lengths: Sequence[int], shares: Sequence[setup.Plan]) -> tuple[list[int], list[int]]:
    """The largest micro-batch that comes first in its step, and the largest that finds gradients there (or none).

    `shares`: the steps of each process.

    Raises ValueError for a run without steps.
    """

    def tokens(part: Sequence[int]) -> int:
        return sum(lengths[index] for index in part)

    if shares[0].total == 0:
        raise ValueError("there is nothing to plan: max_steps is 0")
    everything = [steps[step] for steps in shares for step in range(steps.total)]
    first = max((parts[0] for parts in everything), key=tokens)
    later = max((part for parts in everything for part in parts[1:]), key=tokens, default=[])
    return first, later


def _batches(dataset: Any, shares: Sequence[setup.Plan], settings: TrainConfig) -> Batches:
    lengths, steps = shares[0].lengths, shares[0]
    media = [len(group.images) + len(group.videos) for group in dataset.groups]
    parts = [part for plan in shares for step in range(plan.total) for part in plan[step][: plan.own(step)]]
    sizes = [sum(lengths[index] for index in part) for part in parts]
    images = sum(media[index] for part in parts for index in part)
    most = max(len(steps[step]) for step in range(steps.total))
    filled = [size / settings.tokens_per_batch for size in sizes]
    return Batches(
        groups=len(dataset),
        steps=steps.total,
        steps_per_epoch=steps.steps_per_epoch,
        micro_batches=len(sizes),
        most_per_step=most,
        tokens=sum(sizes),
        pairs=sum(dataset.num_pairs(index) for index in range(len(dataset))),
        images=images,
        largest=max(sizes),
        utilization=(min(filled), sum(filled) / len(filled), max(filled)),
        dropped=len(dataset.dropped),
    )


def _memory(
    model: Any, batch: GroupBatch, settings: TrainConfig, size: int, *, shared: bool, accumulates: bool
) -> Memory:
    """Of one micro-batch; `model` is a skeleton, made trainable."""
    layout = layout_of(batch) if shared else _apart(layout_of(batch))
    found = footprint.activations(model, layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    head = load.lm_head(model)
    vocabulary, width = head.weight.shape
    rows = batch.num_scored
    # hidden [N, H] in the model's dtype and, in float32, twice: the unit gradient and the gradient
    head_bytes = rows * width * (head.weight.element_size() + 8)
    exponentials = 0
    if head.weight.requires_grad or any(b.requires_grad for _, b, _ in head.adapters):
        exponentials = 4 * rows * vocabulary
        if exponentials > MEMORY_BUDGET:  # in chunks of whole groups, or made again
            exponentials = MEMORY_BUDGET
    if head.weight.requires_grad:
        head_bytes += 4 * vocabulary * width
    alone = Memory(
        weights=_bytes_of((*model.parameters(), *model.buffers())),
        masters=sum(4 * p.numel() for p in trained if p.dtype != torch.float32),
        moments=8 * numbers,
        gradients=4 * numbers,
        activations=(found.kept(checkpointing=False), found.kept(checkpointing=True)),
        working=found.largest,
        exponentials=exponentials,
        head=head_bytes,
        vision=footprint.vision(model, batch.vision, batch.input_ids),
        accumulates=accumulates,
    )
    return alone if settings.shard == "none" else _cut(alone, model, settings, size)


def _cut(alone: Memory, model: Any, settings: TrainConfig, size: int) -> Memory:
    """The same on one of `size` processes that share the model."""
    whole = {id(p) for p in shard.whole_parameters(model)}
    kept = [p for p in model.parameters() if id(p) in whole]
    blocks = [[p for p in block.parameters() if id(p) not in whole] for block in shard.blocks(model)]
    inside = {id(p) for block in blocks for p in block}
    rest = [p for p in model.parameters() if id(p) not in whole | inside]
    largest = max(blocks, key=_bytes_of)

    def trained(parameters: Sequence[Any], *, each: int | None = None) -> int:
        """Bytes of their gradients, in the dtype they are made in, or `each`."""
        return sum(p.numel() * (each or p.element_size()) for p in parameters if p.requires_grad)

    everything = [*rest, *(p for block in blocks for p in block)]
    rows = trained(everything, each=4) + _bytes_of([p for p in everything if not p.requires_grad])
    return dataclasses.replace(
        alone,
        weights=_bytes_of((*kept, *model.buffers())) + -(-rows // size),
        masters=0,  # the rows are
        moments=-(-alone.moments // size),
        gradients=-(-alone.gradients // size),
        cut=Cut(
            gathered=_bytes_of(rest) + 3 * _bytes_of(largest),
            waiting=-(-alone.gradients // size) if settings.sync_each_batch else alone.gradients,
            passing=trained(rest) + trained(largest) + trained(largest, each=4),
            last=trained(rest) + trained(rest, each=4),
        ),
    )


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _whole_gradients(memory: Memory) -> int:
    """Bytes of gradients that a sharded run holds whole at its worst."""
    assert memory.cut is not None
    return (memory.cut.waiting if memory.accumulates else 0) + max(memory.cut.passing, memory.cut.last)


def _apart(layout: Layout) -> Layout:
    """A prefix of its own for each response."""
    pairs = [
        (prefix, (length,))
        for prefix, responses in zip(layout.prefix_len, layout.response_len, strict=True)
        for length in responses
    ]
    return Layout(tuple(prefix for prefix, _ in pairs), tuple(responses for _, responses in pairs))


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = os.sysconf_names
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024  # type: ignore[assignment]
    raise AssertionError("unreachable")
