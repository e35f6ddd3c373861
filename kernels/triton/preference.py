"""Device code from token log-probabilities to the loss and back: one program, one launch, every number in one order.

    logp [N], weights -> scores [R] -> margins, beta [P] -> losses [P] -> d loss / d score [R] -> d loss / d logp [N]

The vectors are short (R responses, P pairs), so one program walks over them three times with a barrier between:
responses, pairs, responses again. No atomics: a response collects its gradient by looking through all pairs, R * P
comparisons, which is nothing below a few thousand responses. Arithmetic is float64; it is free at these lengths and
makes each term as exact as `ops.reference` in float64, so the loss kinds need no float32 tricks. The terms are those of
`mmrlhf.ops.loss_kinds`, each with its derivative; a kind there and not here is refused by the launcher.

Not covered: a callable beta (it needs the scores first), and gradients to anything but the log-probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmrlhf.kernels.triton.mathlib import expm1, logsigmoid, sigmoid

KINDS = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "simpo",
    "orpo",
)


@triton.jit
def _bump(x):
    """Derivative of sigmoid: sigmoid(x) sigmoid(-x)."""
    return sigmoid(x) * sigmoid(-x)


@triton.jit
def _log_odds(logp):
    """log(p / (1 - p)) and its derivative, held at logp = -1e-7: the odds of 1 are infinite."""
    held = tl.where(logp > -1e-7, -1e-7, logp)
    other = -expm1(held)
    return held - tl.log(other), tl.where(logp > -1e-7, 0.0, 1.0 / other)


@triton.jit
def _margin_term(x, eps, tau, KIND: tl.constexpr):
    """A loss of x = beta * (b - w) alone, and its derivative by x."""
    if KIND == "hinge":
        loss, dx = tl.where(x >= 1.0, 0.0, 1.0 - x), tl.where(x >= 1.0, 0.0, -1.0)
    elif KIND == "robust":
        loss = (-(1.0 - eps) * logsigmoid(x) + eps * logsigmoid(-x)) / (1.0 - 2.0 * eps)
        dx = (-(1.0 - eps) * sigmoid(-x) - eps * sigmoid(x)) / (1.0 - 2.0 * eps)
    elif KIND == "exo_pair":
        keep, flip = tl.log(1.0 - eps), tl.log(eps)
        loss = sigmoid(x) * (logsigmoid(x) - keep) + sigmoid(-x) * (logsigmoid(-x) - flip)
        dx = _bump(x) * (x - keep + flip)
    elif KIND == "discopop":
        mix = x / tau
        # One exponential: apart, a margin of -1000 gives 0 * inf.
        rest = tl.exp(logsigmoid(mix) - x)
        loss = -logsigmoid(x) * sigmoid(-mix) + rest
        dx = -sigmoid(-x) * sigmoid(-mix) + logsigmoid(x) * _bump(mix) / tau + rest * (sigmoid(-mix) / tau - 1.0)
    else:
        tl.static_assert(KIND == "sigmoid")
        loss = -(1.0 - eps) * logsigmoid(x) - eps * logsigmoid(-x)
        dx = -(1.0 - eps) * sigmoid(-x) + eps * sigmoid(x)
    return loss, dx


@triton.jit
def _term(b, w, beta, eps, gamma, tau, delta, KIND: tl.constexpr):
    """Loss of pairs with log-ratios b and w, and its derivatives by b and by w."""
    if KIND == "ipo":
        off = b - w - 0.5 / beta
        loss, db, dw = off * off, 2.0 * off, -2.0 * off
    elif KIND == "nca_pair":
        loss = -logsigmoid(beta * b) - 0.5 * logsigmoid(-beta * b) - 0.5 * logsigmoid(-beta * w)
        db, dw = beta * (-sigmoid(-beta * b) + 0.5 * sigmoid(beta * b)), 0.5 * beta * sigmoid(beta * w)
    elif KIND == "bco_pair":
        loss = -logsigmoid(beta * b - delta) - logsigmoid(delta - beta * w)
        db, dw = -beta * sigmoid(delta - beta * b), beta * sigmoid(beta * w - delta)
    elif KIND == "sppo_hard":
        up, down = b - 0.5 / beta, w + 0.5 / beta
        loss, db, dw = up * up + down * down, 2.0 * up, 2.0 * down
    elif KIND == "apo_zero":
        loss = sigmoid(-beta * b) + sigmoid(beta * w)
        db, dw = -beta * _bump(beta * b), beta * _bump(beta * w)
    elif KIND == "apo_down":
        loss = sigmoid(beta * b) + sigmoid(-beta * (b - w))
        slope = beta * _bump(beta * (b - w))
        db, dw = beta * _bump(beta * b) - slope, slope
    elif KIND == "orpo":
        odds_b, slope_b = _log_odds(b)
        odds_w, slope_w = _log_odds(w)
        loss = -beta * logsigmoid(odds_b - odds_w)
        outer = -beta * sigmoid(odds_w - odds_b)
        db, dw = outer * slope_b, -outer * slope_w
    elif KIND == "simpo":
        loss, dx = _margin_term(beta * (b - gamma - w), eps, tau, "sigmoid")
        db, dw = beta * dx, -beta * dx
    else:
        loss, dx = _margin_term(beta * (b - w), eps, tau, KIND)
        db, dw = beta * dx, -beta * dx
    return loss, db, dw


@triton.jit
def _scores(
    logp,  # [N]
    token_weight,  # [N] or None
    cu_seqlens,  # [R + 1]
    scratch,  # float64, [3 * R] of it out
    scores,  # [R] out
    responses,  # R
    MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """scores and, for the later passes, scratch[0:3, R] = score, weight of the response (1 for a sum), sum of logp."""
    for start in range(0, responses, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = r < responses
        first = tl.load(cu_seqlens + r, mask=mask, other=0).to(tl.int64)
        length = tl.load(cu_seqlens + r + 1, mask=mask, other=0).to(tl.int64) - first
        length = tl.where(mask, length, 0)
        weighted = tl.zeros((BLOCK_R, BLOCK_T), tl.float64)
        weights = tl.zeros((BLOCK_R, BLOCK_T), tl.float64)
        plain = tl.zeros((BLOCK_R, BLOCK_T), tl.float64)
        for t0 in range(0, tl.max(length, axis=0), BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            inside = t[None, :] < length[:, None]
            at = first[:, None] + t[None, :]
            value = tl.load(logp + at, mask=inside, other=0.0).to(tl.float64)
            plain += value
            if token_weight is not None:
                weight = tl.load(token_weight + at, mask=inside, other=0.0).to(tl.float64)
                # A token of weight 0 adds nothing, even if its log-probability is not finite.
                weighted += tl.where(weight == 0, 0.0, weight * value)
                weights += weight
            else:
                weighted += value
                weights += tl.where(inside, 1.0, 0.0)
        total = tl.sum(weighted, axis=1)
        divisor = tl.full((BLOCK_R,), 1.0, tl.float64)
        if MEAN:
            divisor = tl.sum(weights, axis=1)
            divisor = tl.where(divisor == 0, 1.0, divisor)
        total = total / divisor
        tl.store(scores + r, total.to(tl.float32), mask=mask)
        tl.store(scratch + r, total, mask=mask)
        tl.store(scratch + responses + r, divisor, mask=mask)
        tl.store(scratch + 2 * responses + r, tl.sum(plain, axis=1), mask=mask)


@triton.jit
def _above(score, reference):
    """score (float64) - reference (float32), 0 where they are one in float32: a policy that is its reference has
    rewards of exactly 0, and no other loses to a rounding, which discopop's 1 / tau would make 20 times larger."""
    return tl.where(score.to(tl.float32) == reference, 0.0, score - reference.to(tl.float64))


