"""The installed TRL's chunked log-probabilities, as its trainers call them, behind the signature of `linear_logp`."""

from __future__ import annotations

from torch import Tensor


def chunked_logp(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probabilities [N] in nats; none of the optional outputs (entropy ...) that TRL can make beside them."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    arguments = (hidden, weight, bias, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, logit_scale, ())
    return ChunkedLogProbFunction.apply(*arguments)[0]


def version() -> str:
    import trl

    return trl.__version__


def missing() -> str | None:
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: F401
    except ImportError as error:
        return f"no TRL with trl.kernels.chunked_logprob is installed ({error})"
    return None
