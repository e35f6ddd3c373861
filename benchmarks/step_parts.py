"""Where the time of our own step goes, and how far each part is from its flops: `python -m benchmarks.step_parts`.

One prompt with K answers, trained whole, one thread, seconds of this process's processor, which other processes do not
lengthen much. The floor of a part is its flops (`step_flops`) at the rate of a plain matmul of the decoder's shape,
timed before every round, so that other load weighs on both; the fastest rounds are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.step_case import Case
from benchmarks.step_flops import Work, work
from benchmarks.step_models import SHAPES, build_model, build_processor, build_records
from benchmarks.step_sides import BETA, CLIP, OPTIONS, OurStep
from mmrlhf.models.load import lm_head
from mmrlhf.models.vision import encode
from mmrlhf.ops import fused_preference_loss, linear_logp

Part = tuple[str, Callable[[], Any], float]


def parts(case: Case) -> list[Part]:
    """(name, what runs, flops) of the parts of a step with a live reference, then of whole steps."""
    processor = build_processor()
    model = build_model(case.model, processor)
    records = build_records(1, image_tokens=case.image_tokens, response_tokens=case.response, k=case.k)
    side = OurStep(model, processor, records, OPTIONS["cached reference"])
    (group,) = side.groups
    batch, layout = side.batch(group)
    vision = encode(model, batch)
    model.train()
    weight = lm_head(model).weight
    hidden = side.hidden(model, batch, layout, vision).detach().requires_grad_()
    scores = torch.zeros(batch.num_responses)
    cached, live = work(case, "cached reference"), work(case, "live reference")

    def decode() -> None:
        model.zero_grad()
        out = side.hidden(model, batch, layout, vision)
        out.backward(torch.ones_like(out))

    def head() -> None:
        weight.grad = hidden.grad = None
        arguments = (hidden, weight, batch.targets, batch.cu_seqlens, batch.pairs)
        fused_preference_loss(*arguments, reference_scores=scores, beta=BETA).loss.backward()

    @torch.no_grad()
    def reference() -> None:
        rows = side.hidden(model, batch, layout, vision)
        linear_logp(rows, weight, batch.targets)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(side.trained, CLIP)
        side.optimiser.step()

    def whole() -> None:
        side.run(1)

    decode()
    head()  # every gradient is there for `update`
    return [
        ("encode and collate", lambda: side.batch(group), 0.0),
        ("tower", lambda: encode(model, batch), cached.tower),
        ("decoder", decode, cached.decoder + cached.attention),
        ("head", head, cached.head),
        ("clip and AdamW", update, 0.0),
        ("step, cached", whole, cached.total),
        ("reference", reference, _without_tower(live) - _without_tower(cached)),
    ]


def _without_tower(one: Work) -> float:
    return one.total - one.tower


def fastest(run: Callable[[], Any], unit: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """(seconds of `run`, of `unit`) of processor time: the fastest of the rounds, taken in turns."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, found in zip((run, unit), spent, strict=True):
            begin = time.process_time()
            function()
            found.append(time.process_time() - begin)
    return min(spent[0]), min(spent[1])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_parts", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", choices=SHAPES)
    parser.add_argument("--prefix", type=int, default=320, help="prompt tokens, image tokens included (about)")
    parser.add_argument("--response", type=int, default=100, help="tokens of a response (about)")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 5], help="responses a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args(words)
    shape = SHAPES[chosen.model]
    for k in chosen.k:
        case = Case(model=chosen.model, prefix=chosen.prefix, response=chosen.response, k=k, groups=1)
        rows = case.image_tokens + k * case.response
        left, right, out = (
            torch.randn(*s) for s in ((rows, shape.hidden), (shape.hidden, shape.mlp), (rows, shape.mlp))
        )
        flops = 10 * 2.0 * rows * shape.hidden * shape.mlp

        def unit(left=left, right=right, out=out) -> None:
            for _ in range(10):
                torch.mm(left, right, out=out)

        print(f"K = {k}, {case.name}\n{'':20}{'seconds':>10}{'floor':>10}{'times':>8}")
        for name, run, needed in parts(case):
            seconds, one = fastest(run, unit, chosen.rounds)
            floor = needed / flops * one
            times = f"{seconds / floor:8.2f}" if floor else ""
            print(f"{name:20}{seconds:10.3f}{floor:10.3f}{times}", flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
