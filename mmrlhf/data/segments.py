"""Which tokens of a pair were corrected, and what they weigh: DDPO's y_c and gamma (RLHF-V, Eq. 5).

A pair is two token lists. The blocks they share are found as Ratcliff and Obershelp do: the longest common run, then
the same to its left and to its right. Everything between the blocks was changed.

  "paper"   every token in an inserted, deleted or replaced run is corrected; no run is too short to count
  "muffin"  what RLHF-V's released trainer (thunlp/Muffin, `get_diff_ids`) computes, quirks included: shared runs of
            fewer than 3 tokens count as changed, a change with nothing on one side (pure insertion or deletion) is
            left out, and from 200 chosen tokens on, frequent tokens no longer start a shared run (difflib's autojunk)

Both compare response tokens only (the released code also compares prompt, image tokens and padding).
Not covered: moved text, which counts as deleted in one place and inserted in the other.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

STYLES = ("paper", "muffin")
MUFFIN_MIN_MATCH = 3
# difflib looks at every pair of equal tokens again for each block it finds. Answers of 2000 tokens have about 80k such
# pairs (50 ms); two answers that loop over the same words have millions, and took minutes.
_FEW_EQUAL = 200_000
_SMALL = 4096  # cells of a window that is left to difflib
_FIRST_LOOK = 1024  # runs looked at first, the longest ones; twice as many each time after
_MAX_CELLS = 2**25  # of a comparison held in memory, about 5k x 5k tokens

Block = tuple[int, int, int]  # start in a, start in b, tokens
Span = tuple[int, int, int, int]  # a[i1:i2] became b[j1:j2]


def segment_weights(
    rejected_ids: Sequence[int], chosen_ids: Sequence[int], *, gamma: float, style: str = "paper"
) -> tuple[list[float], list[float]]:
    """Token weights of both sides of a pair: gamma on corrected tokens, 1 elsewhere.

    Args:
        rejected_ids, chosen_ids: response tokens, end of turn included.
        gamma: weight of a corrected token, finite and positive (5 in the paper, 1.1 in the later released script).
        style: "paper" or "muffin", see the module's text.
    Returns (w_rejected, w_chosen), as long as the two inputs. Raises ValueError naming a bad argument.
    """
    if not (gamma > 0 and gamma != float("inf")):
        raise ValueError(f"gamma must be finite and positive, got {gamma!r}")
    weights = [1.0] * len(rejected_ids), [1.0] * len(chosen_ids)
    for i1, i2, j1, j2 in changed_spans(rejected_ids, chosen_ids, style=style):
        weights[0][i1:i2] = [float(gamma)] * (i2 - i1)
        weights[1][j1:j2] = [float(gamma)] * (j2 - j1)
    return weights


def changed_spans(a: Sequence[Hashable], b: Sequence[Hashable], *, style: str = "paper") -> list[Span]:
    """The runs (i1, i2, j1, j2) where a[i1:i2] became b[j1:j2], in order. Works on tokens, words or characters."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if style == "paper":
        return _gaps(matching_blocks(a, b), len(a), len(b))
    # Argument order matters: the popularity that autojunk looks at is that of the second, the chosen, list.
    found = difflib.SequenceMatcher(None, a, b).get_matching_blocks()
    kept = [(m.a, m.b, m.size) for m in found if m.size >= MUFFIN_MIN_MATCH]
    return [span for span in _gaps(kept, len(a), len(b)) if span[0] < span[1] and span[2] < span[3]]


def _gaps(blocks: Sequence[Block], len_a: int, len_b: int) -> list[Span]:
    """What lies between shared blocks, the ends included."""
    spans, i, j = [], 0, 0
    for start_a, start_b, size in (*blocks, (len_a, len_b, 0)):
        if i < start_a or j < start_b:
            spans.append((i, start_a, j, start_b))
        i, j = start_a + size, start_b + size
    return spans


