"""Tokens kept on the disk: bitwise those that are made, whatever the file holds and whoever else writes it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import multiprocessing
import os

import numpy as np
import pytest
import torch

from mmrlhf.data import dataset as dataset_module
from mmrlhf.data import kept as module
from mmrlhf.data.collate import Encoder, PreferenceDataset, collate
from mmrlhf.data.encode import CHECKED
from mmrlhf.data.readers import TooManyBadRows
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, Response, VideoRef
from records import preference

FAMILIES = ("qwen2_vl", "llava_next", "idefics3", "gemma3")  # token types of both kinds, and none
PAPER = {"segments": "paper", "gamma": 5.0}


@pytest.fixture
def groups(picture):
    """Pictures of several sizes and none, two and three responses, scores, segments; more than one block of 4."""
    made = [
        preference("two red cats", "a dog", id=f"p{i}", images=[ImageRef(data=picture((28 + 20 * i, 40)))])
        for i in range(5)
    ]
    made.append(preference("yes", "no", "two cats and a dog", id="three"))
    scored = [Response("red", score=0.5, segments=((0, 2),)), Response("blue", score=-1.5), Response("no", score=0.5)]
    made.append(preference(*scored, id="scored", images=[ImageRef(data=picture()), ImageRef(data=picture((50, 20)))]))
    listed = preference("green \u00e9\u4e2d\u2603", "is blue", id="listed")
    return [*made, dataclasses.replace(listed, pairs=(ListedPair(1, 0, -0.25),))]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(dataset_module, "BLOCK", 4)


@pytest.fixture
def made(monkeypatch):
    """Ids of the groups whose tokens were made, in order."""
    ids, real = [], Encoder._encode
    monkeypatch.setattr(Encoder, "_encode", lambda self, g, looks: ids.append(g.id) or real(self, g, looks))
    return ids


def bits(data):
    """Everything a dataset gives that is not pixels, as bytes with dtypes and shapes."""
    rows = []
    for each in map(data.text, range(len(data))):
        tensors = (each.prefix_ids, *each.response_ids, *each.weights, each.pairs, each.margin, *each.aligned.values())
        facts = (each.id, each.responses, each.images, list(each.aligned), each.vision)
        rows.append((facts, [(t.dtype, t.shape, t.numpy().tobytes()) for t in tensors]))
    return rows, data.lengths, [(type(bad), str(bad)) for bad in data.dropped], [g.id for g in data.groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_bitwise_those_without_the_disk(encoder, groups, tmp_path, made, family):
    plain = PreferenceDataset(groups, encoder(family, **PAPER))
    made.clear()
    first = PreferenceDataset(groups, encoder(family, **PAPER, looks=tmp_path / "kept"))
    assert set(made) == {group.id for group in groups}
    made.clear()
    second = PreferenceDataset(groups, encoder(family, **PAPER, looks=tmp_path / "kept"))
    assert set(made) == {group.id for group in groups[:CHECKED]}  # those that are compared
    assert bits(first) == bits(second) == bits(plain)
    assert [second.row_hash(i) for i in range(len(second))] == [plain.row_hash(i) for i in range(len(plain))]
    batches = [collate([data[i] for i in range(len(data))]) for data in (plain, second)]
    for field in dataclasses.fields(batches[0]):
        one, two = (getattr(batch, field.name) for batch in batches)
        if isinstance(one, torch.Tensor):
            assert (one.dtype, one.shape, one.numpy().tobytes()) == (two.dtype, two.shape, two.numpy().tobytes())
        elif field.name != "vision":
            assert one == two, field.name
    assert batches[0].vision.keys() == batches[1].vision.keys()
    assert all(torch.equal(value, batches[1].vision[name]) for name, value in batches[0].vision.items())


def changed(**words):
    return lambda group: dataclasses.replace(group, **words)


@pytest.mark.parametrize(
    "change",
    [
        lambda group: preference("yes", "yes", id=group.id, images=group.images),
        lambda group: preference("a", "b", text="what ?", id=group.id, images=group.images),
        changed(pairs=(ListedPair(1, 0),)),
        lambda group: dataclasses.replace(group, responses=tuple(reversed(group.responses))),
        lambda group: dataclasses.replace(
            group, responses=tuple(dataclasses.replace(r, segments=((0, 1),)) for r in group.responses)
        ),
        lambda group: dataclasses.replace(
            group,
            responses=tuple(dataclasses.replace(r, rank=None, score=1.0 - i) for i, r in enumerate(group.responses)),
        ),
    ],
    ids=["response", "prompt", "listed pairs", "order", "segments", "scores"],
)
def test_another_row_is_another_block(encoder, groups, tmp_path, change):
    """A row that changed after the compared ones: nothing but its key could tell."""
    encoders = [encoder(**PAPER, looks=tmp_path / "kept") for _ in range(2)]
    PreferenceDataset(groups, encoders[0])
    other = [*groups[:4], change(groups[4]), *groups[5:]]
    assert bits(PreferenceDataset(other, encoders[1])) == bits(PreferenceDataset(other, encoder(**PAPER)))
    assert len(list((tmp_path / "kept" / "tokens").iterdir())) == 3


def test_a_picture_of_another_size_is_another_block(encoder, groups, picture, tmp_path):
    PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))
    other = [*groups[:4], dataclasses.replace(groups[4], images=(ImageRef(data=picture((112, 28))),)), *groups[5:]]
    again = PreferenceDataset(other, encoder(**PAPER, looks=tmp_path / "kept"))
    assert bits(again) == bits(PreferenceDataset(other, encoder(**PAPER)))


def settings_of(encoder):
    return module._settings(encoder)


def test_everything_that_decides_tokens_is_in_the_key(encoder, tmp_path, processor, tokenizer_maker, monkeypatch):
    base = encoder(**PAPER)
    assert settings_of(base) == settings_of(encoder(**PAPER, max_group_tokens=7))  # asked when it is read
    others = [
        encoder(**{**PAPER, "gamma": 2.0}),
        encoder(),
        encoder(**PAPER, pairs="adjacent"),
        encoder("qwen2_5_vl", **PAPER),
        encoder("llava", **PAPER),
        encoder(template=base.chat.template + " ", **PAPER),
    ]
    for change in (
        lambda made: setattr(made.image_processor, "size", {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}),
        lambda made: made.tokenizer.add_tokens(["two red"]),
        lambda made: setattr(made.tokenizer, "model_input_names", ["input_ids"]),
        lambda made: setattr(made.tokenizer, "split_special_tokens", True),
    ):
        other = copy.deepcopy(processor("qwen2_vl"))
        change(other)
        others.append(Encoder(other, root=tmp_path, **PAPER))
    keys = {json.dumps(settings_of(each)) for each in others}
    monkeypatch.setattr(module.metadata, "version", lambda library: "0.0.1")
    keys.add(json.dumps(settings_of(base)))
    monkeypatch.undo()
    monkeypatch.setattr(module, "_MAKERS", module._MAKERS[1:])
    keys.add(json.dumps(settings_of(base)))
    monkeypatch.undo()
    assert json.dumps(settings_of(base)) not in keys
    assert len(keys) == len(others) + 2


def test_the_hash_of_a_row_is_the_same_with_a_folder(tokenizer_maker, tmp_path):
    """A tokenizer's file may come with padding, which the first call turns off: hashes must not see a call less."""
    group, hashes = preference("yes", "no"), []
    for looks in (None, tmp_path / "kept"):
        tokenizer = tokenizer_maker()
        tokenizer.backend_tokenizer.enable_padding(length=7)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
        hashes.append(PreferenceDataset([group], Encoder(tokenizer, root=tmp_path, looks=looks)).row_hash(0))
    assert hashes[0] == hashes[1]


