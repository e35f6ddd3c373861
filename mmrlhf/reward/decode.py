"""Critiques and their scores from one cache: the prompt is read once for all answers, and no token is read twice.

    prefixes [G, L]  ->  cache of G rows  ->  repeated, a row a critique [R]  ->  " answer …[Evaluation]:"
    ->  critique, a token a step  ->  end of turn and what follows it  ->  the last hidden state is what is scored

Rows are padded where they end early; padding is masked and takes no position, so a row does not see its neighbours.
Only for decoders whose every layer is full causal attention (`why_not`): a window counts padding as tokens, and the
state of a linear layer cannot be repeated. Not covered: beam search.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import GroupBatch, Layout
from mmrlhf.models import parts, shared_prefix, vision
from mmrlhf.models.sharing import can_share

_LOOK = 8  # steps between two looks at whether all rows have ended: a look waits for the device


@dataclass(frozen=True)
class Decoding:
    """How a token is chosen: the likeliest, or (`temperature` given) drawn from the whole distribution."""

    max_new_tokens: int
    ends: tuple[int, ...]  # ids that end a critique
    suppressed: tuple[int, ...] = ()  # ids that never come up
    temperature: float | None = None
    seed: int = 0


def why_not(model: nn.Module) -> str | None:
    """Why a decoder's critiques cannot come from a shared cache, or None if they can."""
    shared, reason = can_share(model)
    if not shared:
        return reason
    config = parts.text_config(model)
    types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in types or (not types and getattr(config, "sliding_window", None)):
        return "its decoder attends within a window"
    return None


def speak(
    model: nn.Module,
    batch: GroupBatch,  # answers as responses, up to where a critique begins; on the model's device
    layout: Layout,
    features: vision.VisionFeatures,
    closing: Sequence[Sequence[int]],  # G, what follows a critique
    decoding: Decoding,
    *,
    samples: int = 1,
) -> tuple[list[list[int]], Tensor]:
    """(token ids of R * samples critiques, hidden [R * samples, H] of the last token after each), without gradients.

    The samples of a response follow one another. A critique's ids have neither its end nor what comes after.
    """
    run = _Run(model, batch, layout, features, samples)
    spoken = run.critiques(decoding)
    after = [list(ids) for ids, responses in zip(closing, layout.response_len, strict=True) for _ in responses]
    return spoken, run.close([ids for ids in after for _ in range(samples)])


