"""What a model keeps in memory for one batch, counted without its weights and without computing anything.

`skeleton` builds the model from its config on the meta device (shapes and dtypes, no storage), so a 70B model can be
planned on a laptop. `activations` sends a fake batch of the given layout through its decoder and adds up what autograd
would keep, a storage once, by decoder layer. Exact for the decoder on the SDPA path; varlen kernels keep about the
same (gathered keys and values). The vision tower is counted by formula (`vision`): its forward reads image sizes.

Not covered: what the allocator rounds up or leaves fragmented, libraries' workspaces, CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import Layout
from mmrlhf.models import load, shared_prefix
from mmrlhf.models.parts import base_model, decoder, image_token_ids, inner_model, text_config, vision_parameters


@dataclass(frozen=True)
class Activations:
    """Bytes kept from forward to backward of one batch."""

    layers: tuple[int, ...]  # by decoder layer
    rest: int  # embeddings, rotary tables, final norm
    layer_input: int  # of one decoder layer: all that gradient checkpointing keeps of it

    def kept(self, *, checkpointing: bool) -> int:
        """All of them; with gradient checkpointing the layers' inputs, and one layer computed again."""
        if checkpointing:
            return self.rest + len(self.layers) * self.layer_input + self.largest
        return self.rest + sum(self.layers)

    @property
    def largest(self) -> int:
        return max(self.layers, default=0)


def skeleton(
    path: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The model of a folder or hub id on the meta device; of an adapter folder, its base model.

    Only the config is read. Raises as `load.load_model` does for what it refuses in a config.
    """
    from transformers.initialization import no_init_weights

    config = load.read_config(path, trust_remote_code=trust_remote_code, revision=revision)
    wanted = config.dtype if dtype == "auto" else getattr(torch, dtype)
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    with no_init_weights(), torch.device("meta"):
        model = load.auto_class(config).from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
        model.tie_weights()  # without weights to initialise nobody else does, and a tied head would count twice
        return model


def activations(model: nn.Module, layout: Layout) -> Activations:
    """What the decoder of a skeleton keeps for its backward on a batch of `layout`.

    A decoder that cannot share a prefix is counted as it runs: padded rows, a group at a time, all kept. Parameters
    themselves are not counted. What is frozen keeps what autograd would keep there, no more. The skeleton's tensors
    are replaced by fake ones on the CPU: attention on the meta device would be the quadratic kind.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        _to_fake(model)
        return _count(model, layout)


def _to_fake(model: nn.Module) -> None:
    """Every parameter and buffer as a fake tensor on the CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, old in slots.items():
                if old is None:
                    continue
                if id(old) not in made:
                    fresh = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    trained = old.requires_grad
                    made[id(old)] = nn.Parameter(fresh, trained) if isinstance(old, nn.Parameter) else fresh
                slots[name] = made[id(old)]  # type: ignore[assignment]


def _count(model: nn.Module, layout: Layout) -> Activations:
    text = decoder(model)
    dtype, width = next(text.parameters()).dtype, text_config(model).hidden_size
    needs_grad = any(p.requires_grad for p in (*vision_parameters(model), *text.get_input_embeddings().parameters()))
    tokens = sum(layout.group_len)
    shapes: list[tuple[int, int]] = [(1, tokens)]
    inputs: dict[str, Any] = {}
    if shared_prefix.can_share(model)[0]:
        ids = torch.zeros(tokens, dtype=torch.int64)
        inputs = shared_prefix.packed_inputs(model, ids, layout, scored_only=True)
    else:
        rows = zip(layout.prefix_len, layout.response_len, strict=True)
        shapes = [(len(responses), prefix + max(responses)) for prefix, responses in rows]
    kept = _Kept(model, text.layers)
    with kept:
        for shape in shapes:
            hidden = torch.empty(*shape, width, dtype=dtype, requires_grad=needs_grad)
            text(inputs_embeds=hidden, **inputs, use_cache=False)
    layer_input = sum(rows * length for rows, length in shapes) * width * hidden.element_size()
    return Activations(*kept.sums(), layer_input)


class _Kept:
    """Inside, every storage that autograd saves is noted with the layer it is saved in; parameters are not."""

    def __init__(self, model: nn.Module, layers: Any):
        self.layers = list(layers)
        self.owned = {_storage(p) for p in model.parameters()}
        self.found: dict[int, tuple[Tensor, int | None]] = {}  # storage -> a tensor that keeps it alive, its layer
        self.layer: int | None = None

    def __enter__(self) -> None:
        self.stack = ExitStack()
        for number, layer in enumerate(self.layers):
            for hook in (
                layer.register_forward_pre_hook(partial(self._at, number)),
                layer.register_forward_hook(partial(self._at, None)),
            ):
                self.stack.callback(hook.remove)
        self.stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _at(self, number: int | None, *_: Any) -> None:
        self.layer = number

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self.owned:
            self.found.setdefault(_storage(tensor), (tensor, self.layer))
        return tensor

    def sums(self) -> tuple[tuple[int, ...], int]:
        """Bytes by layer, and outside the layers."""
        sums = dict.fromkeys((None, *range(len(self.layers))), 0)
        for tensor, at in self.found.values():
            sums[at] += tensor.untyped_storage().nbytes()
        return tuple(sums[number] for number in range(len(self.layers))), sums[None]


def vision(model: nn.Module, inputs: Mapping[str, Tensor], input_ids: Tensor) -> tuple[int, int]:
    """(bytes kept for the backward, bytes in use while the tower runs) for a batch's vision inputs, by formula.

    A layer of a tower keeps about 8 times its width and twice its MLP width a patch (its two norms, q, k, v, attention,
    both MLP activations); without gradients one such layer is in use at a time. The features are kept either way.
    """
    if not any(key.startswith("pixel_values") for key in inputs):
        return 0, 0
    inner = inner_model(model)
    config = getattr(base_model(model).config, "vision_config", None)
    size = next(inner.parameters()).element_size()
    patch = _first(config, "patch_size", default=1)
    patches = pixels = 0
    for key, value in inputs.items():
        if key.startswith("pixel_values"):
            pixels += value.numel() * size
            flat = value.dim() <= 3  # already cut into patches
            patches += value.numel() // (value.shape[-1] if flat else value.shape[-3] * patch * patch)
    width = _first(config, "embed_dim", "hidden_size")
    layer = size * patches * (8 * width + 2 * _first(config, "intermediate_size", default=4 * width))
    marks = set(image_token_ids(base_model(model).config).values())
    tokens = sum(token in marks for token in input_ids.tolist())
    features = tokens * text_config(model).hidden_size * size
    trained = any(p.requires_grad for p in vision_parameters(model, projector=False))
    kept = pixels + features + (layer * _first(config, "num_hidden_layers", "depth") if trained else 0)
    return kept, pixels + features + layer


def _first(config: Any, *names: str, default: int = 0) -> int:
    """The first of some settings that is a number (or the first of a pair of numbers)."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return default


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
