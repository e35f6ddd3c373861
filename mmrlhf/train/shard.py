"""A model cut over the processes: FSDP2 (`torch.distributed.fsdp.fully_shard`), a block of the model at a time.

    block   each decoder layer, each block of a trained vision tower: gathered for its forward, again for its backward
    rest    embeddings, lm_head, norms, projector: gathered for a whole micro-batch, so that code which reads weights
            outside of their module's forward (the loss, `image_newline`) finds them as they always were
    whole   the vision side where all of it is frozen: no shards, so its images need not be alike on the processes

Each process keeps 1/N of the first two, in float32 where they are trained (the masters), and AdamW's moments of that.
bfloat16 models gather rounded weights and sum gradients in float32. Everything that touches weights goes through
`Shards.run`, which is the same collectives on every process: all call it equally often (`setup.Plan` sees to that).

The model is loaded, scored as its own reference and checked before it is cut: its weights, without gradients or
moments, fit each device once. Not covered: tensor parallelism, copies of the shards (HSDP), offloading to the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmrlhf.config import TrainConfig
from mmrlhf.models import parts
from mmrlhf.ops.sharded import is_dtensor, local_rows
from mmrlhf.train.checkpoint import Rows
from mmrlhf.train.distributed import World, processes

Found = TypeVar("Found")


class _Root(nn.Module):
    """FSDP2's root: whatever runs inside its forward finds `rest` gathered."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        return work(*args)


class Shards:
    """How a model lies on the processes; without a root each has it whole, and nothing here does anything.

    `touch`: as for `vision.encode`; whole models need none. `pictured`: trained parameters that only pictures reach. A
    step without any gives them zeros here where one process gives them no gradient, and AdamW would move them.
    """

    def __init__(
        self,
        root: Any = None,
        *,
        rounded: frozenset[str] = frozenset(),
        touch: tuple[str, ...] | None = (),
        pictured: frozenset[str] = frozenset(),
    ):
        self.root, self.rounded, self.touch, self.pictured = root, rounded, touch, pictured

    def run(self, work: Callable[..., Found], *args: Any) -> Found:
        """`work(*args)` with the weights there; what a backward starts from is what it returns."""
        return work(*args) if self.root is None else self.root(work, *args)

    def reduce(self, now: bool) -> None:
        """Whether the next backward sums gradients over the processes, or adds to what this one has."""
        if self.root is not None:
            self.root.set_requires_gradient_sync(now)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """`rest` is there inside, for code that runs without gradients; blocks come when they are called."""
        if self.root is None:
            yield
            return
        with torch.no_grad():
            self.root.unshard()
            try:
                yield
            finally:
                self.root.reshard()

    def stored(self, name: str, tensor: Tensor) -> Tensor | Rows:
        """A parameter as a checkpoint has it, in the dtype the model computes in: own rows, or a whole one."""
        if not is_dtensor(tensor):
            return tensor
        local, (start, total) = local_rows(tensor), row_range(tensor)
        return Rows(local.to(torch.bfloat16) if name in self.rounded else local, start, total)

    def whole(self, model: nn.Module, *, adapters_only: bool, keep: bool) -> dict[str, Tensor] | None:
        """The model's state dict on the host where `keep`, gathered a tensor at a time; None where it is not cut.

        All processes call it; one that does not keep holds a single tensor at a time.
        """
        if self.root is None:
            return None
        names = {id(p): name for name, p in model.named_parameters()}
        base = parts.base_model(model)
        ends = [each for each in (base.get_input_embeddings(), base.get_output_embeddings()) if each is not None]
        beside = {id(p) for each in ends for p in each.parameters()}  # peft looks at them too
        found: dict[str, Tensor] = {}
        made: dict[int, Tensor] = {}  # tied ones once
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if adapters_only and not tensor.requires_grad and id(tensor) not in beside:
                    continue
                if id(tensor) not in made:
                    dtype = torch.bfloat16 if names.get(id(tensor)) in self.rounded else tensor.dtype
                    full = tensor.detach().to(dtype)
                    full = full.full_tensor() if is_dtensor(full) else full
                    made[id(tensor)] = full.cpu() if keep else full.new_empty(0)
                if keep:
                    found[name] = made[id(tensor)]
        return found