def rewritten(path, *, signed=False, **arrays):
    """The file with some of its arrays replaced, `about` by what a function makes of it; `signed`: whole even so."""
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    if callable(arrays.get("about")):
        about = arrays["about"](json.loads(kept["about"].tobytes()))
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    kept |= arrays
    about = json.loads(kept["about"].tobytes())
    if signed:
        about["content"] = module._content(about["rows"], kept)
    with open(path, "wb") as file:
        np.savez(file, **{**kept, "about": np.frombuffer(json.dumps(about).encode(), np.uint8)})


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a block"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "ids": lambda path: rewritten(path, ids=np.load(path)["ids"][::-1].copy()),
    "lengths": lambda path: rewritten(
        path, about=lambda about: {**about, "rows": [[at, n + 1, *rest] for at, n, *rest in about["rows"]]}
    ),
    "pickle": lambda path: rewritten(path, ids=np.array([print, None], dtype=object)),
    "dtype": lambda path: rewritten(path, weights=np.zeros(9)),
    "short": lambda path: rewritten(path, signed=True, ids=np.zeros(3, np.int32)),
    "another key": lambda path: rewritten(path, about=lambda about: {**about, "key": "0" * 64}),
    "another position": lambda path: rewritten(
        path, signed=True, about=lambda about: {**about, "rows": [[99, *row[1:]] for row in about["rows"]]}
    ),
    "no rows": lambda path: rewritten(path, about=lambda about: {"key": about["key"]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_about_and_made_again(encoder, groups, tmp_path, caplog, damage):
    first = PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))
    paths = sorted((tmp_path / "kept" / "tokens").iterdir())
    assert len(paths) == 2
    for path in paths:
        DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.kept"):
        again = PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))
    assert [record.message.split(" is damaged (")[0] for record in caplog.records].count(str(paths[0])) == 1
    assert len(caplog.records) == 2
    assert bits(again) == bits(first)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.kept"):
        assert bits(PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))) == bits(first)
    assert not caplog.records


