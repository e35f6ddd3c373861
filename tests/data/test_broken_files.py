"""read_groups on broken and hostile files (D10, D11, D12, D17, D20)."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrlhf.data import rows as containers
from mmrlhf.data.formats import COLUMNS, PARSERS
from mmrlhf.data.readers import TooManyBadRows, read_groups
from mmrlhf.data.schema import BadRow
from records import (
    CONVERSATIONAL,
    PAIR,
    SHAREGPT,
    parquet,
    rlhf_v_row,
    texts,
    write,
)

BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm_reward_bench.jsonl"


GOOD = json.dumps(PAIR).encode()
BROKEN = {
    "bad line": (b"{not json}", "not JSON"),
    "not an object": (b"[1, 2]", "must be a JSON object, got list"),
    "missing key": (json.dumps({**PAIR, "chosen": None}).encode(), "chosen must be str, got null"),
    "wrong type": (json.dumps({**PAIR, "rejected": 5}).encode(), "rejected must be str, got int"),
    "prompt list": (json.dumps({**PAIR, "prompt": [1]}).encode(), "'prompt' must be str, got list"),
    "image number": (json.dumps({**PAIR, "image": 5}).encode(), "an image must be a path"),
    "image null in list": (json.dumps({**PAIR, "image": [None]}).encode(), "bytes, path} or a PIL image, got null"),
    "invalid utf-8": (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
    "deep nesting": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "nan": (b'{"score_chosen": NaN}', "NaN is not JSON"),
    "lone surrogate": (json.dumps({**PAIR, "chosen": "\ud800"}).encode(), "lone surrogate at character 0"),
    "huge number": (json.dumps({**PAIR, "margin": 10**400}).encode(), "margin must be finite"),
    "path escape": (json.dumps({**PAIR, "image": "../x.png"}).encode(), "climbs out"),
    "address": (json.dumps({**PAIR, "image": "http://x/y.png"}).encode(), "is an address"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_d10_broken_line_names_its_place(tmp_path, name):
    line, reason = BROKEN[name]
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD.replace(b"What", b"Else") + b"\n")
    found = read_groups(tmp_path / "x.jsonl", on_bad_row="skip", max_bad_rows=0.5)
    (bad,) = found.bad_rows
    assert bad.source.endswith("x.jsonl:2")
    assert reason in bad.reason
    assert len(found.groups) == 2
    with pytest.raises(BadRow, match=r"x.jsonl:2: "):
        read_groups(tmp_path / "x.jsonl")


def test_d10_bom_crlf_and_blank_lines_are_fine(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD.replace(b"What", b"Else"))
    found = read_groups(tmp_path / "x.jsonl")
    assert (found.rows, len(found.groups)) == (2, 2)


def test_d10_a_line_of_200_mb_is_skipped_without_being_held(tmp_path):
    import resource

    path = tmp_path / "x.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b"\n" + b'{"prompt": "')
        for _ in range(200):
            file.write(b"x" * 10**6)
        file.write(b'"}\n' + GOOD.replace(b"What", b"Else") + b"\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = read_groups(path, on_bad_row="skip", max_bad_rows=0.5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert "a line of 200000015 bytes, at most 16777216" in found.bad_rows[0].reason
    assert found.bad_rows[0].source.endswith(":2")
    assert len(found.groups) == 2


def test_d10_empty_and_absent_files(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"")
    with pytest.raises(BadRow, match="no rows"):
        read_groups(tmp_path / "x.jsonl")
    with pytest.raises(FileNotFoundError, match=r"y.jsonl: no such file"):
        read_groups(tmp_path / "y.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"{\n{\n")
    with pytest.raises(BadRow, match=r"x.jsonl:1: not JSON"):
        read_groups(tmp_path / "x.jsonl", on_bad_row="skip")
    (tmp_path / "x.json").write_bytes(b'[{"a": 1}')
    with pytest.raises(BadRow, match=r"x.json: not JSON"):
        read_groups(tmp_path / "x.json")


def test_d10_damaged_parquet_is_a_bad_row(tmp_path, picture):
    path = parquet(tmp_path / "x.parquet", [rlhf_v_row(picture, i, chosen=str(i)) for i in range(5)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadRow, match=r"x.parquet:row 0: not readable as parquet"):
        read_groups(path, on_bad_row="skip")


@given(
    st.dictionaries(
        st.sampled_from(sorted(set().union(*COLUMNS.values()))),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["role", "content", "from", "value", "type", "text", "bytes", "path"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=8,
        ),
        max_size=8,
    ),
    st.sampled_from(sorted(PARSERS)),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_d10_no_row_of_any_types_escapes_as_another_error(row, format):
    try:
        found = read_groups([row], format=format, on_bad_row="skip", max_bad_rows=1.0)
    except BadRow:
        return
    assert found.rows == 1
    assert len(found.groups) + len(found.bad_rows) + len(found.without_pairs) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": ""}, "rejected is empty"),
        ({"chosen": " \n\t"}, "chosen is only whitespace"),
        ({"rejected": "A cat."}, "chosen and rejected are the same text"),
    ],
)
def test_d11_degenerate_pair(tmp_path, change, reason):
    path = write(tmp_path / "x.jsonl", {**PAIR, **change}, {**PAIR, "prompt": "Other?"})
    found = read_groups(path, on_bad_row="skip", max_bad_rows=0.5)
    assert [b.reason for b in found.bad_rows] == [reason]
    assert len(found.groups) == 1


def test_d11_ranked_lists(tmp_path):
    base = {"prompt": "What?", "ranking": "1>2>3"}
    same = {**base, "responses": ["a", "b", "a"]}
    with pytest.raises(BadRow, match="listed twice with different ranks"):
        read_groups(write(tmp_path / "x.jsonl", same))
    tied = {**base, "responses": ["a", "b", "a"], "ranking": "1=3>2"}
    assert texts(read_groups(write(tmp_path / "y.jsonl", tied)).groups[0]) == ["a", "b"]
    for responses, reason in (
        ([{"text": "a", "score": 1}, {"text": "b"}], "score is given for 1 of 2 responses"),
        (["a", "b"], "no pairs listed, and no response has a rank or a score"),
        (["a"], "must hold 2 to 64, got 1"),
        ([{"text": "a", "rank": 1}, {"text": "b", "rank": 1.5}], "rank must be a whole number from 1"),
        ([{"text": "ab", "score": 1, "segments": [[0, 3]]}, {"text": "b", "score": 2}], r"within 0..2, got \[0, 3\]"),
    ):
        with pytest.raises(BadRow, match=reason):
            read_groups(write(tmp_path / "z.jsonl", {"prompt": "What?", "responses": responses}))


def test_d12_image_count(tmp_path):
    two = {**SHAREGPT, "conversations": [{"from": "human", "value": "<image><image>What?"}]}
    with pytest.raises(BadRow, match="2 image placeholders for 1 images"):
        read_groups(write(tmp_path / "x.jsonl", two))
    with pytest.raises(BadRow, match="1 image placeholders for 0 images"):
        read_groups(write(tmp_path / "x.jsonl", {**CONVERSATIONAL, "images": []}))
    in_answer = {**CONVERSATIONAL, "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}
    with pytest.raises(BadRow, match="chosen holds an image or a video"):
        read_groups(write(tmp_path / "x.jsonl", in_answer))


def test_d17_bad_row_cap_stops_with_a_summary(tmp_path):
    rows = [{**PAIR, "prompt": str(i)} for i in range(14)]
    rows += [{**PAIR, "chosen": ""} for _ in range(4)] + [{**PAIR, "image": f"../{i}.png"} for i in range(2)]
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(TooManyBadRows) as caught:
        read_groups(path, on_bad_row="skip")
    message = str(caught.value)
    assert "6 of 20 rows are bad (30.0%, at most 5.0% may be)" in message
    assert "4 x chosen is empty (first: " in message
    assert "2 x '../0.png' climbs out" in message  # counted as one reason
    assert len(caught.value.bad_rows) == 6
    assert len(read_groups(path, on_bad_row="skip", max_bad_rows=0.3).groups) == 14


def test_d17_arguments():
    with pytest.raises(ValueError, match="on_bad_row must be raise or skip, got 'ignore'"):
        read_groups([], on_bad_row="ignore")
    with pytest.raises(ValueError, match=r"max_bad_rows must be in \[0, 1\], got 2"):
        read_groups([], max_bad_rows=2)


class Trap:
    """Unpickling one would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "code ran"))