def matching_blocks(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[Block]:
    """Shared blocks (start in a, start in b, length): those of `difflib.SequenceMatcher(None, a, b, autojunk=False)`.

    Ordinary answers go to difflib. Where many tokens are equal, the maximal common runs are found once, as arrays
    ordered by length, and each step of the same search looks only as far down as a longer run could still be
    (2000 tokens of one repeated word against two alternating ones: 3 s, where difflib takes minutes).
    """
    in_a, in_b = Counter(a), Counter(b)
    equal_pairs = sum(count * in_b[token] for token, count in in_a.items())
    if equal_pairs <= _FEW_EQUAL or len(a) * len(b) > _MAX_CELLS:
        return _difflib_blocks(a, b)
    return _run_blocks(a, b)


def _run_blocks(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[Block]:
    found: list[Block] = []
    runs, covered = _diagonal_runs(*_as_ids(a, b)), len(a) * len(b)
    stack = [(0, len(a), 0, len(b), runs, covered)]
    while stack:
        a_lo, a_hi, b_lo, b_hi, runs, covered = stack.pop()
        cells = (a_hi - a_lo) * (b_hi - b_lo)
        if cells <= _SMALL:
            inside = _difflib_blocks(a[a_lo:a_hi], b[b_lo:b_hi])
            found.extend((a_lo + i, b_lo + j, size) for i, j, size in inside)
            continue
        if 2 * cells < covered:  # drop the runs outside only when the window has shrunk by half
            touches = (runs[0] < a_hi) & (runs[0] + runs[2] > a_lo) & (runs[1] < b_hi) & (runs[1] + runs[2] > b_lo)
            runs, covered = runs[:, touches], cells
        best = _longest_run(runs, a_lo, a_hi, b_lo, b_hi)
        if best is None:
            continue
        i, j, size = best
        found.append(best)
        if a_lo < i and b_lo < j:
            stack.append((a_lo, i, b_lo, j, runs, covered))
        if i + size < a_hi and j + size < b_hi:
            stack.append((i + size, a_hi, j + size, b_hi, runs, covered))
    return _join_neighbours(sorted(found))


def _difflib_blocks(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[Block]:
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    return [(m.a, m.b, m.size) for m in matcher.get_matching_blocks() if m.size]


def _as_ids(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    number: dict[Hashable, int] = {}
    ids = [np.array([number.setdefault(x, len(number)) for x in side], dtype=np.int32) for side in (a, b)]
    return ids[0], ids[1]


def _diagonal_runs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All maximal runs a[i:i+n] == b[j:j+n] as rows i, j, n of a [3, M] array, longest first, then by i, then by j."""
    n = len(a)
    padded = np.concatenate([np.full(n, -1, np.int32), b, np.full(n, -1, np.int32)])
    diagonals = np.lib.stride_tricks.sliding_window_view(padded, n)  # [n + B + 1, n]: row d, column i is b[i + d - n]
    equal = np.zeros((len(diagonals), n + 1), dtype=np.int8)  # one column of zeros ends every diagonal
    np.equal(diagonals, a, out=equal[:, :n], casting="unsafe")
    step = np.diff(equal.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(step == 1), np.flatnonzero(step == -1)
    diagonal, i = np.divmod(starts, n + 1)
    runs = np.stack([i, i + diagonal - n, ends - starts])  # [3, M]
    return runs[:, np.lexsort((runs[1], runs[0], -runs[2]))]


def _longest_run(runs: np.ndarray, a_lo: int, a_hi: int, b_lo: int, b_hi: int) -> Block | None:
    """The longest run clipped to the window; of equals the earliest in a, then the earliest in b: difflib's order."""
    best: Block | None = None
    whole = False  # some run as long as `best` lies in the window uncut
    step, at, total = _FIRST_LOOK, 0, runs.shape[1]
    while at < total:
        if best is not None and (runs[2, at] < best[2] or (whole and runs[2, at] == best[2])):
            break  # those that follow are shorter, or equal and later
        i, j, size = runs[:, at : at + step]
        at, step = at + step, step * 2
        cut = np.maximum(np.maximum(a_lo - i, b_lo - j), 0)
        clipped = np.minimum(np.minimum(size, a_hi - i), b_hi - j) - cut
        longest = int(clipped.max())
        if longest < 1 or (best is not None and longest < best[2]):
            continue
        ties = np.flatnonzero(clipped == longest)
        at_i, at_j = (i + cut)[ties], (j + cut)[ties]
        first = np.lexsort((at_j, at_i))[0]
        candidate = (int(at_i[first]), int(at_j[first]), longest)
        uncut = bool((size[ties] == longest).any())
        if best is None or longest > best[2]:
            best, whole = candidate, uncut
        else:
            best, whole = min(best, candidate), whole or uncut
    return best


def _join_neighbours(blocks: list[Block]) -> list[Block]:
    """Blocks that touch on both sides are one block."""
    joined: list[Block] = []
    for i, j, size in blocks:
        if joined and joined[-1][0] + joined[-1][2] == i and joined[-1][1] + joined[-1][2] == j:
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + size)
        else:
            joined.append((i, j, size))
    return joined


def weights_from_characters(
    offsets: Sequence[tuple[int, int]], segments: Sequence[tuple[int, int]], *, gamma: float
) -> list[float]:
    """Token weights from corrected character spans: gamma for every token that shares a character with one.

    Args:
        offsets: the [start, end) characters of each token, as a fast tokenizer gives them, in the same coordinates as
        segments: corrected [start, end) character spans.
    """
    weights = []
    for start, end in offsets:
        corrected = any(start < high and low < end for low, high in segments)
        weights.append(float(gamma) if corrected else 1.0)
    return weights
