"""Videos, the dataset's cache and bad groups, and the hash of a row."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from mmrlhf.data.collate import Encoder, PreferenceDataset, collate
from mmrlhf.data.readers import TooManyBadRows
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, Response, VideoRef
from records import (
    preference,
)


def test_video_frames_become_images_without_a_video_side(encoder, picture, tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(10):
        (tmp_path / "clip" / f"{number}.png").write_bytes(picture(color=(number, 0, 0)))
    e = encoder("qwen2_vl", video_frames=3)
    assert e.video_mode == "frames"  # no torchvision here: the processor's video side cannot run
    encoded = e.encode(preference("yes", "no", videos=[VideoRef("clip")]))
    assert encoded.vision["image_grid_thw"].shape == (3, 3)
    assert encoded.images == 1
    first = e.row_hash(preference("yes", "no", videos=[VideoRef("clip")]))
    (tmp_path / "clip" / "9.png").write_bytes(picture(color=(99, 0, 0)))
    assert e.row_hash(preference("yes", "no", videos=[VideoRef("clip")])) != first


def test_videos_go_to_a_real_video_side(encoder, picture, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    for number in range(5):
        (tmp_path / "clip" / f"{number}.png").write_bytes(picture())
    e = encoder("qwen2_vl", videos="native", video_frames=4)
    seen = {}

    def processor(**words):
        seen.update(words)
        return {"input_ids": torch.arange(5)[None], "pixel_values_videos": torch.zeros(8, 12)}

    monkeypatch.setattr(e, "processor", processor)
    encoded = e.encode(preference("yes", "no", videos=[VideoRef("clip")]))
    assert len(seen["videos"][0][0]) == 4
    assert seen["videos_kwargs"] == {"do_sample_frames": False}
    assert encoded.vision["pixel_values_videos"].shape == (8, 12)


def test_what_the_processor_refuses_is_a_bad_row(encoder, monkeypatch, image):
    e = encoder()

    def refuse(**_):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(e, "processor", refuse)
    with pytest.raises(BadRow, match="absolute aspect ratio"):
        e.encode(preference("a", "b", images=[image]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": "some"}, "pairs must be one of all, adjacent, best_vs_rest, got 'some'"),
        ({"segments": "words"}, "segments must be None or one of paper, muffin, got 'words'"),
        ({"gamma": 0.0}, "gamma must be finite and positive, got 0.0"),
        ({"max_group_tokens": 0}, "max_group_tokens must be positive, got 0"),
        ({"video_frames": 0}, "video_frames must be positive, got 0"),
        ({"videos": "maybe"}, "videos must be auto, native or frames, got 'maybe'"),
    ],
)
def test_bad_settings_are_named(encoder, settings, message):
    with pytest.raises(ValueError, match=message):
        encoder(**settings)


def test_dataset_gives_what_the_encoder_gives(encoder, picture):
    groups = [preference("yes", "no", id=f"g{i}", images=[ImageRef(data=picture(color=(i, 0, 0)))]) for i in range(4)]
    groups.append(preference("only", "text", id="t"))
    e = encoder(segments="paper", gamma=5.0)
    direct = [e.encode(g) for g in groups]
    pixels = sum(t.numel() * t.element_size() for t in direct[0].vision.values())
    # Pixels are made when they are asked for, but those of a picture whose measured tokens were compared are there.
    for room, calls in ((1 << 30, 3), (pixels * 2, 3), (0, 4)):
        e = encoder(segments="paper", gamma=5.0)
        data = PreferenceDataset(groups, e, cache_bytes=room)
        made = []
        e.vision = lambda g, ids, e=e, made=made: made.append(g.id) or Encoder.vision(e, g, ids)
        for index, expected in enumerate(direct):
            got = data[index]
            assert torch.equal(got.prefix_ids, expected.prefix_ids)
            assert got.prefix_ids.dtype == torch.int64
            assert all(torch.equal(a, b) for a, b in zip(got.response_ids, expected.response_ids, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(got.weights, expected.weights, strict=True))
            assert got.vision.keys() == expected.vision.keys()
            assert all(torch.equal(got.vision[k], expected.vision[k]) for k in got.vision)
        assert len(made) == calls
        assert data._vision_bytes <= room
    assert data.lengths == [g.num_tokens for g in direct]
    assert [data.num_pairs(i) for i in range(5)] == [1] * 5
    assert data.num_sft_tokens(4) == direct[4].response_ids[0].numel()
    assert torch.equal(data[-1].prefix_ids, data[4].prefix_ids)
    with pytest.raises(IndexError, match="group 5 of 5"):
        data[5]


def test_margins_that_contradict_the_order_are_counted(encoder):
    groups = [
        preference(Response("yes", rank=1, score=1.0), Response("no", rank=2, score=3.0), id="ranks"),
        preference(
            Response("yes", score=2.0), Response("no", score=2.0), id="even", pairs=(ListedPair(0, 1),), ranked=False
        ),
        preference("yes", "no", "well", id="listed", pairs=(ListedPair(0, 1, -0.5), ListedPair(0, 2, 0.5))),
        preference("yes", "no", id="none"),
    ]
    data = PreferenceDataset(groups, encoder())
    assert data.contradicting_margins == 2
    assert PreferenceDataset(groups[1:2], encoder()).contradicting_margins == 0


def test_dataset_bad_groups(encoder, image, caplog):
    good = [preference("yes", "no", id=f"g{i}") for i in range(3)]
    missing = preference("yes", "no", id="missing", images=[ImageRef(path="nowhere.png")])
    with pytest.raises(BadRow, match=r"missing: 'nowhere.png' is not in"):
        PreferenceDataset([*good, missing], encoder())
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.dataset"):
        data = PreferenceDataset([*good, missing], encoder(), on_bad_row="skip", max_bad_rows=0.25)
    assert len(data) == 3
    assert [d.source for d in data.dropped] == ["missing"]
    assert "1 of 4 groups left out" in caplog.text
    with pytest.raises(TooManyBadRows, match=r"nowhere.png"):
        PreferenceDataset([*good, missing], encoder(), on_bad_row="skip", max_bad_rows=0.2)
    with pytest.raises(ValueError, match="two groups have the id 'g0'"):
        PreferenceDataset([good[0], good[0]], encoder())
    with pytest.raises(ValueError, match="on_bad_row must be raise or skip"):
        PreferenceDataset(good, encoder(), on_bad_row="maybe")
    assert len(PreferenceDataset([], encoder())) == 0
    with pytest.raises(ValueError, match="at least one group"):
        collate([])


def test_row_hash_covers_text_pixels_and_settings(encoder, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    base = preference("yes", "no", images=[ImageRef(path="a.png")])
    e = encoder("qwen2_vl")
    first = e.row_hash(base)
    assert first == encoder("qwen2_vl").row_hash(base)
    assert PreferenceDataset([base], e).row_hash(0) == first
    different = {
        "response": e.row_hash(dataclasses.replace(base, responses=(Response("yes!", rank=1), Response("no", rank=2)))),
        "prompt": e.row_hash(preference("yes", "no", images=base.images, text="else ?")),
        "ranks": e.row_hash(dataclasses.replace(base, pairs=(ListedPair(1, 0),))),
        "processor": encoder("llava").row_hash(base),
        "gamma": encoder("qwen2_vl", segments="paper", gamma=2.0).row_hash(base),
        "pixels": encoder("qwen2_vl", max_image_pixels=5000).row_hash(base),
    }
    (tmp_path / "a.png").write_bytes(picture(color=(1, 1, 1)))
    different["image"] = e.row_hash(base)
    assert first not in different.values()
    assert len(set(different.values())) == len(different)
