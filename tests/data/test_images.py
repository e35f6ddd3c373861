"""Pictures from untrusted data: every way they can be broken, hostile or odd (faults D01 to D09)."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from mmrlhf.data import images, media
from mmrlhf.data.images import MissingFile, image_size, open_image, open_video, uniform_indices
from mmrlhf.data.schema import BadRow, ImageRef, VideoRef


@pytest.fixture
def root(tmp_path, picture):
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "ok.png").write_bytes(picture())
    (folder / "sub" / "ok.jpg").write_bytes(picture(format="JPEG"))
    (tmp_path / "secret.png").write_bytes(picture())
    return folder


def put(root, name, data):
    (root / name).write_bytes(data)
    return ImageRef(path=name)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", ["ok.png", "sub/ok.jpg", "./ok.png", "sub/./ok.jpg"])
def test_good_paths_open(root, name):
    image = open_image(ImageRef(path=name), root)
    assert (image.mode, image.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_allowed_format_opens(root, picture, format):
    image = open_image(put(root, "x", picture(format=format)), root)
    assert image.size == (40, 30)
    assert np.abs(np.asarray(image).astype(int)[15, 20] - (200, 30, 30)).max() <= 4
    assert image_size(ImageRef(path="x"), root) == (40, 30)


@pytest.mark.parametrize("cut", [30, 60, 200])
def test_d01_truncated(root, cut):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG", "GIF", "BMP"):
        buffer = io.BytesIO()
        noise.save(buffer, format=format)
        with pytest.raises(BadRow, match=r"broken image|not an image"):
            open_image(put(root, "cut", buffer.getvalue()[:cut]), root)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_d01_empty_and_html(root):
    with pytest.raises(BadRow, match=r"empty \(0 bytes\)"):
        open_image(put(root, "zero.jpg", b""), root)
    with pytest.raises(BadRow, match="not an image in one of JPEG, PNG, WEBP, GIF, BMP"):
        open_image(put(root, "page.jpg", b"<!doctype html><title>404</title>"), root)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_d02_decompression_bomb_is_refused_by_its_header(root):
    before = peak_mib()
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * 2**20))
    with pytest.raises(BadRow, match="too many pixels"):
        open_image(put(root, "bomb.png", png(50_000, 50_000, pixels)), root)
    with pytest.raises(BadRow, match=r"12000x9000 has more than max_pixels = 89478485"):
        open_image(put(root, "large.png", png(12_000, 9_000, pixels)), root)
    with pytest.raises(BadRow, match="40x30 has more than max_pixels = 1000"):
        open_image(ImageRef(path="ok.png"), root, max_pixels=1000)
    assert peak_mib() - before < 100  # decoded, the first alone would take 7 GiB


def test_d02_global_limits_are_left_alone(root):
    before = Image.MAX_IMAGE_PIXELS
    open_image(ImageRef(path="ok.png"), root, max_pixels=10**9)
    assert before == Image.MAX_IMAGE_PIXELS


def test_d03_text_bomb_many_frames_and_deep_tiff(root):
    before = peak_mib()
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 2**28))
    pixels = png_chunk(b"IDAT", zlib.compress((b"\0" + b"\1\2\3" * 4) * 4))
    with pytest.raises(BadRow, match="broken image"):
        open_image(put(root, "text.png", png(4, 4, bomb, bomb, pixels)), root)
    frames = [Image.new("P", (8, 8), i % 250) for i in range(500)]
    frames[0].save(root / "many.gif", save_all=True, append_images=frames[1:])
    assert open_image(ImageRef(path="many.gif"), root).size == (8, 8)  # the first frame, no other is decoded
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)
    with pytest.raises(BadRow, match="not an image"):
        open_image(put(root, "loop.tiff", tiff), root)
    assert peak_mib() - before < 300


def test_d03_too_many_bytes_are_never_read(root):
    with open(root / "sparse.png", "wb") as file:
        file.truncate(2**34)
    with pytest.raises(BadRow, match="has 17179869184 bytes, at most 67108864"):
        open_image(ImageRef(path="sparse.png"), root)
    with pytest.raises(BadRow, match="at most 10 are accepted"):
        open_image(ImageRef(data=b"x" * 11), root, max_bytes=10)


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) run\n",
        b"8BPS\0\1" + b"\0" * 40,
        b"II*\0\x08\0\0\0" + b"\0" * 20,
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%PDF-1.4\n",
        b"P6\n2 2\n255\n" + b"\0" * 12,
    ],
    ids=["eps", "psd", "tiff", "svg", "pdf", "ppm"],
)
def test_d04_disguised_format(root, watch, data):
    ref = put(root, "innocent.png", data)
    with watch, pytest.raises(BadRow, match="not an image in one of"):
        open_image(ref, root)
    assert not watch.commands
    assert not watch.sockets


def test_d05_odd_modes_become_deterministic_rgb(root):
    def roundtrip(image, format="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, format=format, **options)
        got = [open_image(ImageRef(data=buffer.getvalue()), root) for _ in range(2)]
        assert got[0].mode == "RGB"
        assert got[0].tobytes() == got[1].tobytes()
        return np.asarray(got[0]).astype(int)

    assert roundtrip(Image.new("1", (4, 4), 1)).min() == 255
    assert (roundtrip(Image.new("L", (4, 4), 77)) == 77).all()
    assert (roundtrip(Image.new("LA", (4, 4), (0, 0))) == 255).all()  # transparent: white shows
    assert (roundtrip(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))[0, 0] == (255, 127, 127)).all()
    sixteen = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert (roundtrip(sixteen) == 0x80).all()  # scaled, not clipped to white
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 200, 30] + [0] * 762)
    assert (roundtrip(palette)[0, 0] == (10, 200, 30)).all()
    assert (roundtrip(palette, transparency=1)[0, 0] == 255).all()
    cmyk = roundtrip(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(cmyk[4, 4] - (255, 0, 0)).max() <= 6


def test_d05_exif_orientation_is_applied(root):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", exif=exif)
    assert open_image(ImageRef(data=buffer.getvalue()), root).size == (20, 40)


@pytest.mark.parametrize(("size", "fine"), [((1, 1), True), ((1, 200), True), ((1, 10_000), False), ((900, 3), False)])
def test_d06_odd_sizes(root, picture, size, fine):
    ref = ImageRef(data=picture(size))
    if fine:
        assert open_image(ref, root).size == size
    else:
        with pytest.raises(BadRow, match="narrower than 1:200"):
            open_image(ref, root)


ESCAPES = {
    "../secret.png": "climbs out",
    "sub/../../secret.png": "climbs out",
    "..": "climbs out",
    "sub\\..\\..\\secret.png": "climbs out",
    "/etc/passwd": "is absolute",
    "~/secret.png": "is absolute",
    "file:///etc/passwd": "is an address",
    "local://etc/passwd": "is an address",
    "file:/etc/passwd": "is an address",
    "C:\\windows\\win.ini": "names a drive",
    "c:secret.png": "names a drive",
    "\\\\host\\share\\x.png": "is absolute",
    "ok.png\0.jpg": "NUL",
    "": "empty",
    "  ": "empty",
}


@pytest.mark.parametrize("path", ESCAPES)
def test_d07_path_escape(root, watch, path):
    with watch, pytest.raises(BadRow, match=ESCAPES[path]):
        open_image(ImageRef(path=path), root)
    assert not watch.opened
    with pytest.raises(ValueError, match=ESCAPES[path]):
        media.images_of({"image": path})
    with watch, pytest.raises(BadRow, match=ESCAPES[path]):
        open_video(VideoRef(path), root, frames=2)
    assert not watch.opened


def test_d07_symbolic_links_out_are_never_opened(root, watch):
    (root / "link.png").symlink_to(root.parent / "secret.png")
    (root / "linkdir").symlink_to(root.parent)
    (root / "inside.png").symlink_to(root / "sub" / "ok.jpg")
    for path in ("link.png", "linkdir/secret.png"):
        with watch, pytest.raises(BadRow, match="leaves the data root"):
            open_image(ImageRef(path=path), root)
        assert not [p for p in watch.opened if "secret" in p]
    with watch, pytest.raises(BadRow, match="leaves the data root"):
        open_video(VideoRef("linkdir"), root, frames=1)
    assert not watch.opened
    assert open_image(ImageRef(path="inside.png"), root).size == (40, 30)  # a link that stays inside is fine
    loop = root / "loop.png"
    loop.symlink_to(loop)
    with pytest.raises(BadRow):
        open_image(ImageRef(path="loop.png"), root)


@pytest.mark.parametrize("kind", ["link", "other file"])
def test_d07_a_file_swapped_while_it_is_opened_is_refused(root, monkeypatch, picture, kind):
    real_open = os.open

    def swap_then_open(path, flags, *rest):
        if kind == "link":
            os.remove(path)
            os.symlink(root.parent / "secret.png", path)
        else:
            (root / "other.png").write_bytes(picture())
            os.replace(root / "other.png", path)
        return real_open(path, flags, *rest)

    monkeypatch.setattr(images.os, "open", swap_then_open)
    with pytest.raises(BadRow, match="cannot be opened" if kind == "link" else "changed while it was opened"):
        open_image(ImageRef(path="ok.png"), root)


def test_d07_only_the_file_itself_is_opened(root, watch):
    open_image(ImageRef(path="ok.png"), root)  # PIL's plugins are imported by now
    with watch:
        open_image(ImageRef(path="ok.png"), root)
    assert watch.opened == [str(root / "ok.png")]


def test_d08_special_files(root):
    os.mkfifo(root / "pipe.png")
    with pytest.raises(BadRow, match="is a pipe, not a regular file"):  # and does not hang
        open_image(ImageRef(path="pipe.png"), root)
    with pytest.raises(BadRow, match="is a directory, not a regular file"):
        open_image(ImageRef(path="sub"), root)
    with pytest.raises(BadRow, match="is a device, not a regular file"):
        open_image(ImageRef(path="zero"), "/dev")
    with pytest.raises(MissingFile, match=r"'nothing.png' is not in"):
        open_image(ImageRef(path="nothing.png"), root)
    with pytest.raises(MissingFile):
        open_image(ImageRef(path="ok.png/x"), root)
    if os.geteuid() != 0:
        (root / "ok.png").chmod(0)
        with pytest.raises(BadRow, match="cannot be opened: Permission denied"):
            open_image(ImageRef(path="ok.png"), root)


def test_d08_unreadable(root, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.os, "open", refuse)
    with pytest.raises(BadRow, match="cannot be opened: Permission denied"):
        open_image(ImageRef(path="ok.png"), root)


@pytest.mark.parametrize(
    "address",
    ["http://example.com/x.png", "https://x/y.png", "http://169.254.169.254/latest/meta-data", "ftp://x/y", "s3://b/k"],
)
def test_d09_remote_url_opens_no_socket(root, watch, address):
    with watch:
        with pytest.raises(BadRow, match="is an address; nothing is fetched"):
            open_image(ImageRef(path=address), root)
        with pytest.raises(ValueError, match="is an address; nothing is fetched"):
            media.images_of({"images": [address]})
    assert not watch.sockets
    assert not watch.opened


def test_d09_data_addresses_are_capped(root, picture):
    import base64

    good = "data:image/png;base64," + base64.b64encode(picture()).decode()
    (ref,) = media.images_of({"image": good})
    assert open_image(ref, root).size == (40, 30)
    with pytest.raises(ValueError, match="at most 100 are accepted"):
        images.decode_data_uri(good, max_chars=100)
    for bad in ("data:text/html;base64,AAAA", "data:image/png,plain", "data:"):
        with pytest.raises(ValueError, match="must be data:image"):
            media.images_of({"image": bad})
    with pytest.raises(ValueError, match="not base64"):
        media.images_of({"image": "data:image/png;base64,@@@@"})


def test_video_directory_in_natural_order(root, picture):
    (root / "clip").mkdir()
    for number in range(12):
        (root / "clip" / f"frame_{number}.png").write_bytes(picture((8, 8), (number * 20, 0, 0)))
    (root / "clip" / "notes.txt").write_text("no frame")
    (root / "clip" / ".hidden.png").write_bytes(b"")
    got = [np.asarray(f)[0, 0, 0] // 20 for f in open_video(VideoRef("clip"), root, frames=4)]
    assert got == [0, 4, 7, 11]
    assert len(open_video(VideoRef("clip"), root, frames=50)) == 12
    (root / "empty").mkdir()
    with pytest.raises(BadRow, match="holds no frames"):
        open_video(VideoRef("empty"), root, frames=2)
    with pytest.raises(MissingFile):
        open_video(VideoRef("absent"), root, frames=2)
    with pytest.raises(ValueError, match="frames must be positive, got 0"):
        open_video(VideoRef("clip"), root, frames=0)


def test_uniform_indices_cover_both_ends():
    assert uniform_indices(3, 8) == [0, 1, 2]
    assert uniform_indices(100, 1) == [50]
    assert uniform_indices(100, 5) == [0, 25, 50, 74, 99]
    for count in range(1, 60):
        for frames in range(1, 20):
            picked = uniform_indices(count, frames)
            assert len(picked) == len(set(picked)) == min(count, frames)
            assert picked == sorted(picked)
            assert picked[-1] < count


def write_video(path, frames=20, size=(64, 48), codec="mpeg4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            grey = np.full((size[1], size[0], 3), number * 12, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_video_file(root, watch, name):
    write_video(root / name)
    with watch:
        frames = open_video(VideoRef(name), root, frames=5)
    assert [f.size for f in frames] == [(64, 48)] * 5
    grey = [int(np.asarray(f).mean()) for f in frames]
    assert grey == sorted(grey)
    assert grey[0] < 10
    assert abs(grey[-1] - 19 * 12) < 12
    assert not watch.sockets
    with pytest.raises(BadRow, match="frames of 64x48"):
        open_video(VideoRef(name), root, frames=5, max_pixels=100)


def test_video_playlists_and_broken_files_are_refused(root, watch):
    pytest.importorskip("av")
    for name, data in {
        "list.mp4": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 169.254.169.254\n",
    }.items():
        (root / name).write_bytes(data)
        with watch, pytest.raises(BadRow, match="not an MP4, Matroska/WebM or AVI file"):
            open_video(VideoRef(name), root, frames=2)
        assert not watch.sockets
    write_video(root / "good.mp4")
    whole = (root / "good.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(BadRow, match=r"broken video|no frames|no video stream"):
        open_video(VideoRef("cut.mp4"), root, frames=2)


def test_video_without_pyav_names_the_extra(root, monkeypatch):
    import sys

    (root / "x.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 40)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'mmrlhf\[video\]'"):
        open_video(VideoRef("x.mp4"), root, frames=2)


def test_pil_image_of_a_datasets_row(root):
    (ref,) = media.images_of({"image": Image.new("RGB", (5, 4), (1, 2, 3))})
    assert open_image(ref, root).getpixel((2, 2)) == (1, 2, 3)
