"""How much each side has to multiply in one step, counted from the shapes: a ceiling for its speed-up, and a floor.

Flops of matmuls alone: norms, softmaxes, copies, image processing and the optimiser are left out, and attention is
causal. A policy token costs its forward three times over (forward, gradient of the input, gradient of the weight),
twice with adapters, whose own matmuls are left out too; a reference token once. TRL's fused head multiplies the logits
again in its backward, and scores every row where the device has no Triton, the response rows where it has.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.step_case import LADDER, PROMPT_TEXT, Case
from benchmarks.step_models import MERGE, PATCH, SHAPES, Shape

WINDOW = 64  # patches of a tower's window: 4 x 4 tokens of 2 x 2 patches
# For durations told beforehand: flops a second that two server cores reached, and what starting a side takes. TRL's
# rate is lower because its head folds every logit of every row in a dozen passes over memory, which no flop counts.
ASSUMED_RATE, ASSUMED_RATE_TRL = 75e9, 47e9
START_SECONDS = 4.0


@dataclass(frozen=True)
class Work:
    """One step of one side: flops by part, and tokens through the decoder."""

    decoder: float
    attention: float
    head: float
    tower: float
    policy_tokens: int
    reference_tokens: int

    @property
    def total(self) -> float:
        return self.decoder + self.attention + self.head + self.tower

    @property
    def weighted_tokens(self) -> float:
        """Tokens through the decoder, a reference token counting a third of a policy token."""
        return self.policy_tokens + self.reference_tokens / 3


def work(case: Case, side: str, *, triton: bool = False) -> Work:
    """What `side` multiplies in a step of `case`; `triton`: whether TRL's head scores response rows only."""
    shape = SHAPES[case.model]
    prefix, response = case.image_tokens + PROMPT_TEXT, case.response
    rungs = [name for name, _ in LADDER]
    rung = rungs.index(side) if side in rungs else None
    is_trl = side == "trl"
    as_pairs = is_trl or (rung is not None and rung < rungs.index("answers once"))
    answers = 2 * case.pairs if as_pairs else case.k
    apart = is_trl or (rung is not None and rung <= rungs.index("separate rows"))
    cached = "cached" in side
    if apart:
        tokens = answers * (prefix + response)
        scores = answers * (prefix + response) ** 2 / 2
    else:
        tokens = prefix + answers * response
        scores = prefix**2 / 2 + answers * (response * prefix + response**2 / 2)
    all_rows = (is_trl and not triton) or rung == 0
    rows = tokens if all_rows else answers * response
    read = tokens if is_trl or rung == 0 else answers * response  # of the last layer's MLP
    weights = decoder_weights(shape) * tokens - 3 * shape.hidden * shape.mlp * (tokens - read)
    live = 0 if cached else 1
    passes = 2 if case.lora else 3
    head_passes = passes + (1 if is_trl or (rung is not None and rung < 2) else 0)
    once = 2 if side == "trl + mmrlhf" and not case.lora else 1
    pictures = answers * 2 if apart and side != "separate rows" else once
    return Work(
        decoder=case.groups * 2.0 * weights * (passes + live),
        attention=case.groups * 4.0 * shape.hidden * shape.layers * scores * ((2.5 if case.lora else 3.5) + live),
        head=case.groups * 2.0 * rows * shape.hidden * shape.vocab * (head_passes + live),
        tower=case.groups * tower_flops(shape, case.image_tokens) * pictures,
        policy_tokens=case.groups * tokens,
        reference_tokens=case.groups * tokens * live,
    )


def decoder_weights(shape: Shape) -> int:
    """Numbers in the decoder's linear layers."""
    kv = shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * kv + 3 * shape.hidden * shape.mlp
    return shape.layers * layer


def tower_flops(shape: Shape, image_tokens: int) -> float:
    """One picture through the tower and its merger."""
    patches, wide = image_tokens * MERGE**2, shape.tower_hidden
    linear = shape.tower_depth * (4 * wide**2 + 3 * wide * shape.tower_mlp) + 2 * 3 * PATCH**2 * wide
    full = len(shape.full_blocks)
    keys = full * patches + (shape.tower_depth - full) * min(WINDOW, patches)
    merged = MERGE**2 * wide
    return patches * (2.0 * linear + 4.0 * wide * keys) + image_tokens * 2.0 * (merged**2 + merged * shape.hidden)


def ceilings(case: Case, side: str, *, triton: bool = False) -> dict[str, float]:
    """{"tokens", "flops"}: how much less than TRL the side has to do.

    "tokens" counts the decoder alone, weighted as `Work.weighted_tokens`; "flops" all matmuls of a step.
    """
    trl, own = work(case, "trl", triton=triton), work(case, side, triton=triton)
    return {"tokens": trl.weighted_tokens / own.weighted_tokens, "flops": trl.total / own.total}


def seconds(case: Case) -> float:
    """About how long a case takes on two server cores, its sides one after another."""
    total = 0.0
    for side in case.sides:
        rate = ASSUMED_RATE_TRL if side == "trl" or side == LADDER[0][0] else ASSUMED_RATE
        steps = case.steps_of(side) + case.warmup_of(side)
        total += START_SECONDS + steps * work(case, side).total / rate
    return total
