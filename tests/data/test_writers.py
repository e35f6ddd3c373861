"""What the writers write, the readers read back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mmrlhf.data.images import image_bytes
from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, Message, Part, PreferenceGroup, Response, VideoRef
from mmrlhf.data.writers import unpack_images, write_dpo_pairs, write_ranked, write_rlhf_v_parquet

ONE = (ImageRef(path="sub/a.png"),)


def group(id="g", *, images=ONE, videos=(), text="What?", responses=None, pairs=None):
    parts = (*(Part("image") for _ in images), *(Part("video") for _ in videos), Part("text", text))
    responses = responses or (
        Response("A cat.", rank=1, score=2.5, critique="right", segments=((0, 1),)),
        Response("A «dog».", rank=2, score=1.0),
        Response("A\nfish.", rank=2, score=1.0, critique="wrong"),
    )
    return PreferenceGroup(id, (Message("user", parts),), responses, images=images, videos=videos, pairs=pairs)


def content(group):
    return dataclasses.replace(group, source="")


def test_ranked_round_trip_loses_nothing(tmp_path, picture):
    talk = (
        Message("system", (Part("text", "Be brief."),)),
        Message("user", (Part("text", "Look: "), Part("image"), Part("text", "?"))),
        Message("assistant", (Part("text", "Yes."),)),
        Message("user", (Part("text", "Sure?"),)),
    )
    groups = [
        group(),
        group("bytes", images=(ImageRef(data=picture()), ImageRef(path="b.jpg"))),
        group("video", images=(), videos=(VideoRef("clip"),)),
        group(
            "listed",
            pairs=(ListedPair(0, 2, 0.25), ListedPair(1, 2)),
            text="Other?",
            responses=(Response("a"), Response("b"), Response("c")),
        ),
        dataclasses.replace(group("talk"), prompt=talk, meta={"origin": "test"}),
    ]
    path = tmp_path / "ranked.jsonl"
    assert write_ranked(groups, path) == 5
    found = read_groups(path)
    assert found.format == "mmrlhf"
    assert [content(g) for g in found.groups] == groups
    assert found.ignored_columns == {}


def test_dpo_pairs_round_trip(tmp_path):
    path = tmp_path / "dpo_pairs.jsonl"
    assert write_dpo_pairs([group(), group("v", images=(), videos=(VideoRef("clip"),))], path) == 4
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {
        "id": "g",
        "image": "sub/a.png",
        "prompt": "What?",
        "chosen": "A cat.",
        "rejected": "A «dog».",
        "chosen_reason": "right",
        "margin": 1.5,
    }
    found = read_groups(path)
    assert found.format == "mm_rlhf"
    (g, v) = found.groups
    assert [r.text for r in g.responses] == ["A cat.", "A «dog».", "A\nfish."]
    assert [(p.better, p.worse, p.margin) for p in g.preference_pairs()] == [(0, 1, 1.5), (0, 2, 1.5)]
    assert [r.critique for r in g.responses] == ["right", None, "wrong"]
    assert v.videos[0].path == "clip"
    two = group(images=(ImageRef(path="a.png"), ImageRef(path="b.png")))
    write_dpo_pairs([two], path)
    assert read_groups(path).groups[0].images == two.images


def test_rlhf_v_parquet_round_trip(tmp_path, picture):
    pytest.importorskip("pyarrow")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(picture())
    path = tmp_path / "data.parquet"
    groups = [group(), group("h", images=(ImageRef(data=picture(color=(1, 1, 1))),), text="Else?")]
    assert write_rlhf_v_parquet(groups, path, tmp_path) == 4
    found = read_groups(path)
    assert (found.format, found.rows, len(found.groups)) == ("rlhf_v", 4, 2)
    assert found.groups[0].images[0].data == picture()
    assert [r.text for r in found.groups[0].responses] == ["A cat.", "A «dog».", "A\nfish."]
    assert found.groups[0].meta["image_path"] == "sub/a.png"


def test_unpacked_images_are_files_that_are_read_back(tmp_path, picture):
    jpeg, png = picture(format="JPEG"), picture()
    groups = [
        group("a", images=(ImageRef(data=png), ImageRef(path="other.png")), text="1"),
        group("b", images=(ImageRef(data=png), ImageRef(data=jpeg)), text="2"),
    ]
    folder = tmp_path / "unpacked"
    unpacked = unpack_images(groups, folder)
    write_ranked(unpacked, folder / "data.jsonl")
    assert sorted(p.suffix for p in folder.iterdir()) == [".jpeg", ".jsonl", ".png"]
    found = read_groups(folder / "data.jsonl")
    assert [content(g) for g in found.groups] == unpacked
    assert image_bytes(found.groups[1].images[0], found.root) == png
    assert image_bytes(found.groups[1].images[1], found.root) == jpeg


def test_what_a_format_cannot_hold_is_an_error_and_leaves_the_file_alone(tmp_path, picture):
    path = tmp_path / "x.jsonl"
    path.write_text("before")
    with pytest.raises(ValueError, match="g: this format holds images as paths"):
        write_dpo_pairs([group(images=(ImageRef(data=picture()),))], path)
    talk = dataclasses.replace(group(), prompt=(*group().prompt, Message("assistant", (Part("text", "x"),))))
    with pytest.raises(ValueError, match="g: this format holds one user turn"):
        write_dpo_pairs([talk], path)
    with pytest.raises(ValueError, match="one video, got 2"):
        write_dpo_pairs([group(images=(), videos=(VideoRef("a"), VideoRef("b")))], path)
    assert path.read_text() == "before"
    with pytest.raises(ValueError, match="exactly one image a row"):
        write_rlhf_v_parquet([group(images=())], tmp_path / "x.parquet", tmp_path)
    with pytest.raises(BadRow, match=r"'sub/a.png' is not in"):
        write_rlhf_v_parquet([group()], tmp_path / "x.parquet", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]
