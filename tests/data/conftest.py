"""Tiny processors built offline (byte-level BPE, PIL image processors), picture makers, and a watch on file access."""

from __future__ import annotations

import functools
import io
import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CORPUS = [
    "a photo of a cat and a dog on the mat , the cat is red and the dog is blue .",
    "what is in the image ? answer the question . how many cats are there ?",
    "there are two cats and three dogs . red green blue square circle triangle",
    "user assistant system : \n",
]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3")


def make_tokenizer(specials=(), *, named=None, bos=None, pad="<|pad|>", eos="<|im_end|>", merges=320):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = [t for t in (pad, eos, "<|im_start|>", bos, *specials) if t]
    tokens = list(dict.fromkeys(tokens))
    trainer = trainers.BpeTrainer(
        vocab_size=merges + len(tokens),
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    others = [t for t in tokens if t not in (pad, eos, bos)]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        additional_special_tokens=others,
        extra_special_tokens=named or {},
    )


def chatml(image):
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'video' %}"
        "<video>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def stub_video(**attributes):
    """What stands in for a video processor where torchvision, which real ones need, is absent."""
    from transformers import processing_utils
    from transformers.video_processing_utils import VideoProcessorMixin

    processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin  # the constructor's type check

    class Stub(VideoProcessorMixin):
        valid_kwargs = VideoProcessorMixin.valid_kwargs

        def __init__(self, **kwargs):
            for key, value in kwargs.items():
                setattr(self, key, value)

    return Stub(**attributes)


@functools.cache
def build_processor(family, template=None):
    import transformers as T

    square = {"height": 28, "width": 28}
    video = None
    if family in ("qwen2_vl", "qwen2_5_vl"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = make_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
        size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56 * 4}
        images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2, size=size)
        kind = {"qwen2_vl": T.Qwen2VLProcessor, "qwen2_5_vl": T.Qwen2_5_VLProcessor}[family]
        extra, mark = {}, "<|vision_start|><|image_pad|><|vision_end|>"
        video = {"merge_size": 2, "temporal_patch_size": 2, "patch_size": 14}
    elif family in ("llava", "llava_next"):
        tokenizer = make_tokenizer(["<image>"], bos="<s>")
        extra = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        mark = "<image>\n"
        if family == "llava":
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            images, kind = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square), T.LlavaProcessor
        else:
            from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

            pins = [[28, 56], [56, 28], [56, 56]]
            images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=pins)
            kind = T.LlavaNextProcessor
    elif family == "llava_onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        tokenizer = make_tokenizer(["<image>", "<video>"])
        pins = [[28, 28], [28, 56], [56, 28], [56, 56]]
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pins)
        kind, mark = T.LlavaOnevisionProcessor, "<image>\n"
        extra = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        video = {"num_frames": 4}
    elif family == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        named = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        tokenizer = make_tokenizer(list(named.values()), named=named)
        images = GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, min_patches=1, max_patches=4)
        kind, mark, extra = T.InternVLProcessor, "<IMG_CONTEXT>\n", {"image_seq_length": 4}
        video = {"num_frames": 4}
    elif family == "idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
        marks += [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
        tokenizer = make_tokenizer(marks)
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
        )
        kind, mark, extra = T.Idefics3Processor, "<image>", {"image_seq_len": 4}
    else:
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        tokenizer = make_tokenizer(list(named.values()), named=named, pad="<pad>", bos="<bos>")
        images = Gemma3ImageProcessorPil(size=square, do_pan_and_scan=False)
        kind, mark, extra = T.Gemma3Processor, "<start_of_image>", {"image_seq_length": 4}
    if video is not None:
        extra = {**extra, "video_processor": stub_video(**video)}
    return kind(image_processor=images, tokenizer=tokenizer, chat_template=template or chatml(mark), **extra)


@pytest.fixture
def processor():
    """processor("qwen2_vl") -> a tiny processor of that family."""
    return build_processor


@pytest.fixture
def encoder(tmp_path):
    """encoder(family, template, **settings) -> an Encoder over `tmp_path`."""
    from mmrlhf.data.encode import Encoder

    def make(family="qwen2_vl", template=None, **settings):
        return Encoder(build_processor(family, template), root=tmp_path, **settings)

    return make


@pytest.fixture
def image():
    from mmrlhf.data.schema import ImageRef

    return ImageRef(data=picture_bytes())


@pytest.fixture
def tokenizer_maker():
    """tokenizer_maker(specials, named=…, bos=…, eos=…) -> a tiny byte-level BPE."""
    return make_tokenizer


def picture_bytes(size=(40, 30), color=(200, 30, 30), format="PNG", mode="RGB"):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format=format)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return picture_bytes


class Watch:
    """What the process opened and connected to while the watch was on (a Python audit hook cannot be removed)."""

    def __init__(self):
        self.on = False
        self.opened: list[str] = []
        self.sockets: list[str] = []
        self.commands: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if not self.on:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            self.opened.append(os.fsdecode(args[0]))
        elif event.startswith("socket.") and event != "socket.__new__":
            self.sockets.append(event)
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.commands.append(event)

    def __enter__(self):
        self.on, self.opened, self.sockets, self.commands = True, [], [], []
        return self

    def __exit__(self, *_):
        self.on = False


@functools.cache
def _the_watch():
    return Watch()


@pytest.fixture
def watch():
    """`with watch: …` records opened files, socket events and started commands."""
    return _the_watch()
