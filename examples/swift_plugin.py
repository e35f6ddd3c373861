"""swift rlhf --rlhf_type dpo --external_plugins examples/swift_plugin.py ...     RLHF-V's DDPO inside ms-swift.

The other options are ms-swift's own; `--beta 0.5` is the paper's. The names here are those of `docs/drop-in.md`.
"""

from mmrlhf.integrations.swift import register

register(segments="paper", gamma=5.0, reduction="mean")