def test_d20_malicious_container(tmp_path, watch):
    mark = tmp_path / "mark"
    payload = pickle.dumps(Trap(mark), protocol=2)
    names = ["x.pkl", "x.pickle", "x.pt", "x.pth", "x.bin", "x.npy", "load.py", "x.zip", "x.tar", "x.tar.gz"]
    for name in names:
        (tmp_path / name).write_bytes(payload)
        with watch, pytest.raises(BadRow, match="files are not read"):
            read_groups(tmp_path / name)
        assert not watch.opened
    for name in ("x.jsonl", "x.json", "x.parquet"):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(BadRow, match=r"a pickle|not readable as parquet"):
            read_groups(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.writestr("../../slip.jsonl", json.dumps(PAIR))
    (tmp_path / "slip.zip").rename(tmp_path / "slip.jsonl")
    with pytest.raises(BadRow, match="it is a zip archive"):
        read_groups(tmp_path / "slip.jsonl")
    script = tmp_path / "dataset"
    script.mkdir()
    (script / "dataset.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(BadRow, match=r"the folder holds no .*; .py are not read"):
        read_groups(script)
    write(script / "data.jsonl", PAIR)
    assert len(read_groups(script)) == 1  # the data is read, the script beside it is not
    assert not mark.exists()
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(BadRow, match=r"must end in .jsonl, .ndjson, .json, .parquet, got '.csv'"):
        read_groups(tmp_path / "x.csv")


def test_long_json_arrays_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_JSON", 10)
    (tmp_path / "x.json").write_text(json.dumps([PAIR]))
    with pytest.raises(BadRow, match="store it as JSON Lines"):
        read_groups(tmp_path / "x.json")