def test_whole_files_with_other_tokens_are_found_out(encoder, groups, tmp_path, caplog):
    """What no key knows, a processor's code for instance: the first groups that are read are made as well."""
    first = PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))
    for path in (tmp_path / "kept" / "tokens").iterdir():
        rewritten(path, signed=True, ids=np.load(path)["ids"][::-1].copy())
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.kept"):
        again = PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "the tokens of group p0 are others now; all are made again"
    ]
    assert bits(again) == bits(first)
    caplog.clear()
    assert bits(PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))) == bits(first)
    assert not caplog.records  # the files are right again


def test_a_folder_that_cannot_be_written_is_told_about_once(encoder, groups, tmp_path, caplog):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "tokens").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.kept"):
        data = PreferenceDataset(groups, encoder(**PAPER, looks=tmp_path / "kept"))
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        f"tokens cannot be kept in {tmp_path / 'kept' / 'tokens'}"
    ]
    assert bits(data) == bits(PreferenceDataset(groups, encoder(**PAPER)))


def test_groups_that_are_left_out_are_left_out_again(encoder, groups, picture, tmp_path):
    bad = [
        preference("a", "b <|im_end|>", id="marked"),
        preference("a", "b", id="cut", images=[ImageRef(data=picture()[:60])]),
        preference("a", "  ", id="empty"),
    ]
    mixed = [*groups[:2], bad[0], *groups[2:6], *bad[1:], *groups[6:]]
    words = {"on_bad_row": "skip", "max_bad_rows": 1.0}
    for limit in (90, 45, 30, 200):  # longer and shorter than what is kept
        for _ in range(2):
            data = PreferenceDataset(mixed, encoder(max_group_tokens=limit, looks=tmp_path / "kept"), **words)
            assert bits(data) == bits(PreferenceDataset(mixed, encoder(max_group_tokens=limit), **words))
    assert data.dropped
    for place in ("0", "1"):  # the first one is named, whichever block is made first
        os.environ.update(RANK=place, WORLD_SIZE="2")
        try:
            with pytest.raises(BadRow, match=r"^marked: response holds"):
                PreferenceDataset(mixed, encoder(looks=tmp_path / "other"))
        finally:
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
    with pytest.raises(TooManyBadRows):
        PreferenceDataset(mixed, encoder(looks=tmp_path / "kept"), on_bad_row="skip", max_bad_rows=0.1)


