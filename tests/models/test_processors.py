"""Processors without torchvision, with a broken one, and the video stand-in."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrlhf.models import load, processors, shared_prefix, vision
from tiny import read_json, tiny_folder, tiny_image, tiny_model

WITHOUT = importlib.util.find_spec("torchvision") is None
needs_no_torchvision = pytest.mark.skipif(not WITHOUT, reason="torchvision is installed here")
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")


@pytest.mark.parametrize("target", ["load_processor", "load_model"])
def test_broken_torchvision_is_reported_as_that(tmp_path, target):
    """A torchvision built for another torch fails at import; the user must hear so, and how to cure it."""
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        f"from mmrlhf.models import load\n"
        f"try: load.{target}({str(tmp_path)!r})\n"
        "except RuntimeError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "torchvision is installed but broken" in done.stdout
    assert "operator torchvision::nms does not exist" in done.stdout
    assert f"matches torch {torch.__version__}" in done.stdout


@needs_no_torchvision
@pytest.mark.parametrize("family", VIDEO)
def test_video_settings_survive_saving(family, tmp_path):
    """What the folder said about videos is written back, for machines that have torchvision."""
    folder = tiny_folder(family, tmp_path / "a")
    processor = load.load_processor(folder)
    processor.save_pretrained(tmp_path / "b")
    before, after = (read_json(path / "processor_config.json") for path in (folder, tmp_path / "b"))
    assert before["video_processor"] == after["video_processor"]
    assert after["video_processor"]["video_processor_type"].endswith("VideoProcessor")
    assert processors.image_backend(processor) == "pil"


@needs_no_torchvision
def test_folders_of_older_transformers(tmp_path):
    """Before 5: preprocessor_config.json and video_preprocessor_config.json, fast class names."""
    import json

    folder = tiny_folder("qwen2_5_vl", tmp_path)
    config = read_json(folder / "processor_config.json")
    image = config.pop("image_processor") | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image | {"processor_class": "Qwen2_5_VLProcessor"}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(config.pop("video_processor")))
    (folder / "processor_config.json").unlink()
    processor = load.load_processor(folder)
    assert processor.image_processor.patch_size == 14
    assert processor.image_processor.size["longest_edge"] == 4 * 28 * 28
    assert processor.video_processor.to_dict()["video_processor_type"] == "Qwen2VLVideoProcessor"


@needs_no_torchvision
@pytest.mark.parametrize(("family", "name"), [("idefics3", "Idefics3"), ("smolvlm", "SmolVLM")])
def test_a_pil_image_processor_that_transformers_hides(family, name, tmp_path, monkeypatch):
    """Before 5.18 a placeholder stands for these PIL classes without torchvision, and AutoProcessor finds none."""
    import transformers
    from transformers.utils.import_utils import DummyObject

    folder, name = tiny_folder(family, tmp_path), f"{name}ImageProcessorPil"
    package = f"transformers.models.{family}"
    # The PIL name last: reading the other one, as setattr does first, may put the real class back under it.
    for hides, where in ((name.removesuffix("Pil"), ""), (name, "pil_")):
        space = {"_backends": ("torchvision",), "__module__": f"{package}.image_processing_{where}{family}"}
        for module in (transformers, sys.modules[package]):
            monkeypatch.setattr(module, hides, DummyObject(hides, (), space), raising=False)
    images = load.load_processor(folder).image_processor
    assert type(images).__name__ == name
    saved = read_json(folder / "processor_config.json")["image_processor"]
    assert images.size == saved["size"]
    assert images.max_image_size == saved["max_image_size"]


@needs_no_torchvision
def test_nothing_of_transformers_stays_patched(tmp_path):
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.processing_utils import transformers_module

    before = dict(vars(transformers_module)), processing_smolvlm.num2words
    load.load_processor(tiny_folder("smolvlm", tmp_path))
    for name in ("VideoProcessorMixin", "BaseVideoProcessor"):
        assert vars(transformers_module).get(name) is before[0].get(name)
    assert processing_smolvlm.num2words is before[1]


def video_inputs(family: str, frames: list, *, count: int = 1):
    model, processor = tiny_model(family)
    content = [*[{"type": "video"}] * count, {"type": "text", "text": "what is it ?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return model, processor(text=[text], videos=[frames] * count, return_tensors="pt")


@needs_no_torchvision
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_frames_become_video_features(family):
    """Frames through the PIL stand-in: as many placeholder tokens as features, and a shared prefix over them."""
    frames = [tiny_image(56, 56, seed=seed) for seed in range(3)]
    model, out = video_inputs(family, frames)
    inputs = {k: torch.as_tensor(out[k]) for k in out if "video" in k and "metadata" not in k}
    if "second_per_grid_ts" in out:
        inputs["second_per_grid_ts"] = torch.as_tensor(out["second_per_grid_ts"])
    prefix = out["input_ids"][0].tolist()
    from tiny import TinyGroup, batch_of

    groups = [TinyGroup(prefix, [[40, 41, 42], [50]], inputs, [0] * len(prefix), 1)]
    batch = batch_of(groups)
    features = vision.encode(model, batch)
    assert features.image is None
    assert features.video is not None
    assert shared_prefix.self_check(model, batch).max_error < 1e-5


@needs_no_torchvision
def test_llava_onevision_videos_of_older_transformers(monkeypatch):
    """Before 5.18 get_video_features named its pixels otherwise, and forward added the newline after each video."""
    model, out = video_inputs("llava_onevision", [tiny_image(56, 56, seed=seed) for seed in range(3)], count=2)
    inner, ids = shared_prefix.inner_model(model), torch.as_tensor(out["input_ids"])
    pixels = torch.as_tensor(out["pixel_values_videos"])
    with torch.no_grad():
        want = inner(input_ids=ids, pixel_values_videos=pixels).last_hidden_state
    newer = inner.get_video_features

    def older(pixel_values, **kwargs):
        output = newer(pixel_values_videos=pixel_values, **kwargs)
        output.pooler_output = output.pooler_output[:, :-1]
        return output

    if "pixel_values_videos" in inspect.signature(newer).parameters:
        monkeypatch.setattr(inner, "get_video_features", older)
    from tiny import TinyGroup, batch_of

    prefix = ids[0].tolist()
    batch = batch_of([TinyGroup(prefix, [[40]], {"pixel_values_videos": pixels}, [0] * len(prefix), 1)])
    features = vision.encode(model, batch)
    module, inputs = vision.decoder_inputs(model, ids, features)
    with torch.no_grad():
        got = module(**inputs).last_hidden_state
    torch.testing.assert_close(got, want)


@needs_no_torchvision
def test_qwen_still_frames_equal_the_image():
    """Two equal frames are one temporal patch with the pixels of the image."""
    frame = tiny_image(56, 56)
    _, out = video_inputs("qwen2_5_vl", [frame, frame])
    _, processor = tiny_model("qwen2_5_vl")
    # A video's pixel budget is shared by its frames, so the image gets half of it here.
    size = {"shortest_edge": 28 * 28 // 2, "longest_edge": 2 * 28 * 28}
    image = processor.image_processor(images=[frame], size=size, return_tensors="pt")
    assert torch.equal(out["pixel_values_videos"], image["pixel_values"])
    assert torch.equal(out["video_grid_thw"], image["image_grid_thw"])


@needs_no_torchvision
def test_frames_keep_their_order_inside_a_patch():
    """Slot j of a Qwen patch holds frame j: black then white, and the odd last frame repeated."""
    from PIL import Image

    frames = [Image.new("RGB", (56, 56), color) for color in ("black", "white", "black")]
    _, out = video_inputs("qwen2_vl", frames)
    pixels = out["pixel_values_videos"].unflatten(1, (3, 2, -1))
    time, height, width = out["video_grid_thw"][0].tolist()
    assert time == 2
    first, second = pixels.split(height * width)
    assert (first[:, :, 0] < 0).all()
    assert (first[:, :, 1] > 0).all()
    assert (second < 0).all()


@needs_no_torchvision
@pytest.mark.parametrize(
    ("family", "video", "message"),
    [
        ("internvl", None, r"videos need torchvision for this model \(InternVLVideoProcessor\)"),
        ("qwen2_vl", [], "video 0 must be a non-empty list of PIL frames"),
        ("qwen2_vl", ["clip.mp4"], "video 0 must be a non-empty list of PIL frames"),
        ("qwen2_vl", "sizes", "video 0 has frames of different sizes"),
    ],
)
def test_videos_that_cannot_be_done(family, video, message):
    _, processor = tiny_model(family)
    if video is None:
        video = [tiny_image()]
    elif video == "sizes":
        video = [tiny_image(28, 28), tiny_image(56, 28)]
    with pytest.raises(ValueError, match=message):
        processor.video_processor([video])
