"""Where a step between collation and the loss would wait for a device: every host read of a tensor, by name.

On a CPU a read costs nothing, so nothing but a list can tell that one crept in. A read is an operation whose result
depends on values that the host has to know: `.item()` (also int(), bool(), if), `.tolist()`, nonzero, boolean indices.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmrlhf.batch import GroupBatch, layout_of, on_device
from mmrlhf.models import tower, vision
from mmrlhf.models.shared_prefix import prepare, response_hidden
from tiny import tiny_batch, tiny_model

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "item")


class Reads(TorchDispatchMode):
    """Counts host reads by the function that makes them, of this project or transformers."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or by_mask:
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if {"mmrlhf", "transformers"} & set(path.parts) and "tests" not in path.parts:
                self.found[f"{path.name} {frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        self.found["elsewhere"] += 1


@pytest.fixture
def reads(monkeypatch):
    """A counter; `tolist` reads without telling the dispatcher."""
    mode = Reads()
    real = torch.Tensor.tolist

    def tolist(tensor):
        mode.note()
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return mode


def test_the_counter_counts(reads):
    values = torch.tensor([1.0, 2.0])
    with reads:
        if values.sum() > 0:
            values.tolist()
        values[values > 1]
        values[torch.tensor([0])]
        values.nonzero()
    assert sum(reads.found.values()) == 4


def test_the_decoder_and_its_backward_read_nothing_but_one_check_of_transformers(reads):
    """The placeholder mask's comparison of counts is read once a forward, before the first layer."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = prepare(model, tiny_batch(model, processor))
    layout = layout_of(batch)
    features = vision.encode(model, batch)
    response_hidden(model, batch, vision=features, layout=layout)  # sets the attention, once
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, fused=True)
    reads.found.clear()
    with reads:
        hidden = response_hidden(model, batch, vision=features, layout=layout)
        hidden.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    known = ("import_utils.py torch_compilable_check", "modeling_qwen2_5_vl.py get_placeholder_mask")
    assert sum(reads.found.pop(name, 0) for name in known) <= 2
    assert dict(reads.found) == {}


def test_the_tower_reads_its_grid_and_no_lengths(reads, monkeypatch):
    """Once a picture's geometry, not three times a layer: that is what one attention call a layer is for."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = tiny_batch(model, processor)
    monkeypatch.setattr(tower, "kernel", lambda *kind: ((lambda q, k, v, ends, longest, scale: v * 1.0), "stand-in"))
    vision.encode(model, batch)
    reads.found.clear()
    with reads:
        vision.encode(model, batch)
    named = {place.split()[1]: times for place, times in reads.found.items()}
    assert set(named) <= {
        "get_vision_position_ids",
        "get_vision_cu_seqlens",
        "get_vision_window_index",
        "get_max_seqlen",
        "get_image_features",
        "rot_pos_emb",
        "get_window_index",
        "forward",
        "_check_counts",
    }
    assert sum(named.values()) <= 12, named


def test_a_batch_goes_to_cuda_through_pinned_memory(monkeypatch):
    """Every tensor, the pictures' too: `.to` from ordinary memory waits for the stream."""
    pinned = []

    class Where(torch.Tensor):
        def pin_memory(self):
            pinned.append(tuple(self.shape))
            return self

        def to(self, device, *, non_blocking=False):
            assert non_blocking
            return self

    def where(*shape):
        return torch.zeros(shape, dtype=torch.int64).as_subclass(Where)

    batch = GroupBatch(*(where(n) for n in range(1, 9)), where(3, 2), vision={"pixel_values": where(4, 5)})
    batch.to("cuda")
    assert len(pinned) == 10
    assert (4, 5) in pinned
    assert on_device(torch.ones(2), "cpu").is_pinned() is False