@triton.jit
def _pair(p, mask, pairs, scratch, reference, beta, beta_stride, margin, beta_value, w, k):
    """better, worse, their log-ratios and beta of the pairs p, each [BLOCK_P]; arguments as `preference_kernel`'s."""
    better = tl.load(pairs + 2 * p, mask=mask, other=0).to(tl.int32)
    worse = tl.load(pairs + 2 * p + 1, mask=mask, other=0).to(tl.int32)
    b = tl.load(scratch + better, mask=mask, other=0.0)
    v = tl.load(scratch + worse, mask=mask, other=0.0)
    if reference is not None:
        b = _above(b, tl.load(reference + better, mask=mask, other=0.0))
        v = _above(v, tl.load(reference + worse, mask=mask, other=0.0))
    if beta is not None:
        scale = tl.load(beta + p * beta_stride, mask=mask, other=1.0).to(tl.float64)
    else:
        scale = tl.zeros_like(b) + beta_value
    if margin is not None:
        # MM-RLHF section 4; a NaN margin is a pair without one.
        gap = tl.load(margin + p, mask=mask, other=0.0).to(tl.float64)
        gap = tl.where(gap > 0, gap, 0.0)
        scale = scale * (1.0 - w * expm1(-k * gap))
    return better, worse, b, v, scale