def row_range(tensor: Any) -> tuple[int, int]:
    """(the first of the rows of a DTensor that this process has, how many it has in all)."""
    mesh, total = tensor.device_mesh, tensor.shape[0]
    share = -(-total // mesh.size())  # as torch.chunk cuts
    return min(mesh.get_local_rank() * share, total), total


def check(settings: TrainConfig) -> None:
    """ValueError where the settings ask for shards and there is one process."""
    if settings.shard == "full" and processes() == 1:
        raise ValueError(
            "shard is full, but this is one process (WORLD_SIZE is 1 or not set): start several with torchrun (for "
            "--plan set WORLD_SIZE alone), or set shard=none"
        )


def shard(model: nn.Module, settings: TrainConfig, world: World, kinds: tuple[str, ...]) -> Shards:
    """Cut a model that was made trainable, in place. `kinds`: of pictures in the data ("image", "video").

    Raises ValueError naming the parameter where the dtypes of a block do not allow it.
    """
    if settings.shard == "none":
        return Shards()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = parts.parameter_device(model)
    mesh = init_device_mesh(device.type, (world.size,))
    ignored = set(whole_parameters(model))
    rounded = frozenset(name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    names = {id(p): name for name, p in model.named_parameters()}  # no references: what was cut has to be freed
    pictured = frozenset(names[id(p)] for p in parts.vision_parameters(model) if p.requires_grad)
    root = _Root(model)
    for module in (*blocks(model), root):
        own = {names[id(p)]: p for p in module.parameters() if p not in ignored and not is_dtensor(p)}
        policy = _policy(own)
        # The block's float32 rows are cut from a float32 copy, a block at a time.
        for parameter in own.values():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for module in root.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            # The loss is divided by the totals of the step, so gradients are summed. Gloo knows no other reduction.
            unit: Any = module
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    cut_tower = any(is_dtensor(p) for block in _vision_blocks(model) for p in block.parameters())
    return Shards(root, rounded=rounded, touch=kinds if cut_tower else None, pictured=pictured)


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that stay whole on every process: the vision side's, if its tower is frozen, but for a trained projector.

    A frozen tower is 0.4 to 1.3 GB in bfloat16 (InternViT-6B: 12), and cut it would have to be gathered for every
    image; a process with more images than another would wait for it for ever.
    """
    if any(p.requires_grad for p in parts.vision_parameters(model, projector=False)):
        return []
    return [p for p in parts.vision_parameters(model) if not p.requires_grad]


def blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: decoder layers, the blocks of a tower that is trained, and a head beside the lm_head
    (a reward model's), which may have another dtype than the rest."""
    tower = [] if whole_parameters(model) else _vision_blocks(model)
    base = parts.base_model(model)
    usual = (parts.inner_model(model), base.get_output_embeddings())
    beside = [child for child in base.children() if child not in usual and any(True for _ in child.parameters())]
    return [*parts.decoder(model).layers, *tower, *beside]


def _vision_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the vision side by transformers' own base class; of another's tower, none (it is then `rest`)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    for _, part in parts.vision_modules(model):
        inside: set[int] = set()
        for module in part.modules():  # parents first
            if isinstance(module, GradientCheckpointingLayer) and id(module) not in inside:
                inside |= {id(each) for each in module.modules()}
                found.append(module)
    return found


def _policy(own: Mapping[str, nn.Parameter]) -> Any:
    """What FSDP2 computes and sums in for one block. Its rows of trained bfloat16 weights are float32 afterwards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    trained = {p.dtype for p in own.values() if p.requires_grad}
    if torch.bfloat16 not in trained:
        if len(trained) > 1:
            raise ValueError(_mixed(own, "trained weights"))
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    if {p.dtype for p in own.values()} != {torch.bfloat16}:
        raise ValueError(_mixed(own, "weights"))
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _mixed(own: Mapping[str, nn.Parameter], what: str) -> str:
    examples = {p.dtype: name for name, p in own.items()}
    told = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in examples.items())
    return (
        f"shard is full, which needs {what} of one dtype in each block, but {told}: set model.dtype=bfloat16 or "
        "model.dtype=float32, or shard=none"
    )


def picture_kinds(dataset: Any) -> tuple[str, ...]:
    """The kinds of pixels that a data set's batches can have: "image", "video" (native ones), both or none."""
    found: set[str] = set()
    for what in ("images", "videos"):  # one group of each: which tensors a video becomes is the processor's choice
        index = next((i for i, group in enumerate(dataset.groups) if getattr(group, what)), None)
        names = dataset[index].vision if index is not None else ()
        found |= {"video" if name.endswith("_videos") else "image" for name in names if name.startswith("pixel_values")}
    return tuple(sorted(found))
