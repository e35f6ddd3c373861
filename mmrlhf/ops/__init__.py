"""The ops: log-probabilities, scores, betas and preference losses, and all of them in one pass over the vocabulary.

`reference` is their definition in plain PyTorch; `backend` says which implementation runs an op, and why.
"""

from mmrlhf.ops import backend, reference
from mmrlhf.ops.adapter import LoraAdapter
from mmrlhf.ops.dynamic_beta import dynamic_beta, implicit_beta
from mmrlhf.ops.fused import fused_preference_loss
from mmrlhf.ops.linear_logp import linear_logp
from mmrlhf.ops.loss_kinds import LOSS_KINDS
from mmrlhf.ops.preference import preference_loss
from mmrlhf.ops.reference import FusedPreferenceOutput, PreferenceOutput, TokenStatistics
from mmrlhf.ops.sequence_score import sequence_score
from mmrlhf.ops.sharded import VocabShard
from mmrlhf.ops.token_statistics import token_statistics

__all__ = [
    "LOSS_KINDS",
    "FusedPreferenceOutput",
    "LoraAdapter",
    "PreferenceOutput",
    "TokenStatistics",
    "VocabShard",
    "backend",
    "dynamic_beta",
    "fused_preference_loss",
    "implicit_beta",
    "linear_logp",
    "preference_loss",
    "reference",
    "sequence_score",
    "token_statistics",
]
