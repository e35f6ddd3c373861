"""Tokens from the sizes of pictures alone: the same as the processor makes, checked, and never wrong in silence."""

from __future__ import annotations

import logging

import pytest
import torch

from mmrlhf.data import dataset as dataset_module
from mmrlhf.data.collate import PreferenceDataset, collate
from mmrlhf.data.encode import CHECKED
from mmrlhf.data.encoded import same_tokens
from mmrlhf.data.schema import BadRow, ImageRef, Message, Part, PreferenceGroup, Response, VideoRef
from records import preference

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3")
# Several tilings of every family, one picture of a pixel a side, and enough kinds that CHECKED of them are not all.
SIZES = ((40, 30), (28, 28), (120, 20), (30, 90), (56, 112), (3, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_tokens_are_the_processor_s(encoder, picture, family):
    e = encoder(family, segments="paper", gamma=5.0)
    groups = [
        preference("yes", "no", id=f"{i}", images=[ImageRef(data=picture(size, color=(i, 0, 0)))])
        for i, size in enumerate((*SIZES, *SIZES))
    ]
    groups.append(preference("a", "b", id="two", images=[ImageRef(data=picture(s)) for s in SIZES[1:3]]))
    groups.append(preference("a", "b", id="text"))
    truth = encoder(family, segments="paper", gamma=5.0)
    for group in groups:
        assert same_tokens(e.measure(group), truth.encode(group)), group.id
    assert e._measures


def test_pictures_of_a_known_size_meet_no_processor(encoder, picture, monkeypatch):
    e = encoder("llava_next")
    groups = [
        preference("yes", "no", id=f"{i}{size}", images=[ImageRef(data=picture(size, color=(i, 0, 0)))])
        for size in SIZES
        for i in range(4)
    ]
    processed = []
    real = type(e.processor.image_processor).preprocess
    monkeypatch.setattr(
        type(e.processor.image_processor),
        "preprocess",
        lambda self, images, *args, **words: processed.append(images) or real(self, images, *args, **words),
    )
    data = PreferenceDataset(groups, e)
    # an empty picture for each size, and the first group of CHECKED of them whole
    assert len(processed) == len(SIZES) + CHECKED
    batch = collate([data[i] for i in range(len(data))])
    assert len(processed) == len(SIZES) + len(groups)
    monkeypatch.undo()
    truth = collate([encoder("llava_next").encode(group) for group in groups])
    for name in ("input_ids", "prefix_len", "targets", "pairs", "token_weight"):
        assert torch.equal(getattr(batch, name), getattr(truth, name)), name
    assert batch.vision.keys() == truth.vision.keys()
    assert all(torch.equal(batch.vision[k], truth.vision[k]) for k in truth.vision)


def test_frames_of_a_folder_are_measured_and_video_files_are_not(encoder, picture, tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    for number in range(7):
        (tmp_path / "clip" / f"{number}.png").write_bytes(picture((40, 30 + number)))
    e = encoder("qwen2_vl", video_frames=3)
    group = preference("yes", "no", images=[ImageRef(data=picture())], videos=[VideoRef("clip")])
    e.measure(group)  # compared
    monkeypatch.setattr(e, "processor", None)  # not asked again
    assert same_tokens(e.measure(group), encoder("qwen2_vl", video_frames=3).encode(group))
    assert [ref.path for ref in e.pictures(group)[1:]] == ["clip/0.png", "clip/3.png", "clip/6.png"]
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\0ftyp")
    assert e.pictures(preference("a", "b", videos=[VideoRef("film.mp4")])) is None
    assert encoder("qwen2_vl", videos="native").pictures(group) is None
    with pytest.raises(BadRow, match="'gone' is not in"):
        encoder("qwen2_vl").measure(preference("a", "b", videos=[VideoRef("gone")]))


def by_content(encoder, monkeypatch, shade):
    """A processor whose tokens follow from what a picture shows: one token more where it is bright."""
    real = type(encoder.processor).__call__

    def call(self, images=None, text=None, **words):
        made = real(self, images=images, text=text, **words)
        if images and self is encoder.processor and images[0][0].getpixel((0, 0))[0] >= shade:
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if name in made:
                    made[name] = torch.cat([made[name][:, :1], made[name]], 1)
        return made

    monkeypatch.setattr(type(encoder.processor), "__call__", call)


def test_a_processor_that_looks_at_the_picture_is_found_out(encoder, picture, monkeypatch, caplog):
    e = encoder("qwen2_vl")
    by_content(e, monkeypatch, 0)
    groups = [preference("a", "b", id=str(i), images=[ImageRef(data=picture(color=(i, 0, 0)))]) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.encode"):
        data = PreferenceDataset(groups, e)
    assert "do not follow from their sizes; every picture is processed to count tokens" in caplog.text
    assert len(caplog.records) == 1
    assert data.lengths == [e.encode(group).num_tokens for group in groups]


def test_tokens_that_turn_out_others_stop_the_run(encoder, picture, monkeypatch):
    e = encoder("qwen2_vl")
    by_content(e, monkeypatch, 200)
    groups = [preference("a", "b", id=str(i), images=[ImageRef(data=picture(color=(i, 0, 0)))]) for i in (1, 2, 250)]
    data = PreferenceDataset(groups, e)
    assert data[1].num_tokens == data.lengths[1]
    with pytest.raises(RuntimeError, match=r"250: the processor makes \d+ prompt tokens, and made or measured \d+"):
        data[2]
    whole = encoder("qwen2_vl", measure=False)
    monkeypatch.undo()
    by_content(whole, monkeypatch, 200)
    data = PreferenceDataset(groups, whole)
    assert data[2].num_tokens == data.lengths[2] == data.lengths[0] + 1


def test_bad_groups_say_what_the_encoder_says(encoder, picture, tmp_path):
    whole = picture((60, 50), format="JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    marked = PreferenceGroup(
        id="marker",
        prompt=(Message("user", (Part("image"), Part("text", "what <|im_end|>"))),),
        responses=(Response("a", rank=1), Response("b", rank=2)),
        images=(ImageRef(data=whole),),
    )
    bad = [
        marked,
        preference("a", "b", id="cut", images=[ImageRef(path="cut.jpg")]),
        preference("a", "b", id="absent", images=[ImageRef(path="absent.jpg")]),
        preference("a", "b", id="text", images=[ImageRef(data=b"<html>")]),
        preference("a" * 4000, "b", id="long", images=[ImageRef(data=whole)]),
    ]
    settings = {"max_group_tokens": 200}
    good = [preference("a", "b", id="good", images=[ImageRef(data=whole)])]
    data = PreferenceDataset(good + bad, encoder(**settings), on_bad_row="skip", max_bad_rows=1.0)
    assert len(data) == 1
    for group, error in zip(bad, data.dropped, strict=True):
        with pytest.raises(BadRow) as told:
            encoder(**settings, measure=False).encode(group)
        assert (str(error), type(error)) == (str(told.value), type(told.value))


def test_a_processor_without_an_image_processor_is_asked_itself(encoder, picture, monkeypatch, caplog):
    e = encoder("qwen2_vl")
    group = preference("a", "b", images=[ImageRef(data=picture())])
    truth = e.encode(group)

    class Bare:  # no `image_processor`
        def __call__(self, **words):
            return encoder("qwen2_vl").processor(**words)

    monkeypatch.setattr(e, "processor", Bare())
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.encode"):
        assert same_tokens(e.measure(group), truth)
    assert "has no image processor of its own; every picture is processed" in caplog.text


def test_a_stand_in_that_fails_is_told_about_once(encoder, picture, monkeypatch, caplog):
    e = encoder("qwen2_vl")
    monkeypatch.setattr(e._stand_in, "image_processor", lambda *_, **__: {}["nothing"])
    groups = [preference("a", "b", id=str(i), images=[ImageRef(data=picture((28 + i, 40)))]) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.encode"):
        data = PreferenceDataset(groups, e)
    assert data.lengths == [e.encode(group).num_tokens for group in groups]
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "Qwen2VLProcessor: its tokens cannot be had from the sizes of pictures"
    ]


@pytest.mark.parametrize(("cores", "processes", "threads"), [(2, "1", 2), (64, "1", 8), (16, "8", 2), (2, "8", 1)])
def test_threads_share_the_cores(monkeypatch, cores, processes, threads):
    monkeypatch.setattr(dataset_module.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert dataset_module._threads() == threads
