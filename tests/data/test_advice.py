"""What is said of a file that cannot be read as it is: what it seems to be, which file to name, what to unpack."""

from __future__ import annotations

import json
import zipfile

import pytest

from mmrlhf.data.check import check
from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import BadRow
from mmrlhf.data.view import view
from records import PAIR, write

FOLDERS = ("long", "short", "mcq", "safety", "video")


@pytest.fixture
def download(tmp_path):
    """MM-RLHF as it lies after a download: both files, an archive for each folder, nothing unpacked."""
    pairs = [{**PAIR, "id": folder, "image": f"{folder}/a.png"} for folder in FOLDERS[:-1]]
    write(tmp_path / "dpo_pairs.jsonl", *pairs, {k: v for k, v in PAIR.items() if k != "image"} | {"video": "video/v"})
    write(tmp_path / "data.jsonl", {"id": "q1", "image": "mcq/a.png", "question": "What?", "answer": ["A", "B"]})
    for folder in FOLDERS:
        with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
            archive.writestr(f"{folder}/a.png", "")
    (tmp_path / "README.md").write_text("")
    return tmp_path


def test_the_download_of_mm_rlhf(download, picture):
    with pytest.raises(BadRow) as told:
        read_groups(download)
    assert told.value.reason == (
        f"MM-RLHF's download holds its pairs in dpo_pairs.jsonl and other things in data.jsonl: "
        f"name {download / 'dpo_pairs.jsonl'}, and unpack long.zip, mcq.zip, safety.zip, short.zip, video.zip beside it"
    )
    for folder in FOLDERS[1:]:
        (download / folder).mkdir()
        (download / folder / "a.png").write_bytes(picture())
    (download / "video" / "v").mkdir()
    (download / "video" / "v" / "0.png").write_bytes(picture())
    with pytest.raises(BadRow, match=r"and unpack long\.zip beside it$"):
        read_groups(download)
    (download / "short" / "a.png").unlink()
    report = check(download / "dpo_pairs.jsonl")
    root = download
    assert report.unpack == [
        f"{root / 'long.zip'} is not unpacked: 1 files of it are missing; "
        f"unpack it so that {root / 'long'}/ holds them",
        f"{root / 'short.zip'} is unpacked in part: 1 files of it are missing; "
        f"unpack it so that {root / 'short'}/ holds them",
    ]
    assert all(line in report.text() for line in report.unpack)
    (download / "data.jsonl").unlink()
    assert len(read_groups(download)) == 5


def test_nothing_unpacked_is_said_once_a_folder(download):
    report = check(download / "dpo_pairs.jsonl")
    assert [line.split(".zip")[0].rpartition("/")[2] for line in report.unpack] == sorted(FOLDERS)
    assert "none of the images is here" in report.text()
    assert "--root" not in report.text()  # that would not help


def test_all_labelled_information_points_to_the_pairs(download):
    for path in (download / "data.jsonl",):
        assert f"its pairs are in {download / 'dpo_pairs.jsonl'}" in check(path).error
    (download / "dpo_pairs.jsonl").unlink()
    assert "its pairs are in dpo_pairs.jsonl of the same download" in check(download / "data.jsonl").error


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "Chosen": "a", "Rejected ": "b"}, "in lower case .* not 'Chosen', 'Rejected '"),
        ({"data": [PAIR, PAIR]}, "the rows lie in 'data': store that list by itself"),
        ({"prompt": "q", "completion": "a", "label": True}, "rows with a label each .* compare no two answers"),
        ({"prompt": "q", "chosen": "a"}, "there is 'chosen' and no 'rejected'"),
        ({"messages": [{"role": "user", "content": "q"}]}, r"rows with one answer each \(as for fine-tuning\)"),
        ({"instruction": "q", "output": "a"}, "a row needs chosen and rejected, or responses with scores or ranks"),
        ({"a": 1}, "columns a; a row needs chosen and rejected"),
    ],
)
def test_columns_of_no_format(tmp_path, row, told):
    with pytest.raises(BadRow, match=told) as error:
        read_groups(write(tmp_path / "x.jsonl", row))
    assert error.value.source.endswith("x.jsonl:1")


def test_the_row_that_was_looked_at_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": 1,\n{"id": 2}\n')
    with pytest.raises(BadRow, match=r"columns id; .*\(another row cannot be read: .*x.jsonl:1: not JSON") as error:
        read_groups(tmp_path / "x.jsonl")
    assert error.value.source.endswith("x.jsonl:2")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.json", json.dumps(PAIR, indent=1), "one JSON object over several lines"),
        ("x.jsonl", json.dumps(PAIR, indent=1), "one JSON object over several lines"),
        ("x.jsonl", json.dumps([PAIR]), "it is one JSON list of rows: name it .json"),
        ("x.jsonl", json.dumps([PAIR], indent=1), "it is one JSON list of rows: name it .json"),
        ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid x\n", "run `git lfs pull`"),
        ("x.parquet", "version https://git-lfs.github.com/spec/v1\noid x\n", "run `git lfs pull`"),
        ("x.csv", "a,b\n", "got '.csv'; save the table as JSON Lines"),
        ("x.arrow", "ARROW1", "name the folder that save_to_disk wrote"),
        ("x.zip", "PK", "unpack archives first"),
    ],
)
def test_files_of_another_kind(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    assert told in check(tmp_path / name).error


def test_folders_without_rows_say_what_they_hold(tmp_path):
    assert check(tmp_path).error.endswith("; it is empty")
    for name in ("a.png", "b.png", "c.txt"):
        (tmp_path / name).write_text("")
    assert check(tmp_path).error.endswith("; there is 2 .png, 1 .txt")
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "x.jsonl", PAIR)
    assert check(tmp_path).error.endswith(f"; name one of its folders that do: {tmp_path / 'train'}")
    assert "the path of the data is empty" in check("").error


def test_an_lfs_pointer_among_the_images(tmp_path):
    (tmp_path / "mcq").mkdir()
    (tmp_path / "mcq" / "a.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    report = check(write(tmp_path / "x.jsonl", PAIR))
    assert "it is a Git LFS pointer" in report.bad_images[0].reason


def test_files_without_a_usable_row(tmp_path):
    path = write(tmp_path / "x.jsonl", {**PAIR, "rejected": PAIR["chosen"]})
    text = check(path).text()
    assert "none of them can be used (1 bad, 0 without any pair)" in text
    assert "chosen and rejected are the same text" in text
    assert "None" not in text
    with pytest.raises(BadRow, match="none of its 1 rows can be shown"):
        view(path)
    assert not (tmp_path / "x.jsonl.html").exists()
    path = write(tmp_path / "sft.jsonl", {"conversations": [{"from": "human", "value": "q"}]})
    assert "'chosen' is missing: rows with one answer each compare nothing" in check(path).text()
