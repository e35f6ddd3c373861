"""Before the first step: the model and its processor, the data, what is trained, and in which order.

Everything is checked here, before any compute is spent: settings that do not fit the data, a processor that does not
fit the model, a prefix that cannot be shared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmrlhf.batch import GroupBatch
from mmrlhf.config import REWARD_RECIPE, TrainConfig
from mmrlhf.data import collate, packing, readers
from mmrlhf.models import liger, load, parts, shared_prefix, vision
from mmrlhf.train import distributed, shard
from mmrlhf.train.distributed import World
from mmrlhf.train.run import RunFolder


def single_process(what: str) -> None:
    """Raise ValueError under torchrun and its kin, for a command whose copies would do the same work side by side."""
    size = distributed.processes()
    if size > 1:
        raise ValueError(f"WORLD_SIZE is {size}, and {what} runs in one process: start it without torchrun")


def pick_device(name: str) -> torch.device:
    """ "auto" is a CUDA device, or the CPU where there is none. Raises ValueError if it cannot be used.

    "auto" and "cuda" under torchrun: the device of this process.
    """
    if name == "auto":
        return distributed.local_device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but torch {torch.__version__} sees no CUDA device")
    return distributed.local_device("cuda") if name == "cuda" else device


def check_paths(settings: TrainConfig, model: Any = None, processor: Any = None) -> None:
    """Refuse what a look at the settings and the disk can refuse: the device, no model, no data.

    Raises ValueError, or FileNotFoundError for a model that is neither a folder nor a hub id.
    """
    wanted = settings.model
    device = pick_device(settings.device)
    shard.check(settings)
    if wanted.liger:
        liger.check(device)
    if model is None or processor is None:
        if not wanted.path:
            raise ValueError("model.path must name a local folder or a hub id")
        load.named_folder(wanted.path, revision=wanted.revision)
    _check_data_path(settings.data.path)


def check_objective(settings: TrainConfig, objective: object | None, *, command: str = "train") -> None:
    """ValueError for a recipe that is trained by another command: the loop would minimise something else.

    `command`: the one that was given, where there is no `objective`.
    """
    if (objective is not None) != (settings.recipe == REWARD_RECIPE):
        right, wrong = ("train", "reward train") if objective is not None else ("reward train", command)
        raise ValueError(f"recipe {settings.recipe} is trained by `mmrlhf {right}`, not by `mmrlhf {wrong}`")


def _check_data_path(path: str) -> None:
    if not path:
        raise ValueError("data.path must name a file or a folder")
    if not Path(path).exists():
        raise ValueError(f"data.path: {path} does not exist")


def load_model(settings: TrainConfig, model: Any, processor: Any) -> tuple[Any, Any]:
    """The model on its device and its processor, loaded from `model.path` unless they are given."""
    wanted, device = settings.model, pick_device(settings.device)
    if processor is None:
        processor = load.load_processor(
            wanted.path, trust_remote_code=wanted.trust_remote_code, revision=wanted.revision
        )
    if model is None:
        model = load.load_model(
            wanted.path,
            dtype=wanted.dtype,
            device=str(device),
            trust_remote_code=wanted.trust_remote_code,
            revision=wanted.revision,
        )
    else:
        model = model.to(device) if wanted.dtype == "auto" else model.to(device, getattr(torch, wanted.dtype))
    load.check_pair(model, processor)
    if wanted.liger:
        liger.apply(model)
    return model.eval(), processor


def refuse_float16(model: Any, settings: TrainConfig) -> None:
    """ValueError for float16 weights that are to be trained themselves; `optim` says the same, but hours later."""
    if not settings.lora.enabled and load.lm_head(model).weight.dtype == torch.float16:
        raise ValueError(
            f"{settings.model.path or 'the model'} is float16, whose gradients underflow without loss scaling: set "
            "model.dtype to bfloat16 or float32, or lora.enabled=true"
        )


def read_rows(settings: TrainConfig) -> readers.GroupSet:
    """The groups of `data.path`, before any model is loaded. Raises BadRow, or ValueError for format and path."""
    wanted = settings.data
    _check_data_path(wanted.path)
    return readers.read_groups(
        wanted.path,
        format=wanted.format,
        root=wanted.root,
        on_bad_row=wanted.on_bad_row,
        max_bad_rows=wanted.max_bad_rows,
    )


def read_data(
    settings: TrainConfig,
    processor: Any,
    run: RunFolder | None = None,
    *,
    rows: readers.GroupSet | None = None,
    encoder: Callable[..., collate.Encoder] = collate.Encoder,
) -> collate.PreferenceDataset:
    """Encode, check and count the data. Raises BadRow or ValueError; run.json gets the counts and every dropped row.

    `rows`: what `read_rows` gave, if it was asked already. `encoder`: what makes tokens of a group.
    """
    wanted = settings.data
    found = read_rows(settings) if rows is None else rows
    encode = encoder(
        processor,
        root=found.root,
        pairs=wanted.pairs,  # type: ignore[arg-type]
        segments=wanted.segments,
        gamma=wanted.gamma,
        max_group_tokens=wanted.max_group_tokens,
        max_image_pixels=wanted.max_image_pixels,
        video_frames=wanted.video_frames,
        looks=wanted.vision_cache or (None if run is None else run.path / "data"),  # for the next start
    )
    dataset = collate.PreferenceDataset(
        found.groups, encode, on_bad_row=wanted.on_bad_row, max_bad_rows=wanted.max_bad_rows
    )
    if run is not None:
        run.facts["data"] = {
            "path": wanted.path,
            "format": found.format,
            "rows": found.rows,
            "groups": len(dataset),
            "responses": sum(len(group.responses) for group in dataset.groups),
            "pairs": sum(dataset.num_pairs(index) for index in range(len(dataset))),
            "skipped_rows": [{"source": row.source, "reason": row.reason} for row in found.bad_rows],
            "dropped_groups": [{"source": row.source, "reason": row.reason} for row in dataset.dropped],
        }
        for what, bad in (("rows are skipped", found.bad_rows), ("groups are dropped", dataset.dropped)):
            if bad:
                run.note(f"data: {len(bad)} {what}, all named in run.json; the first: {bad[0]}")
        note_oddities(dataset, settings, run)
        run.write()
    if len(dataset) == 0:
        raise ValueError(f"data.path: nothing to train on in {wanted.path} ({found.rows} rows read)")
    return dataset


def note_oddities(dataset: collate.PreferenceDataset, settings: TrainConfig, run: RunFolder) -> None:
    """Say what can be trained on but may not be what was meant."""
    if settings.data.segments is None:
        marked = sum(any(response.segments for response in group.responses) for group in dataset.groups)
        if marked:
            run.note(f"{marked} groups mark corrected segments, which weigh nothing: data.segments is null")
    if settings.loss.beta_mode == "margin":
        pairs = [pair for group in dataset.groups for pair in group.preference_pairs(settings.data.pairs)]  # type: ignore[arg-type]
        against = sum(pair.margin is not None and pair.margin < 0 for pair in pairs)
        if against:
            run.note(f"{against} of {len(pairs)} pairs have a negative margin: their scores contradict their order")


def prefix_sharing(model: nn.Module, settings: TrainConfig, run: RunFolder | None = None) -> bool:
    """Whether the prefix is shared; a model that cannot is told about, never silently run the other way."""
    possible, reason = shared_prefix.can_share(model)
    used = settings.model.share_prefix and possible
    if run is not None:
        why = reason if settings.model.share_prefix else "model.share_prefix is false"
        run.facts["share_prefix"] = {"used": used, "reason": why}
        if settings.model.share_prefix and not possible:
            run.note(f"the prompt is run once for each response, not once for all: {reason}")
    return used


def decoder_lengths(
    dataset: collate.PreferenceDataset, settings: TrainConfig, *, share_prefix: bool, run: RunFolder | None = None
) -> list[int]:
    """Tokens of each group through the decoder: its prefix once, or (without `share_prefix`) once a response.

    Groups that are too long to share a micro-batch are noted.
    """
    lengths = dataset.lengths
    if not share_prefix:
        texts = map(dataset.text, range(len(dataset)))
        lengths = [each.num_tokens + (len(each.response_ids) - 1) * each.prefix_ids.numel() for each in texts]
    budget = settings.tokens_per_batch
    long = packing.over_budget(lengths, budget)
    if long and run is not None:
        run.note(
            f"{len(long)} groups are longer than tokens_per_batch={budget} (longest {max(lengths)}); each runs alone"
        )
    return lengths


def decoder_tokens(batch: GroupBatch, *, share_prefix: bool) -> int:
    """The same of a batch, which is on the CPU."""
    if share_prefix:
        return batch.num_tokens
    return int(batch.prefix_len[batch.response_group].sum() + batch.response_len.sum())


def make_trainable(model: Any, settings: TrainConfig, run: RunFolder) -> Any:
    """Freeze what is frozen, add LoRA, switch gradient checkpointing on. Returns the model to train.

    Dropout of the model itself is turned off, as the reference has none and the prefix is run once for K responses;
    lora.dropout stays.
    """
    model.requires_grad_(True)
    turn_dropout_off(model)
    if settings.model.freeze_vision:
        vision.freeze(model, projector=settings.model.freeze_projector)
    head = load.lm_head(model)
    if settings.model.freeze_lm_head:
        head.weight.requires_grad_(False)
        if head.bias is not None:
            head.bias.requires_grad_(False)
        if any(module.weight is head.weight for module in model.modules() if isinstance(module, nn.Embedding)):
            run.note("model.freeze_lm_head: the input embeddings are the same tensor, so they are frozen too")
    if settings.lora.enabled:
        model = add_lora(model, settings)
    elif hasattr(model, "peft_config"):
        raise ValueError("the model carries adapters already: set lora.enabled=true to train them, or merge them first")
    if settings.model.gradient_checkpointing:
        base = load.base_model(model)
        # transformers renamed it in 5.2x; the reentrant kind would lose the keyword arguments of our attention
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    run.facts["model"] = {
        "path": settings.model.path,
        "class": type(load.base_model(model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in trained),
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        "lora": settings.lora.enabled,
        "device": str(head.weight.device),
    }
    return model


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout rate of `model` to 0, those that attention modules keep as a number included.

    That of adapters which came with it stays: it is theirs, and acts on no reference.
    """
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def add_lora(model: Any, settings: TrainConfig) -> Any:
    """The model with LoRA adapters (float32) on `lora.targets` of the language model; all else is frozen.

    The lm_head is one of its layers, if named, and takes no dropout (ValueError at `lm_head`). A model that comes with
    adapters goes on with those. Raises ValueError if peft is missing, or a target matches no linear layer outside the
    vision tower.
    """
    if hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("lora.enabled needs peft: pip install peft") from error
    outside = language_linears(model)
    names = [name for name in outside if name.rpartition(".")[2] in settings.lora.targets]
    unmatched = [t for t in settings.lora.targets if not any(name.rpartition(".")[2] == t for name in names)]
    if unmatched:
        known = sorted({name.rpartition(".")[2] for name in outside})
        raise ValueError(f"lora.targets: no linear layer is called {', '.join(unmatched)}; allowed: {', '.join(known)}")
    adapter = LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def language_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers outside the vision side."""
    apart = {id(inner) for _, part in parts.vision_modules(model) for inner in part.modules()}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in apart]


def self_check(model: Any, batch: GroupBatch, settings: TrainConfig, run: RunFolder) -> None:
    """Compare a packed batch with ordinary rows, unless `model.self_check` is off. RuntimeError with both figures."""
    if not settings.model.self_check:
        run.facts["self_check"] = None
        return
    batch = shared_prefix.prepare(model, batch).to(parts.parameter_device(model))
    found = shared_prefix.self_check(model, batch)
    run.facts["self_check"] = dataclasses.asdict(found)


def save_model(
    model: Any, processor: Any, run: RunFolder, *, write: Callable[[Any, Any, Path], object] = load.save_pretrained
) -> None:
    """`model/`: an ordinary folder (LoRA: the adapter), whole or the one before. `write` fills it."""
    target, beside, gone = (run.path / name for name in ("model", "model.tmp", "model.gone"))
    run.fs.remove(beside)
    write(model, processor, beside)
    for file in sorted(beside.rglob("*")):
        if file.is_file():
            run.fs.fsync(file)
    run.fs.remove(gone)
    if target.exists():
        run.fs.rename(target, gone)
    run.fs.rename(beside, target)
    run.fs.fsync(run.path)
    run.fs.remove(gone)


class Plan:
    """Which groups make which step: `plan[step]` is this process's micro-batches, each a list of indices into the data.

    A pure function of the settings, the seed, the lengths and the processes, so resuming needs the number of the step
    alone. `whole(step)`: the micro-batches that one process would have had, whose groups are everybody's.
    Where the model is cut (`settings.shard`) every process has as many micro-batches in a step as the others; `own`
    says how many of them count, the rest are fillers: the step's smallest group, computed and taken times 0.
    """

    def __init__(self, lengths: Sequence[int], settings: TrainConfig, world: World | None = None):
        self.lengths, self.settings, self.world = lengths, settings, world or World()
        self._epochs: dict[int, list[list[list[int]]]] = {}
        self.steps_per_epoch = len(self._plan(0))
        self.total = math.ceil(settings.epochs * self.steps_per_epoch - 1e-9)
        if settings.max_steps is not None:
            self.total = min(self.total, settings.max_steps)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def whole(self, step: int) -> list[list[int]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._plan(epoch)[index]

    def __getitem__(self, step: int) -> list[list[int]]:
        whole = self.whole(step)
        if self.world.size == 1:
            return whole
        hands = self._hands(whole)
        mine = hands[self.world.rank]
        if self.settings.shard == "none":
            return mine
        smallest = min((index for part in whole for index in part), key=lambda index: (self.lengths[index], index))
        return mine + [[smallest]] * (max(map(len, hands)) - len(mine))

    def own(self, step: int) -> int:
        """How many of the micro-batches of `plan[step]` are no fillers."""
        whole = self.whole(step)
        return len(whole) if self.world.size == 1 else len(self._hands(whole)[self.world.rank])

    def _hands(self, whole: list[list[int]]) -> list[list[list[int]]]:
        """The micro-batches of every process."""
        groups = [index for part in whole for index in part]
        hands = packing.deal(groups, self.lengths, self.world.size)
        return [packing.pack(hand, self.lengths, self.settings.tokens_per_batch) for hand in hands]

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        if epoch not in self._epochs:
            steps = packing.plan_epoch(
                self.lengths,
                groups_per_step=self.settings.groups_per_step,
                tokens_per_batch=self.settings.tokens_per_batch,
                seed=self.settings.seed,
                epoch=epoch,
            )
            # Two epochs are kept: batches made ahead may already belong to the next one.
            self._epochs = {kept: plan for kept, plan in self._epochs.items() if kept >= epoch - 1}
            self._epochs[epoch] = steps
            assert len(steps) == len(self._epochs.get(0, steps)), "every epoch has the same number of steps"
        return self._epochs[epoch]
