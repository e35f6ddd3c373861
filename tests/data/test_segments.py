"""segment_weights: "paper" against difflib itself, "muffin" against a slow oracle written from its description."""

from __future__ import annotations

import difflib
import random
from collections import Counter

import pytest

from mmrlhf.data import segments
from mmrlhf.data.segments import changed_spans, matching_blocks, segment_weights, weights_from_characters


def corrected(weights):
    return [i for i, w in enumerate(weights) if w != 1.0]


def ids(rejected, chosen, style):
    return tuple(corrected(w) for w in segment_weights(rejected, chosen, gamma=5.0, style=style))


def slow_blocks(a, b, autojunk):
    """Matching blocks by definition: the longest run (earliest in a, then in b), then left and right of it."""
    popular = set()
    if autojunk and len(b) >= 200:
        popular = {t for t, n in Counter(b).items() if n > len(b) // 100 + 1}

    def longest(a_lo, a_hi, b_lo, b_hi):
        best = (a_lo, b_lo, 0)
        for i in range(a_lo, a_hi):
            for j in range(b_lo, b_hi):
                size = 0
                while i + size < a_hi and j + size < b_hi and a[i + size] == b[j + size] not in popular:
                    size += 1
                if size > best[2]:
                    best = (i, j, size)
        i, j, size = best
        # a run that was found without popular tokens grows over them on both sides
        while i > a_lo and j > b_lo and a[i - 1] == b[j - 1]:
            i, j, size = i - 1, j - 1, size + 1
        while i + size < a_hi and j + size < b_hi and a[i + size] == b[j + size]:
            size += 1
        return i, j, size

    def search(a_lo, a_hi, b_lo, b_hi):
        i, j, size = longest(a_lo, a_hi, b_lo, b_hi)
        if not size:
            return []
        return [*search(a_lo, i, b_lo, j), (i, j, size), *search(i + size, a_hi, j + size, b_hi)]

    joined = []
    for i, j, size in search(0, len(a), 0, len(b)):
        if joined and joined[-1][0] + joined[-1][2] == i and joined[-1][1] + joined[-1][2] == j:
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + size)
        else:
            joined.append((i, j, size))
    return joined


def slow_muffin(rejected, chosen):
    """Blocks under 3 dropped, gaps to the sentinel, and only the gaps with something on both sides."""
    blocks = [m for m in slow_blocks(rejected, chosen, autojunk=True) if m[2] >= 3]
    out = (set(), set())
    i = j = 0
    for start_a, start_b, size in [*blocks, (len(rejected), len(chosen), 0)]:
        if start_a > i and start_b > j:
            out[0].update(range(i, start_a))
            out[1].update(range(j, start_b))
        i, j = start_a + size, start_b + size
    return sorted(out[0]), sorted(out[1])


def edited(rng, length, words):
    """A token list and an edited copy: insertions, deletions, replacements, some of them close together."""
    source = [rng.randrange(words) for _ in range(length)]
    result, at = [], 0
    while at < length:
        step = rng.choice((1, 2, 2, 3, 5, 9))
        result += source[at : at + step]
        at += step
        kind = rng.choice(("keep", "insert", "delete", "replace"))
        if kind in ("insert", "replace"):
            result += [rng.randrange(words, 2 * words) for _ in range(rng.choice((1, 1, 2, 4)))]
        if kind in ("delete", "replace"):
            at += rng.choice((1, 1, 2, 4))
    return source, result


def test_paper_marks_every_inserted_deleted_and_replaced_token():
    assert ids([1, 2, 3, 4], [1, 2, 3, 4], "paper") == ([], [])
    assert ids([1, 2, 9, 4], [1, 2, 3, 4], "paper") == ([2], [2])
    assert ids([1, 2, 9, 9, 3], [1, 2, 3], "paper") == ([2, 3], [])  # pure deletion
    assert ids([1, 2, 3], [1, 2, 9, 3], "paper") == ([], [2])  # pure insertion
    assert ids([1, 8, 5, 6, 8, 2], [1, 9, 5, 6, 9, 2], "paper") == ([1, 4], [1, 4])  # what lies between stays at 1
    assert ids([], [1, 2], "paper") == ([], [0, 1])
    assert ids([], [], "paper") == ([], [])


def difflib_blocks(a, b):
    return [tuple(m) for m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks() if m.size]


@pytest.mark.parametrize("words", [1, 2, 5, 40])
def test_paper_run_search_equals_difflib(words, monkeypatch):
    monkeypatch.setattr(segments, "_FEW_EQUAL", -1)
    monkeypatch.setattr(segments, "_SMALL", 8)
    monkeypatch.setattr(segments, "_FIRST_LOOK", 1)  # every tie between cut and whole runs falls across two looks
    rng = random.Random(words)
    for _ in range(300):
        a, b = edited(rng, rng.randrange(1, 45), words) if rng.random() < 0.5 else ([], [])
        a = a or [rng.randrange(words) for _ in range(rng.randrange(1, 45))]
        b = b or [rng.randrange(words) for _ in range(rng.randrange(1, 45))]
        assert matching_blocks(a, b) == difflib_blocks(a, b)


