"""Files that stopped runs go on with: cut lines, damaged lines, and two processes at one file."""

from __future__ import annotations

import pytest

from mmrlhf.data.resumable import ResumableLines


def number_of(row: dict) -> int:
    return row["n"] + 0


def test_a_line_that_a_kill_cut_is_dropped_and_the_next_one_is_whole(tmp_path):
    """At every byte of the last line: those before it are read, and what is appended stands on its own line."""
    path = tmp_path / "deep" / "lines.jsonl"
    with ResumableLines(path, what="numbers") as lines:
        assert list(lines.read(number_of)) == []
        lines.append({"n": 1}, {"n": 2})
    whole = path.read_bytes()
    assert whole == b'{"n": 1}\n{"n": 2}\n'
    for cut in range(9, len(whole) + 1):
        path.write_bytes(whole[:cut])
        with ResumableLines(path, what="numbers") as lines:
            found = list(lines.read(number_of))
            lines.append({"n": 3})
        assert found == ([1, 2] if cut == len(whole) else [1])
        assert path.read_bytes() == whole[: 9 * len(found)] + b'{"n": 3}\n'


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nonsense", "Expecting value"),
        (b"[1]", "it must be an object, got list"),
        (b'{"m": 1}', "it lacks 'n'"),
        (b'{"n": "x"}', "can only concatenate str"),
        (b'{"n": "\xff"}', "can't decode byte 0xff"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_cut(line, why, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n"')
    before = path.read_bytes()
    with (
        ResumableLines(path, what="numbers") as lines,
        pytest.raises(ValueError, match=rf"lines\.jsonl:2: not a line of numbers \(.*{why}.*\): remove the file"),
    ):
        list(lines.read(number_of))
    assert path.read_bytes() == before


def test_one_process_at_a_time(tmp_path):
    """A second run that opened the file while the first writes could cut the line that is just being written."""
    path = tmp_path / "lines.jsonl"
    with ResumableLines(path, what="numbers") as lines:
        list(lines.read(number_of))
        lines.append({"n": 1})
        with pytest.raises(ValueError, match=r"lines\.jsonl is in use by another process"):
            ResumableLines(path, what="numbers")
        lines.append({"n": 2})
    with ResumableLines(path, what="numbers") as lines:
        assert list(lines.read(number_of)) == [1, 2]


def test_any_text_comes_back(tmp_path):
    """Line breaks inside a text, letters beyond ASCII, and half of a surrogate pair, which an endpoint may reply."""
    said = "a\nb\r\u2028 é 猫 \ud83d"
    with ResumableLines(tmp_path / "t.jsonl", what="texts") as lines:
        lines.append({"n": said})
    with ResumableLines(tmp_path / "t.jsonl", what="texts") as lines:
        assert list(lines.read(lambda row: row["n"])) == [said]
