"""What the whole-step benchmark runs: one case, the sides that run it, and named sweeps of cases.

A sweep is a list, so that adding a case is adding a row. The flops of a case (`step_flops`) say beforehand how long it
takes; `python -m benchmarks.train_step --sweep cpu --list` prints that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from benchmarks.step_models import SHAPES

PROMPT_TEXT = 30  # tokens of a prompt besides its picture: template and question, about
DEFAULT_SIDES = ("trl", "live reference", "cached reference", "separate rows")
WITH_DROP_IN = ("trl", "live reference", "cached reference", "trl + mmrlhf", "trl + mmrlhf, cached")
PAIR = ("trl", "live reference", "cached reference")
# Our own step from nearly TRL's way to the whole, one thing more in each: (side, what its step up is called).
LADDER = (
    ("all rows, apart", ""),
    ("response rows", "rows scored"),
    ("fused head", "kernel"),
    ("answers once", "pairs"),
    ("separate rows", "vision"),
    ("live reference", "prefix"),
    ("cached reference", "reference"),
)
WITH_CAUSES = ("trl", *(side for side, _ in LADDER), "trl + mmrlhf", "trl + mmrlhf, cached")


@dataclass(frozen=True)
class Case:
    """One measurement. The step is all pairs of `groups` prompts; a micro-batch is one prompt (TRL: one pair)."""

    model: str = "small"
    dtype: str = "float32"
    lora: bool = False  # adapters on the decoder's linear layers instead of training it whole
    prefix: int = 320  # prompt tokens, image tokens included (about)
    response: int = 100  # tokens of a response (about)
    k: int = 2  # responses a prompt
    groups: int = 2  # prompts an optimiser step
    steps: int = 3  # timed steps, after one that warms up
    peer_steps: int | None = None  # the same for the slow sides: TRL, and ours with rows apart; None: `steps`
    cold_peers: bool = False  # the slow sides' first step is timed: where a step is long, its start is lost in it
    sides: tuple[str, ...] = DEFAULT_SIDES

    def __post_init__(self) -> None:
        if self.model not in SHAPES:
            raise ValueError(f"model must be one of {', '.join(SHAPES)}, got {self.model!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        for name, least in (("prefix", PROMPT_TEXT + 1), ("response", 4), ("k", 2), ("groups", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.peer_steps is not None and self.peer_steps < 1:
            raise ValueError(f"peer_steps must be at least 1, got {self.peer_steps}")
        # With two answers a prompt there is one pair: "answers once" would be the side before it again.
        kept = [side for side in self.sides if self.k > 2 or side != "answers once"]
        object.__setattr__(self, "sides", tuple(kept))

    @property
    def name(self) -> str:
        how = "lora" if self.lora else "full"
        rest = "" if self.dtype == "float32" else f"/{self.dtype}"
        return f"{self.model}/{how}/prefix={self.prefix}/response={self.response}/k={self.k}/groups={self.groups}{rest}"

    @property
    def image_tokens(self) -> int:
        """Of the square picture of a prompt."""
        return max(1, round((self.prefix - PROMPT_TEXT) ** 0.5)) ** 2

    @property
    def pairs(self) -> int:
        """Of a prompt."""
        return self.k * (self.k - 1) // 2

    def steps_of(self, side: str) -> int:
        """Timed steps."""
        return self.peer_steps if self.peer_steps is not None and is_slow(side) else self.steps

    def warmup_of(self, side: str) -> int:
        """Steps before those that are timed."""
        return 0 if self.cold_peers and is_slow(side) else 1

    def as_dict(self) -> dict:
        return dataclasses.asdict(self) | {"sides": list(self.sides)}


def is_slow(side: str) -> bool:
    """Whether the side runs every row by itself."""
    return side == "trl" or side in [name for name, _ in LADDER[:5]]


_ONE = Case(groups=1, steps=2, sides=PAIR)
_GPU = Case(model="qwen2_5_vl_7b", dtype="bfloat16", lora=True, prefix=1350, response=200, groups=1, sides=PAIR)
SWEEPS: dict[str, tuple[Case, ...]] = {
    # Two cores, about eleven minutes. Prompts above 1300 tokens are measured on `mini`, which also runs one of the
    # shorter ones, so that the two curves can be compared.
    "cpu": (
        Case(steps=3, peer_steps=2, sides=WITH_CAUSES),
        Case(k=5, groups=1, steps=2, peer_steps=1, cold_peers=True, sides=WITH_CAUSES),
        replace(_ONE, k=3, peer_steps=1),
        replace(_ONE, prefix=150, response=300),
        replace(_ONE, lora=True),
        replace(_ONE, prefix=150),
        replace(_ONE, prefix=640, peer_steps=1),
        replace(_ONE, prefix=1300, peer_steps=1),
        replace(_ONE, prefix=1300, peer_steps=1, model="mini"),
        replace(_ONE, prefix=2600, peer_steps=1, cold_peers=True, model="mini"),
        replace(_ONE, prefix=4000, peer_steps=1, cold_peers=True, model="mini"),
    ),
    # Whole lists, for a machine that has hours: every prefix with every K, trained whole and with adapters.
    "full": tuple(
        Case(prefix=prefix, k=k, groups=1, steps=2, peer_steps=1, cold_peers=k == 5, lora=lora, sides=WITH_DROP_IN)
        for lora in (False, True)
        for k in (2, 3, 5)
        for prefix in (150, 320, 640, 1300, 2600, 4000)
    ),
    "gpu": tuple(replace(_GPU, prefix=prefix, k=k) for prefix in (350, 1350, 3700) for k in (2, 3, 5)),
    # Seconds: to see that all of it runs.
    "tiny": (
        Case(model="tiny", prefix=60, response=12, steps=1, sides=WITH_CAUSES),
        Case(model="tiny", prefix=60, response=12, k=3, groups=1, steps=1, sides=PAIR),
        Case(model="tiny", prefix=130, response=12, steps=1, sides=PAIR),
        Case(model="tiny", prefix=60, response=12, steps=1, lora=True, sides=PAIR),
    ),
}