def test_paper_run_search_in_windows_larger_than_its_first_step():
    rng = random.Random(7)
    a, b = ([rng.randrange(4) for _ in range(600)] for _ in range(2))
    assert len(a) * len(b) / 4 > 2 * 1024  # many thousand runs: several blocks of the ordered list are looked at
    assert segments._run_blocks(a, b) == difflib_blocks(a, b)


def test_looping_answers_take_the_run_search():
    # two answers that repeat themselves: 2.25 million equal pairs, where difflib alone would take minutes
    a, b = [1, 2, 3] * 500, [1, 2, 4] * 500
    spans = changed_spans(a, b)
    kept_a = len(a) - sum(i2 - i1 for i1, i2, _, _ in spans)
    kept_b = len(b) - sum(j2 - j1 for _, _, j1, j2 in spans)
    assert kept_a == kept_b >= 998


@pytest.mark.parametrize(
    ("rejected", "chosen", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], ([], [])),
        ([1, 2, 3, 9, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], ([3], [3])),  # one token replaced
        ([1, 2, 3, 9, 4, 5, 6], [1, 2, 3, 4, 5, 6], ([], [])),  # pure deletion counts for nothing
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 4, 5, 6], ([], [])),  # and so does pure insertion
        # two edits with two tokens between them become one span, unchanged tokens included
        ([1, 2, 3, 8, 4, 5, 8, 6, 7, 0], [1, 2, 3, 9, 4, 5, 9, 6, 7, 0], ([3, 4, 5, 6], [3, 4, 5, 6])),
        # with three tokens between them they stay two
        ([1, 2, 3, 8, 4, 5, 6, 8, 7, 0, 9], [1, 2, 3, 7, 4, 5, 6, 1, 7, 0, 9], ([3, 7], [3, 7])),
        # an edit two tokens before the end takes the tail with it
        ([1, 2, 3, 4, 8, 6, 7], [1, 2, 3, 4, 9, 6, 7], ([4, 5, 6], [4, 5, 6])),
        ([1, 2], [1, 2], ([0, 1], [0, 1])),  # shorter than the shortest run: everything is one span
        ([], [1, 2], ([], [])),
    ],
)
def test_muffin_described_behaviours(rejected, chosen, expected):
    assert ids(rejected, chosen, "muffin") == expected
    assert slow_muffin(rejected, chosen) == expected


def test_muffin_equals_the_oracle_on_random_edits():
    rng = random.Random(0)
    for _ in range(400):
        a, b = edited(rng, rng.randrange(1, 40), rng.choice((3, 8, 100)))
        assert ids(a, b, "muffin") == slow_muffin(a, b)


def test_muffin_autojunk_from_200_chosen_tokens_on():
    frequent = [7, 8] * 40  # 80 tokens; each of the two fills 20 % of the chosen answer
    rng = random.Random(3)
    a = [1000 + rng.randrange(10**6) for _ in range(60)] + frequent
    for filler, seen in ((118, True), (120, False)):
        b = frequent + [2000000 + rng.randrange(10**6) for _ in range(filler)]
        assert len(b) == filler + 80
        got = ids(a, b, "muffin")
        assert got == slow_muffin(a, b)
        assert (60 not in got[0]) == seen  # at 200 tokens the 80 shared ones are missed altogether
    assert 60 not in ids(a, b, "paper")[0]


def test_muffin_autojunk_grows_over_popular_tokens():
    rng = random.Random(5)
    unique = [100 + i for i in range(150)]
    a = [*unique[:70], 1, 1, 1, *unique[70:140], 2, 3]
    b = [*unique[:70], 1, 1, 1, *unique[70:120], 5, 5, 5, 5, *[1] * 90]
    rng.shuffle(unique)
    assert len(b) >= 200
    assert ids(a, b, "muffin") == slow_muffin(a, b)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="gamma must be finite and positive, got 0"):
        segment_weights([1], [2], gamma=0)
    with pytest.raises(ValueError, match="gamma must be finite and positive, got nan"):
        segment_weights([1], [2], gamma=float("nan"))
    with pytest.raises(ValueError, match="style must be one of paper, muffin, got 'words'"):
        segment_weights([1], [2], gamma=2.0, style="words")


def test_character_segments_reach_every_token_they_touch():
    offsets = [(0, 3), (3, 7), (7, 11), (11, 11)]  # the last is the end of turn, no character of the text
    assert weights_from_characters(offsets, [(5, 8)], gamma=3.0) == [1.0, 3.0, 3.0, 1.0]
    assert weights_from_characters(offsets, [(3, 7)], gamma=3.0) == [1.0, 3.0, 1.0, 1.0]
    assert weights_from_characters(offsets, [(0, 11)], gamma=3.0) == [3.0, 3.0, 3.0, 1.0]
    assert weights_from_characters(offsets, [], gamma=3.0) == [1.0] * 4
