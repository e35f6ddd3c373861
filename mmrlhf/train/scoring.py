"""A batch through the model: pictures once, prompts once, and only the rows that predict a response token come out.

The policy (with gradients) and the reference pass (without) go through the same two functions, so at step 0 they agree
to the last bit where they see the same batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrlhf import ops
from mmrlhf.batch import GroupBatch, layout_of
from mmrlhf.config import TrainConfig
from mmrlhf.models import load, parts, shared_prefix, vision
from mmrlhf.train.distributed import World
from mmrlhf.train.files import FileSystem
from mmrlhf.train.reference import ReferenceScores, cache_reference
from mmrlhf.train.vision_cache import Batches

Keep = Callable[[GroupBatch, int, vision.VisionFeatures], None]  # `vision_cache.Batches.keep`


def response_rows(
    model: nn.Module,
    batch: GroupBatch,
    *,
    share_prefix: bool,
    keep: Keep | None = None,
    touch: Sequence[str] | None = None,
) -> tuple[GroupBatch, Tensor]:
    """(the batch on the model's device, hidden [N, H]); `batch` comes on the CPU, where its layout is read.

    `touch`: as for `vision.encode`.
    """
    layout = layout_of(batch)
    batch = shared_prefix.prepare(model, batch).to(parts.parameter_device(model))
    # Under no_grad, or with everything before the decoder frozen, this records nothing for the backward.
    computed = functools.partial(keep, batch) if keep is not None else None
    features = vision.encode(model, batch, grad=True, computed=computed, touch=touch)
    hidden = shared_prefix.response_hidden(model, batch, vision=features, share_prefix=share_prefix, layout=layout)
    return batch, hidden


def token_logp(
    model: nn.Module, batch: GroupBatch, *, share_prefix: bool, backend: str | None = None, keep: Keep | None = None
) -> Tensor:
    """[N] float32: the log-probability of each response token, in nats, without gradients."""
    with torch.no_grad():
        head = load.lm_head(model)
        batch, hidden = response_rows(model, batch, share_prefix=share_prefix, keep=keep)
        return ops.linear_logp(
            hidden,
            head.weight,
            batch.targets,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            adapter=[ops.LoraAdapter(*factors) for factors in head.adapters],
            backend=backend,
        )


def reference_scores(
    model: nn.Module,
    batches: Batches,
    settings: TrainConfig,
    *,
    key: str,
    lengths: Sequence[int],
    share_prefix: bool,
    between: Callable[[], None] = lambda: None,
    fs: FileSystem | None = None,
    world: World | None = None,
) -> ReferenceScores:
    """The cached reference of a data set under the model as it is now; see `reference.cache_reference`."""
    folder = Path(settings.reference_cache) if settings.reference_cache else Path(settings.output) / "reference"

    def score(batch: GroupBatch) -> Tensor:
        return token_logp(model, batch, share_prefix=share_prefix, backend=settings.backend, keep=batches.keep)

    model.eval()
    return cache_reference(
        score,
        batches,
        batches.dataset,
        folder,
        key=key,
        lengths=lengths,
        tokens_per_batch=settings.tokens_per_batch,
        between=between,
        fs=fs,
        world=world,
    )
