"""Images that come inside the data: taken as they are stored where they can be, and not held in memory."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from mmrlhf.data import media, readers
from mmrlhf.data.check import check
from mmrlhf.data.collate import PreferenceDataset
from mmrlhf.data.images import container_of, open_image, to_rgb
from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import ImageRef
from mmrlhf.data.spool import Spool
from mmrlhf.data.writers import unpack_images, write_ranked
from mmrlhf.integrations.rows import to_group, undecoded
from records import parquet, rlhf_v_row


def photo(seed, size=(48, 36)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def pixels(ref, root="."):
    return np.asarray(open_image(ref, root))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "I;16", "CMYK"])
def test_a_pil_image_keeps_its_pixels_and_costs_no_compression(mode):
    image = photo(1) if mode == "RGB" else Image.new(mode, (31, 17), 1)
    ref = media.image_ref(image)
    assert container_of(ref.data) == "bmp"  # 15 times faster than PNG to write
    assert np.array_equal(pixels(ref), np.asarray(to_rgb(image)))
    assert media.image_ref(image.copy()).identity == ref.identity
    assert media.image_ref(photo(2)).identity != ref.identity


def test_a_pil_image_too_large_for_bmp_is_compressed(monkeypatch):
    image = Image.new("RGB", (100, 100))
    monkeypatch.setattr("mmrlhf.data.images.MAX_BYTES", 20_000)
    assert container_of(media.image_ref(image).data) == "png"
    assert np.array_equal(pixels(media.image_ref(image)), np.asarray(image))


def table(**columns):
    datasets = pytest.importorskip("datasets")
    count = len(next(iter(columns.values())))
    names = {name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")}
    kinds = {
        name: datasets.Image() if name == "image" else datasets.List(datasets.Image())
        for name in columns
        if name in ("image", "images")
    }
    texts = {name: [f"{name} {i}" for i in range(count)] for name in names}
    return datasets.Dataset.from_dict({**texts, **columns}, features=datasets.Features({**names, **kinds}))


def test_a_data_set_s_images_are_read_as_they_are_stored():
    stored = [encoded(photo(i)) for i in range(3)]
    cells = [{"bytes": data, "path": None} for data in stored]
    for data in (table(image=cells), table(images=[[cell, cells[0]] for cell in cells])):
        groups = read_groups(data).groups
        assert [group.images[0].data for group in groups] == stored
        assert [group.prompt[0].content[-1].text for group in groups] == [f"prompt {i}" for i in range(3)]
        order = [2, 0, 1]
        shuffled = read_groups(data.select(order)).groups
        assert [group.images[0].data for group in shuffled] == [stored[i] for i in order]


def test_what_is_not_stored_as_readable_bytes_is_decoded_by_the_data_set(tmp_path):
    photo(0).save(tmp_path / "file.png")
    cells = [
        {"bytes": encoded(photo(1), "TIFF"), "path": None},  # a format that is not opened from untrusted data
        {"bytes": None, "path": str(tmp_path / "file.png")},  # a path outside of any data root
        {"bytes": encoded(photo(2)), "path": "x.jpg"},
    ]
    groups = read_groups(table(image=cells)).groups
    assert [container_of(group.images[0].data) for group in groups] == ["bmp", "bmp", "jpeg"]
    assert np.array_equal(pixels(groups[0].images[0]), np.asarray(photo(1)))
    assert np.array_equal(pixels(groups[1].images[0]), np.asarray(photo(0)))
    own = table(image=cells).with_transform(lambda rows: {**rows, "image": [photo(7)] * len(rows["image"])})
    assert np.array_equal(pixels(read_groups(own).groups[0].images[0]), np.asarray(photo(7)))


def test_a_trainer_s_data_set_undecoded_gives_the_same_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    cells = [{"bytes": encoded(photo(i), exif=exif), "path": None} for i in range(4)]
    for data in (table(image=cells), table(images=[[cell] * (i % 3) for i, cell in enumerate(cells)])):
        for given in (data, data.shuffle(seed=1), data.select([3, 1])):
            plain = undecoded(given)
            assert len(plain) == len(given)
            for decoded, stored in zip(given, plain, strict=True):
                left, right = to_group(decoded), to_group(stored)
                assert left.prompt == right.prompt
                for a, b in zip(left.images, right.images, strict=True):
                    assert container_of(b.data) == "jpeg"
                    assert np.array_equal(pixels(a), pixels(b))
    kept = table(image=cells).with_format("numpy", columns=["prompt", "image"])
    assert undecoded(kept).format["columns"] == kept.format["columns"]
    assert undecoded(kept).format["type"] == "numpy"


def test_a_trainer_s_data_set_that_must_be_decoded_stays_as_it_is(tmp_path):
    datasets = pytest.importorskip("datasets")
    photo(0).save(tmp_path / "file.png")
    sound = {"bytes": encoded(photo(1)), "path": None}
    for cells in (
        [sound, {"bytes": None, "path": str(tmp_path / "file.png")}],
        [sound, {"bytes": encoded(photo(1), "TIFF"), "path": None}],
    ):
        data = table(image=cells)
        assert undecoded(data) is data
    grey = table(image=[sound]).cast_column("image", datasets.Image(mode="L"))
    assert undecoded(grey) is grey
    own = table(image=[sound]).with_transform(lambda rows: rows)
    assert undecoded(own) is own
    text = table(image=[sound]).remove_columns("image")
    assert undecoded(text) is text
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert undecoded(rows) is rows


def test_images_of_a_large_file_leave_memory(tmp_path, picture, encoder, monkeypatch):
    """The same groups, ids, tokens, pixels and hashes, whether images are held or lie in the temporary file."""
    rows = [rlhf_v_row(picture, i, color=(i // 2, 0, 0), chosen=f"A cat {i}.") for i in range(6)]
    path = parquet(tmp_path / "x.parquet", rows)
    held = read_groups(path)
    assert all(ref.data is not None for group in held.groups for ref in group.images)
    sizes = [len(data) for data in dict.fromkeys(group.images[0].data for group in held.groups)]
    for limit, in_memory in ((0, 0), (sizes[0], 1), (sizes[0] + sizes[1], 2)):
        monkeypatch.setattr(readers, "IN_MEMORY", limit)
        spooled = read_groups(path)
        refs = [ref for group in spooled.groups for ref in group.images]
        assert len({id(ref) for ref in refs}) == 3  # equal images once
        assert len({ref.identity for ref in refs if ref.data is not None}) == in_memory
        for before, after in zip(held.groups, spooled.groups, strict=True):
            assert (before.id, before.responses, before.prompt) == (after.id, after.responses, after.prompt)
            assert before.images[0].embedded() == after.images[0].embedded()
            assert before.images[0].identity == after.images[0].identity
        left, right = PreferenceDataset(held.groups, encoder()), PreferenceDataset(spooled.groups, encoder())
        for index in range(len(left)):
            assert left.row_hash(index) == right.row_hash(index)
            assert np.array_equal(left[index].vision["pixel_values"], right[index].vision["pixel_values"])
    report = check(path)
    assert (report.images, report.status) == (3, 0)
    out = unpack_images(spooled.groups, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted({ref.path for group in out for ref in group.images})
    write_ranked(spooled.groups, tmp_path / "ranked.jsonl")
    again = read_groups(tmp_path / "ranked.jsonl").groups
    assert [g.images[0].embedded() for g in again] == [g.images[0].embedded() for g in held.groups]


def test_the_temporary_file_has_no_name_and_serves_forked_readers(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool()
    parts = [bytes([i]) * (1000 + i) for i in range(20)]
    stored = [spool.add(part) for part in parts]
    assert os.listdir(tmp_path) == []
    assert [each.read() for each in reversed(stored)] == parts[::-1]
    assert stored[0] == Spool().add(parts[0])
    assert hash(stored[0]) == hash(Spool().add(parts[0]))
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            os._exit(0 if [each.read() for each in stored] == parts else 1)
        assert [each.read() for each in stored] == parts
        assert os.waitpid(child, 0)[1] == 0


def test_a_full_disk_names_the_folder(monkeypatch):
    spool = Spool()
    spool.add(b"abc")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmrlhf.data.spool.os.pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device after 3 bytes .*; set TMPDIR to a disk with room"):
        spool.add(b"more")


def test_a_ref_is_one_thing():
    with pytest.raises(ValueError, match="exactly one of path, data and stored"):
        ImageRef()
    with pytest.raises(ValueError, match="exactly one of path, data and stored"):
        ImageRef(path="a.png", data=b"x")