class _Run:
    """A cache with a row a critique, and what the next token of each row needs."""

    def __init__(
        self, model: nn.Module, batch: GroupBatch, layout: Layout, features: vision.VisionFeatures, samples: int
    ):
        from transformers import DynamicCache

        self.model, self.inner = model, parts.inner_model(model)
        self.known = inspect.signature(self.inner.forward).parameters
        self.device = batch.input_ids.device
        self.padding = shared_prefix.text_token(model)
        self.keys = [key for key in batch.response_keys for _ in range(samples)]
        positions = (
            shared_prefix.position_ids(model, batch, layout) if batch.position_ids is None else batch.position_ids
        )
        starts = list(zip(layout.group_start, layout.prefix_len, strict=True))
        self.cache = DynamicCache()
        self.mask = torch.zeros(len(starts), 0, dtype=torch.int64, device=self.device)
        prefixes = [torch.arange(at, at + length) for at, length in starts]
        self._read(batch.input_ids, positions, prefixes, features)
        rows = []
        groups = []
        for group, ((at, length), responses) in enumerate(zip(starts, layout.response_len, strict=True)):
            at += length
            for response in responses:
                rows += [torch.arange(at, at + response)] * samples
                groups += [group] * samples
                at += response
        chosen = torch.tensor(groups, device=self.device)
        self.cache.batch_select_indices(chosen)
        self.mask = self.mask[chosen]
        self.hidden = self._read(batch.input_ids, positions, rows, vision.VisionFeatures())  # [R, H]
        last = torch.tensor([int(row[-1]) for row in rows], device=self.device)
        self.position = positions[:, last] + 1  # [1 or 3, R] of the next token

    def critiques(self, decoding: Decoding) -> list[list[int]]:
        """The ids of each row's critique; the cache has read them."""
        head = parts.lm_head(self.model)
        ends = torch.tensor(decoding.ends, dtype=torch.int64, device=self.device)
        suppressed = torch.tensor(decoding.suppressed, dtype=torch.int64, device=self.device)
        sampler = _Sampler(decoding, self.keys, self.device)
        ended = torch.zeros(len(self.keys), dtype=torch.bool, device=self.device)
        tokens: list[Tensor] = []
        for step in range(decoding.max_new_tokens):
            logits = head.logits(self.hidden)  # [R, V]
            logits[:, suppressed] = -torch.inf
            token = sampler(logits)
            ended = ended | torch.isin(token, ends)
            tokens.append(torch.where(ended, -1, token))
            if step % _LOOK == _LOOK - 1 and bool(ended.all()):
                break
            self._step(torch.where(ended, self.padding, token), ~ended)
        rows = torch.stack(tokens, dim=1).tolist() if tokens else [[] for _ in self.keys]
        return [[token for token in row if token >= 0] for row in rows]

    def close(self, closing: Sequence[Sequence[int]]) -> Tensor:
        """[R, H]: the hidden state of each row's last token once it has read these (at least one each)."""
        for place in range(max(map(len, closing))):
            there = torch.tensor([place < len(ids) for ids in closing], device=self.device)
            tokens = [ids[place] if place < len(ids) else self.padding for ids in closing]
            self._step(torch.tensor(tokens, device=self.device), there)
        return self.hidden

    def _step(self, token: Tensor, there: Tensor) -> None:  # [R] int64, [R] bool: which rows read their token
        self.mask = torch.cat((self.mask, there[:, None].long()), dim=1)
        hidden = self._forward(self.inner, {"input_ids": token[:, None]}, token[:, None], self.position[..., None])
        hidden = hidden[:, 0]  # [R, H]
        self.hidden = torch.where(there[:, None], hidden, self.hidden)
        self.position = self.position + there.long()

    def _read(
        self,
        input_ids: Tensor,  # [T]
        positions: Tensor,  # [1 or 3, T]
        rows: Sequence[Tensor],  # B of indices into T
        features: vision.VisionFeatures,
    ) -> Tensor:
        """[B, H]: the hidden state of each row's last token; the cache has read the rows."""
        longest = max(row.numel() for row in rows)
        index = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            index[number, : row.numel()] = row
            mask[number, : row.numel()] = 1
        last = (mask.sum(1) - 1).to(self.device)
        index, mask = index.to(self.device), mask.to(self.device)
        ids = torch.where(mask.bool(), input_ids[index], self.padding)
        self.mask = torch.cat((self.mask, mask), dim=1)
        module, inputs = vision.decoder_inputs(self.model, ids, features)
        hidden = self._forward(module, inputs, ids, positions[:, index])
        return hidden[torch.arange(len(rows), device=self.device), last]

    def _forward(self, module: Any, inputs: dict[str, Any], ids: Tensor, positions: Tensor) -> Tensor:
        """[B, S, H]; positions are [1 or 3, B, S]."""
        types = shared_prefix.token_types(self.model, ids)
        inputs = dict(inputs)
        inputs |= {name: types for name in ("token_type_ids", "mm_token_type_ids") if name in self.known}
        inputs["position_ids"] = positions if positions.shape[0] == 3 else positions[0]
        out = module(**inputs, attention_mask=self.mask, past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state


def seed_of(seed: int, key: str) -> int:
    """A seed of 56 bits that a response has of its own, in whatever batch it comes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:7], "big")


class _Sampler:
    """Logits [R, V] -> ids [R]. Each row draws from a generator of its own, so its draws do not depend on its batch."""

    def __init__(self, decoding: Decoding, keys: Sequence[str], device: torch.device):
        self.temperature = decoding.temperature
        self.generators: list[torch.Generator] = []
        if self.temperature is None:
            return
        seen: dict[str, int] = {}
        for key in keys:
            seen[key] = seen.get(key, 0) + 1
            seed = seed_of(decoding.seed, f"{seen[key]} {key}")
            self.generators.append(torch.Generator(device=device).manual_seed(seed))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature is None:
            return logits.argmax(dim=-1)
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return (logits / self.temperature - noise.log()).argmax(dim=-1)