@triton.jit
def _mean_reward(count, pairs, scratch, reference, beta, beta_stride, margin, beta_value, w, k, BLOCK_P: tl.constexpr):
    """bco_pair's delta: the mean reward over all pairs."""
    total = tl.zeros((BLOCK_P,), tl.float64)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = p < count
        _, _, b, v, scale = _pair(p, mask, pairs, scratch, reference, beta, beta_stride, margin, beta_value, w, k)
        total += tl.where(mask, 0.5 * scale * (b + v), 0.0)
    return tl.sum(total, axis=0) / tl.maximum(count, 1)


@triton.jit
def _response(
    r,  # [BLOCK_R]
    count,  # P
    pairs,  # [P, 2]
    grad_better,  # [P] float64
    grad_worse,  # [P] float64
    betas,  # [P]
    PER_PAIR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What a response collects from its pairs: gradient, times it is the better one, pairs, and their betas summed."""
    grad = tl.zeros((BLOCK_R,), tl.float64)
    times = tl.zeros((BLOCK_R,), tl.float64)
    member = tl.zeros((BLOCK_R,), tl.float64)
    beta_sum = tl.zeros((BLOCK_R,), tl.float64)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        some = p < count
        is_better = r[:, None] == tl.load(pairs + 2 * p, mask=some, other=-1).to(tl.int32)[None, :]
        is_worse = r[:, None] == tl.load(pairs + 2 * p + 1, mask=some, other=-1).to(tl.int32)[None, :]
        up = tl.load(grad_better + p, mask=some, other=0.0)[None, :]
        down = tl.load(grad_worse + p, mask=some, other=0.0)[None, :]
        grad += tl.sum(tl.where(is_better, up, 0.0) + tl.where(is_worse, down, 0.0), axis=1)
        times += tl.sum(is_better.to(tl.float64), axis=1)
        if PER_PAIR:
            each = tl.load(betas + p, mask=some, other=0.0).to(tl.float64)[None, :]
            both = is_better | is_worse
            member += tl.sum(both.to(tl.float64), axis=1)
            beta_sum += tl.sum(tl.where(both, each, 0.0), axis=1)
    return grad, times, member, beta_sum


@triton.jit
def _token_derivatives(
    r,  # [BLOCK_R]
    responses,  # R
    per_weight,  # [BLOCK_R], d loss / d (weight * logp)
    sft,  # [BLOCK_R], d loss / d logp through the sft term
    token_weight,  # [N] or None
    cu_seqlens,  # [R + 1]
    coef,  # [N] out: d loss / d logp
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    mask = r < responses
    first = tl.load(cu_seqlens + r, mask=mask, other=0).to(tl.int64)
    length = tl.where(mask, tl.load(cu_seqlens + r + 1, mask=mask, other=0).to(tl.int64) - first, 0)
    for start in range(0, tl.max(length, axis=0), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t[None, :] < length[:, None]
        at = first[:, None] + t[None, :]
        value = tl.zeros((BLOCK_R, BLOCK_T), tl.float64) + per_weight[:, None]
        if token_weight is not None:
            weight = tl.load(token_weight + at, mask=inside, other=0.0).to(tl.float64)
            value = tl.where(weight == 0, 0.0, weight * value)
        tl.store(coef + at, (value + sft[:, None]).to(tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=("responses", "count", "beta_stride"),
    do_not_specialize_on_alignment=(
        "logp",
        "token_weight",
        "cu_seqlens",
        "pairs",
        "reference",
        "beta",
        "margin",
        "pair_weight",
        "num_pairs",
        "num_sft_tokens",
    ),
)
def preference_kernel(
    logp,  # [N]
    token_weight,  # [N] or None
    cu_seqlens,  # [R + 1]
    pairs,  # [P, 2]
    reference,  # [R] or None
    beta,  # [P], or [] with beta_stride 0, or None: beta_value
    margin,  # [P] or None: with it, beta is scaled by w and k
    pair_weight,  # [P] or None
    num_pairs,  # [1] or None: num_pairs_value
    num_sft_tokens,  # [1] or None: num_sft_value, or 0 for the better responses' tokens, counted once a pair
    scores,  # [R] out
    rewards,  # [R] out
    d_score,  # [R] out: d loss / d score, without the sft term
    losses,  # [P] out
    margins,  # [P] out
    betas,  # [P] out
    coef,  # [N] out: d loss / d logp
    total_loss,  # [] out
    accuracy,  # [] out
    sft_loss,  # [] out
    scratch,  # [3 R + 2 P] float64
    responses,
    count,
    beta_stride,
    beta_value,
    w,
    k,
    label_smoothing,
    gamma_beta_ratio,
    discopop_tau,
    num_pairs_value,
    num_sft_value,
    sft_weight,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    PER_PAIR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """See `mmrlhf.ops.fused_preference_loss`, whose part after the log-probabilities this is. Grid (1,)."""
    eps, gamma = tl.full((), label_smoothing, tl.float64), tl.full((), gamma_beta_ratio, tl.float64)
    tau, beta_value = tl.full((), discopop_tau, tl.float64), tl.full((), beta_value, tl.float64)
    w, k = tl.full((), w, tl.float64), tl.full((), k, tl.float64)
    sft_weight = tl.full((), sft_weight, tl.float64)
    total_pairs, total_tokens = tl.full((), num_pairs_value, tl.float64), tl.full((), num_sft_value, tl.float64)
    if num_pairs is not None:
        total_pairs = tl.load(num_pairs).to(tl.float64)
    if num_sft_tokens is not None:
        total_tokens = tl.load(num_sft_tokens).to(tl.float64)
    grad_better, grad_worse = scratch + 3 * responses, scratch + 3 * responses + count

    _scores(logp, token_weight, cu_seqlens, scratch, scores, responses, MEAN, BLOCK_R, BLOCK_T)
    tl.debug_barrier()

    delta = tl.zeros((), tl.float64)
    if KIND == "bco_pair":
        delta = _mean_reward(count, pairs, scratch, reference, beta, beta_stride, margin, beta_value, w, k, BLOCK_P)
    loss_sum = tl.zeros((BLOCK_P,), tl.float64)
    right = tl.zeros((BLOCK_P,), tl.float64)
    better_tokens = tl.zeros((BLOCK_P,), tl.float64)
    better_logp = tl.zeros((BLOCK_P,), tl.float64)
    beta_sum = tl.zeros((BLOCK_P,), tl.float64)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = p < count
        better, _, b, v, scale = _pair(p, mask, pairs, scratch, reference, beta, beta_stride, margin, beta_value, w, k)
        loss, db, dw = _term(b, v, scale, eps, gamma, tau, delta, KIND)
        share = tl.zeros_like(b) + 1.0 / total_pairs
        if pair_weight is not None:
            share *= tl.load(pair_weight + p, mask=mask, other=0.0).to(tl.float64)
        gap = scale * (b - v)
        length = tl.load(cu_seqlens + better + 1, mask=mask, other=0) - tl.load(cu_seqlens + better, mask=mask, other=0)
        loss_sum += tl.where(mask, loss * share, 0.0)
        right += tl.where(mask & (gap > 0), 1.0, 0.0)
        beta_sum += tl.where(mask, scale, 0.0)
        better_tokens += length.to(tl.float64)
        better_logp += tl.load(scratch + 2 * responses + better, mask=mask, other=0.0)
        tl.store(losses + p, loss.to(tl.float32), mask=mask)
        tl.store(margins + p, gap.to(tl.float32), mask=mask)
        tl.store(betas + p, scale.to(tl.float32), mask=mask)
        tl.store(grad_better + p, db * share, mask=mask)
        tl.store(grad_worse + p, dw * share, mask=mask)
    total_tokens = tl.where(total_tokens > 0, total_tokens, tl.maximum(tl.sum(better_tokens, axis=0), 1.0))
    sft_term = -tl.sum(better_logp, axis=0) / total_tokens
    loss = tl.sum(loss_sum, axis=0)
    # An unused sft term must not turn the loss non-finite.
    loss = tl.where(sft_weight == 0, loss, loss + sft_weight * sft_term)
    tl.store(total_loss, loss.to(tl.float32))
    tl.store(accuracy, (tl.sum(right, axis=0) / tl.maximum(count, 1)).to(tl.float32))
    tl.store(sft_loss, sft_term.to(tl.float32))
    mean_beta = tl.sum(beta_sum, axis=0) / tl.maximum(count, 1)
    tl.debug_barrier()

    for start in range(0, responses, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = r < responses
        grad, times, member, own_beta = _response(
            r, count, pairs, grad_better, grad_worse, betas, PER_PAIR, BLOCK_R, BLOCK_P
        )
        if PER_PAIR:
            own_beta = tl.where(member > 0, own_beta / tl.maximum(member, 1.0), mean_beta)
        else:
            own_beta += beta_value
            if beta is not None:
                own_beta += tl.load(beta).to(tl.float64)
        score = tl.load(scratch + r, mask=mask, other=0.0)
        if reference is not None:
            score = _above(score, tl.load(reference + r, mask=mask, other=0.0))
        tl.store(rewards + r, (own_beta * score).to(tl.float32), mask=mask)
        tl.store(d_score + r, grad.to(tl.float32), mask=mask)
        per_weight = grad / tl.load(scratch + responses + r, mask=mask, other=1.0)
        sft = -sft_weight * times / total_tokens
        _token_derivatives(r, responses, per_weight, sft, token_weight, cu_seqlens, coef, BLOCK_R, BLOCK_T)
