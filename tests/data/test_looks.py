"""Looks at pictures: the verdict and the size that decoding gives, kept between runs, never past a change."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os

import pytest
from PIL import Image

from mmrlhf.data import looks as module
from mmrlhf.data.images import open_image, upright_size
from mmrlhf.data.looks import Looks
from mmrlhf.data.schema import BadRow, ImageRef
from records import preference


@pytest.fixture
def later(monkeypatch):
    """A clock that says that all files were written a minute ago."""
    now = module.time.time
    monkeypatch.setattr(module.time, "time", lambda: now() + 60)


def saved(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_that_of_the_upright_picture(tmp_path, format, orientation):
    data = saved(Image.radial_gradient("L").resize((61, 37)).convert("RGB"), format, exif=turned(orientation))
    assert upright_size(data, "x") == open_image(ImageRef(data=data), tmp_path).size


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (33, 8), (100, 1)])
def test_every_mode(tmp_path, mode, size):
    format = "JPEG" if mode in ("L", "RGB", "CMYK") else "PNG"
    data = saved(Image.new(mode, size), format)
    assert upright_size(data, "x") == open_image(ImageRef(data=data), tmp_path).size == size


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_cut_picture_gets_the_verdict_of_decoding(tmp_path, format):
    """Wherever a file is cut, a look says what `open_image` says, word for word: a JPEG is decoded at an eighth."""
    whole = saved(Image.effect_noise((64, 48), 60).convert("RGB"), format)
    verdicts = set()
    for length in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1, len(whole)]:
        found = []
        for look in (Looks(tmp_path), lambda ref: open_image(ref, tmp_path)):
            try:
                look(ImageRef(data=whole[:length]))
                found.append("")
            except BadRow as error:
                found.append(error.reason)
        assert found[0] == found[1]
        verdicts.add(found[0])
    assert "" in verdicts
    assert len(verdicts) > 1


def test_looks_are_kept_and_a_changed_file_is_looked_at_again(tmp_path, picture, later):
    (tmp_path / "a.png").write_bytes(picture((40, 30)))
    refs = [ImageRef(path="a.png"), ImageRef(data=picture((50, 20)))]
    first = Looks(tmp_path, folder=tmp_path / "kept")
    seen = [first(ref) for ref in refs]
    assert [(look.width, look.height) for look in seen] == [(40, 30), (50, 20)]
    assert seen[0].digest == hashlib.sha256(picture((40, 30))).digest() == first.digest(refs[0])
    assert first.decoded == 2
    first.save()
    again = Looks(tmp_path, folder=tmp_path / "kept")
    assert [again(ref) for ref in refs] == seen
    assert again.decoded == 0
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["pictures.jsonl"]
    (tmp_path / "a.png").write_bytes(picture((40, 30), (9, 9, 9)))
    os.utime(tmp_path / "a.png", ns=(1, 1))
    other = again(refs[0])
    assert again.decoded == 1
    assert other.digest != seen[0].digest
    assert again.digest(refs[0]) == other.digest


def test_a_file_that_changed_just_now_is_not_kept(tmp_path, picture):
    """It may change again within the granularity of its time stamp, and nothing would tell."""
    (tmp_path / "a.png").write_bytes(picture())
    looks = Looks(tmp_path, folder=tmp_path / "kept")
    assert looks(ImageRef(path="a.png")) == looks(ImageRef(path="a.png"))
    assert looks.decoded == 2
    looks.save()
    assert not (tmp_path / "kept").exists()


def test_a_known_picture_meets_the_limits_of_this_run(tmp_path, picture, later):
    (tmp_path / "a.png").write_bytes(picture((40, 30)))
    looks = Looks(tmp_path, folder=tmp_path)
    looks(ImageRef(path="a.png"))
    looks.save()
    small = Looks(tmp_path, folder=tmp_path, max_pixels=1000)
    with pytest.raises(BadRow, match="40x30 has more than max_pixels = 1000"):
        small(ImageRef(path="a.png"), "row 7")
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRow, match=r"'a\.png' is not in"):
        Looks(tmp_path, folder=tmp_path)(ImageRef(path="a.png"))


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", True), ('["x", 1]', True), ('["x", 1, 2, "zz"]', True), ('["x", "a", 2, "00"]', True), (None, False)],
)
def test_a_damaged_or_older_file_is_left_aside(tmp_path, picture, later, caplog, line, told):
    (tmp_path / "a.png").write_bytes(picture())
    looks = Looks(tmp_path, folder=tmp_path)
    looks(ImageRef(path="a.png"))
    looks.save()
    file = tmp_path / "pictures.jsonl"
    header = json.dumps({"pillow": "0.1", "version": "1"}) + "\n"
    file.write_text(file.read_text() + line if line else header + file.read_text().partition("\n")[2])
    with caplog.at_level(logging.WARNING, logger="mmrlhf.data.looks"):
        again = Looks(tmp_path, folder=tmp_path)
    assert ("is damaged" in caplog.text) == told
    again(ImageRef(path="a.png"))
    assert again.decoded == 1


def test_a_folder_that_cannot_be_written_is_told_about(tmp_path, picture, later, caplog):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "kept").write_text("in the way")
    looks = Looks(tmp_path, folder=tmp_path / "kept")
    looks(ImageRef(path="a.png"))
    looks.save()
    assert "what is known of the pictures cannot be kept" in caplog.text


def test_two_processes_add_to_one_file(tmp_path, picture, later):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture((40, 30 + ord(name[0]))))
    one, two = (Looks(tmp_path, folder=tmp_path) for _ in range(2))
    one(ImageRef(path="a.png"))
    two(ImageRef(path="b.png"))
    one.save()
    two.save()
    both = Looks(tmp_path, folder=tmp_path)
    assert both(ImageRef(path="a.png")) == one(ImageRef(path="a.png"))
    assert both(ImageRef(path="b.png")) == two(ImageRef(path="b.png"))
    assert both.decoded == 0


def test_hashes_of_known_pictures_read_nothing(encoder, picture, tmp_path, later, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture())
    group = preference("yes", "no", images=[ImageRef(path="a.png")])
    first = encoder(looks=tmp_path / "kept")
    plain = first.row_hash(group), first.vision_hash(group)
    first.measure(group)
    monkeypatch.setattr(module, "read_all", None)
    assert (first.row_hash(group), first.vision_hash(group)) == plain