def test_what_is_not_kept(encoder, groups, picture, tmp_path, made):
    (tmp_path / "clip").mkdir()
    for number in range(2):
        (tmp_path / "clip" / f"{number}.png").write_bytes(picture((40, 30)))
    video = preference("yes", "no", id="video", videos=[VideoRef("clip")])

    class Another(Encoder):
        pass

    folder = tmp_path / "kept"
    PreferenceDataset([video], encoder(looks=folder))
    PreferenceDataset(groups[:5], encoder(looks=folder, measure=False))
    PreferenceDataset(groups, Another(encoder().processor, root=tmp_path, looks=folder))
    assert not (folder / "tokens").exists()
    PreferenceDataset([*groups, video], encoder(looks=folder))
    made.clear()
    PreferenceDataset([*groups, video], encoder(looks=folder))
    assert made.count("video") == 1


def test_each_process_makes_its_own_blocks_first(encoder, groups, tmp_path, made, monkeypatch):
    monkeypatch.setattr(dataset_module, "BLOCK", 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    plain = bits(PreferenceDataset(groups, encoder(**PAPER)))
    made.clear()
    words = {**PAPER, "looks": tmp_path / "kept"}
    assert bits(PreferenceDataset(groups, encoder(**words))) == plain
    names = [group.id for group in groups]
    assert list(dict.fromkeys(made))[:4] == [*names[2:4], *names[6:8]]
    assert set(made) == set(names)
    monkeypatch.setenv("RANK", "0")
    made.clear()
    assert bits(PreferenceDataset(groups, encoder(**words))) == plain
    assert set(made) == {*names[0:2], names[4]}  # the first of its own, which are compared


@pytest.mark.parametrize(
    ("rank", "size", "place"),
    [(None, None, (0, 1)), ("1", "2", (1, 2)), ("2", "2", (0, 1)), ("x", "2", (0, 1)), ("0", "", (0, 1))],
)
def test_the_place_among_processes(monkeypatch, rank, size, place):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert dataset_module._place() == place


def _process(rank, size, groups, encoder, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    try:
        results.put((rank, bits(PreferenceDataset(groups, encoder))))
    except Exception as error:
        results.put((rank, error))
        raise


def test_processes_that_start_together_fill_one_folder(encoder, groups, tmp_path):
    """Three at once, twice: all get the same data, and nothing but whole files is left."""
    plain = bits(PreferenceDataset(groups, encoder(**PAPER)))
    fork = multiprocessing.get_context("fork")
    for _ in range(2):
        results = fork.Queue()
        encoders = [encoder(**PAPER, looks=tmp_path / "kept") for _ in range(3)]
        started = [fork.Process(target=_process, args=(r, 3, groups, encoders[r], results)) for r in range(3)]
        for process in started:
            process.start()
        found = dict(results.get(timeout=120) for _ in started)
        for process in started:
            process.join()
        assert all(found[rank] == plain for rank in range(3))
    assert sorted(file.suffix for file in (tmp_path / "kept" / "tokens").iterdir()) == [".npz", ".npz"]
    assert [file.name for file in (tmp_path / "kept").iterdir() if file.is_file()] == ["pictures.jsonl"]


def test_looks_of_another_process_are_seen_without_another_start(encoder, picture, tmp_path):
    ref, other = ImageRef(data=picture()), ImageRef(data=picture((50, 20)))
    one, two = (encoder(looks=tmp_path / "kept").looks for _ in range(2))
    one(ref)
    two(other)
    one.save()
    two.refresh()
    assert two(ref) == one(ref)
    assert two.decoded == 1
    two.save()  # what it saw itself is not lost
    last = encoder(looks=tmp_path / "kept").looks
    assert [last(each) for each in (ref, other)] == [one(ref), two(other)]
    assert last.decoded == 0
