"""The whole training step, from pictures and text to the updated weights, against TRL's DPOTrainer in one run.

    python -m benchmarks.train_step --prefix 320 --response 100 --k 2 --groups 2 --steps 3 --write NAME

Both sides start from the same weights, see the same pictures and answers, score all pairs of the K answers, clip to
norm 1 and step AdamW. Ours is timed three ways: with a live reference model, with cached reference scores, and with the
prefix not shared. Ratios are printed only if the losses of the two trainers agree at every step.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.peers.trl_step import TrlStep
from benchmarks.step_models import build_model, build_processor, build_records
from mmrlhf.batch import GroupBatch
from mmrlhf.data.collate import Encoder, collate
from mmrlhf.data.schema import ImageRef, Message, Part, PreferenceGroup, Response
from mmrlhf.models.load import lm_head
from mmrlhf.models.shared_prefix import response_hidden
from mmrlhf.models.vision import encode
from mmrlhf.ops import fused_preference_loss, linear_logp, sequence_score

LOSS_TOLERANCE = 2e-4  # TRL logs four digits; both sides start at log 2 and move by 1e-2 in a step


class Side(Protocol):
    """A trainer: `run(steps)` -> (seconds of each step, losses, tokens through the decoder a step; 0 if not known)."""

    def run(self, steps: int) -> tuple[list[float], list[float], int]: ...


class OurStep:
    """`run(steps)` -> (seconds of each step from picture bytes to update, losses, tokens through the decoder)."""

    def __init__(self, model, processor, records, *, lr: float, beta: float, cached: bool, share_prefix: bool = True):
        self.model, self.beta, self.cached, self.share_prefix = model, beta, cached, share_prefix
        self.reference = None if cached else copy.deepcopy(model).requires_grad_(False).eval()
        self.encoder = Encoder(processor, root=Path("."), max_group_tokens=1 << 20)
        self.groups = [to_group(record) for record in records]
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        self.trained = trained
        if cached:
            self.kept = [self.score(self.model, self.batch(group)) for group in self.groups]

    def batch(self, group: PreferenceGroup) -> GroupBatch:
        batch = collate([self.encoder.encode(group)])
        return batch.to(next(self.model.parameters()).device)

    def score(self, model, batch: GroupBatch, vision=None) -> torch.Tensor:
        """Reference log-probabilities [N]."""
        with torch.no_grad():
            hidden = response_hidden(model, batch, vision=vision, share_prefix=self.share_prefix)
            return linear_logp(hidden, lm_head(model).weight, batch.targets)

    def run(self, steps: int) -> tuple[list[float], list[float], int]:
        seconds, losses, tokens = [], [], 0
        self.model.train()
        pairs = sum(len(group.preference_pairs()) for group in self.groups)
        for _ in range(steps):
            started = time.perf_counter()
            total = 0.0
            for index, group in enumerate(self.groups):
                batch = self.batch(group)
                tokens += batch.num_tokens
                vision = encode(self.model, batch)  # once: the tower is frozen, and serves policy and reference
                reference = self.kept[index] if self.cached else self.score(self.reference, batch, vision)
                hidden = response_hidden(self.model, batch, vision=vision, share_prefix=self.share_prefix)
                out = fused_preference_loss(
                    hidden,
                    lm_head(self.model).weight,
                    batch.targets,
                    batch.cu_seqlens,
                    batch.pairs,
                    reference_scores=sequence_score(reference, batch.cu_seqlens),
                    beta=self.beta,
                    num_pairs=pairs,
                )
                out.loss.backward()
                total += float(out.loss.detach())
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - started)
            losses.append(total)
        return seconds, losses, tokens // steps


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


def sides(model, processor, records, *, lr: float = 1e-5, beta: float = 0.1) -> dict[str, Callable[[], Side]]:
    """The contestants by name, each on its own copy of the model when it is built."""

    def ours(**options) -> Side:
        return OurStep(copy.deepcopy(model), processor, records, lr=lr, beta=beta, **options)

    return {
        "trl": lambda: TrlStep(copy.deepcopy(model), processor, records, lr=lr, beta=beta),
        "live reference": lambda: ours(cached=False),
        "cached reference": lambda: ours(cached=True),
        "separate rows": lambda: ours(cached=False, share_prefix=False),
    }


def compare(arguments: argparse.Namespace) -> dict:
    """One case: TRL and ours on fresh copies of one model. Returns figures, or raises if the losses disagree."""
    processor = build_processor()
    model = build_model(arguments.model, processor, dtype=getattr(torch, arguments.dtype))
    records = build_records(
        arguments.groups, image_tokens=arguments.prefix - 30, response_tokens=arguments.response, k=arguments.k
    )
    figures: dict[str, dict] = {}
    for name, build in sides(model, processor, records).items():
        seconds, losses, tokens = build().run(arguments.steps + 1)
        figures[name] = {"seconds": statistics.median(seconds[1:]), "losses": losses}  # the first step warms up
        if tokens:
            figures[name]["tokens"] = tokens
    for name, figure in figures.items():
        error = max(abs(a - b) for a, b in zip(figure["losses"], figures["trl"]["losses"], strict=True))
        figure["max_loss_difference"] = error
        figure["ratio"] = figures["trl"]["seconds"] / figure["seconds"]
        if error > LOSS_TOLERANCE:
            raise RuntimeError(f"{name}: losses {figure['losses']} differ from TRL's {figures['trl']['losses']}")
    return figures


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--model", default="small", choices=("small", "qwen2_5_vl_7b"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--prefix", type=int, default=320, help="prompt tokens, image tokens included (about)")
    parser.add_argument("--response", type=int, default=100, help="tokens of a response (about)")
    parser.add_argument("--k", type=int, default=2, help="responses a prompt; all their pairs are trained on")
    parser.add_argument("--groups", type=int, default=2, help="prompts an optimiser step")
    parser.add_argument("--steps", type=int, default=3, help="timed optimiser steps, after one that warms up")
    parser.add_argument("--write", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args(words)
    figures = compare(arguments)
    print(f"{'':18} {'s / step':>9} {'TRL / it':>9} {'|loss difference|':>18}")
    for name, figure in figures.items():
        print(f"{name:18} {figure['seconds']:9.3f} {figure['ratio']:8.2f}x {figure['max_loss_difference']:18.1e}")
    if arguments.write:
        path = Path(__file__).parent / "results" / f"{arguments.write}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record(arguments, figures), indent=1) + "\n")
    return 0


def record(arguments: argparse.Namespace, figures: dict) -> dict:
    """What a results file holds: the figures, the case, and the machine they are from."""
    import transformers
    import trl

    return {
        "command": "python -m benchmarks.train_step " + " ".join(sys.argv[1:]),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "case": {k: v for k, v in vars(arguments).items() if k != "write"},
        "figures": figures,
    }


if __name__ == "__main__":
    sys.exit(main())
