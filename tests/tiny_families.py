"""How each tiny model of `tiny` is built: config, model class, tokenizer and processor that agree with one another.

What must agree: token ids in config and tokenizer, vocab_size and len(tokenizer), pad/eos/bos in both configs, patch
and merge sizes, tokens an image in processor and config, pinpoints in both. Everything is made here, offline.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

_CORPUS = (
    "a photo of a cat and a dog on the mat",
    "what is in the image ? answer the question .",
    "red green blue square circle",
    "user assistant system : \n",
)
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_EDGES = (("start", "begin"), ("end", "end"))
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type']=='image' %}IMAGE{% elif c['type']=='video' %}VIDEO"
    "{% elif c['type']=='text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def _tokenizer_json(specials: tuple[str, ...], size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(specials),
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def _tokenizer(extra: Sequence[str], *, named: dict[str, str] | None = None, pad="<|pad|>", bos=None):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    eos = "<|im_end|>"
    specials = tuple(dict.fromkeys([pad, eos, "<|im_start|>", *([bos] if bos else []), *extra]))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(specials, 320)),
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        additional_special_tokens=[token for token in specials if token not in (pad, eos, bos)],
        extra_special_tokens=named or {},
        padding_side="left",
    )


def build(family: str):
    """(config, model class, processor) of a family."""
    builders = {
        "llava": _llava,
        "llava_next": _llava,
        "llava_onevision": _llava_onevision,
        "qwen2_vl": _qwen,
        "qwen2_5_vl": _qwen,
        "qwen3_vl": _qwen,
        "internvl": _internvl,
        "idefics3": _idefics,
        "smolvlm": _idefics,
        "gemma3": _gemma3,
        "mistral3": _pixtral,
        "pixtral": _pixtral,
        "glm4v": _glm4v,
    }
    if family not in builders:
        raise ValueError(f"family must be one of {', '.join(builders)}, got {family!r}")
    config, model_class, processor_class, image_marker, parts = builders[family](family)
    tokenizer = parts["tokenizer"]
    for part in (config, config.text_config):
        part.pad_token_id = tokenizer.pad_token_id
        part.eos_token_id = tokenizer.eos_token_id
        part.bos_token_id = tokenizer.bos_token_id
    template = _TEMPLATE.replace("IMAGE", image_marker).replace("VIDEO", parts.pop("video_marker", "<video>"))
    video = parts.pop("video", None)
    if video is not None:
        from mmrlhf.models.processors import build_video_processor

        parts["video_processor"] = build_video_processor(video, parts["image_processor"])
    from mmrlhf.models.processors import processor_scope

    with processor_scope():
        processor = processor_class(chat_template=template, **parts)
    return config, model_class, processor


def _llava(family: str):
    import transformers as tf

    tokenizer = _tokenizer(["<image>"], bos="<s>")
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    if family == "llava":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        image_processor, extra = CLIPImageProcessorPil(**size), {}
        classes = tf.LlavaConfig, tf.LlavaForConditionalGeneration, tf.LlavaProcessor
    else:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        extra = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
        image_processor = LlavaNextImageProcessorPil(**size, **extra)
        classes = tf.LlavaNextConfig, tf.LlavaNextForConditionalGeneration, tf.LlavaNextProcessor
    config = classes[0](
        vision_config={"model_type": "clip_vision_model", **_VISION},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        **extra,
    )
    parts = {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    return config, classes[1], classes[2], "<image>\n", parts


def _llava_onevision(family: str):
    import transformers as tf
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = _tokenizer(["<image>", "<video>"])
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = tf.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), "tie_word_embeddings": False, **_TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    parts = {
        "image_processor": LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        "tokenizer": tokenizer,
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
        "video": {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 28, "width": 28}},
    }
    return config, tf.LlavaOnevisionForConditionalGeneration, tf.LlavaOnevisionProcessor, "<image>\n", parts


def _qwen(family: str):
    import transformers as tf
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    markers = ("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>")
    markers += ("vision_start_token", "<|vision_start|>"), ("vision_end_token", "<|vision_end|>")
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in markers}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, **_TEXT}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
    video = "Qwen2VLVideoProcessor"
    if family == "qwen2_vl":
        classes = tf.Qwen2VLConfig, tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLProcessor
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        classes = tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLProcessor
        vision |= {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    else:
        classes = tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLProcessor
        rope["mrope_interleaved"] = True
        text["head_dim"] = 8
        vision |= {"depth": 3, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 16}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        video = "Qwen3VLVideoProcessor"
    config = classes[0](
        text_config={**text, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False, **ids
    )
    edge = 2 * vision["patch_size"]
    grid = {
        "patch_size": vision["patch_size"],
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": edge * edge, "longest_edge": 4 * edge * edge},
    }
    parts = {
        "image_processor": Qwen2VLImageProcessorPil(**grid),
        "tokenizer": tokenizer,
        "video": {"video_processor_type": video, **grid},
        "video_marker": "<|vision_start|><|video_pad|><|vision_end|>",
    }
    return config, classes[1], classes[2], "<|vision_start|><|image_pad|><|vision_end|>", parts


def _internvl(family: str):
    import transformers as tf
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(list(named.values()), named=named)
    config = tf.InternVLConfig(
        vision_config={**_VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **_TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 28, "width": 28}
    parts = {
        "image_processor": GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        "tokenizer": tokenizer,
        "image_seq_length": 4,
        "video": {"video_processor_type": "InternVLVideoProcessor", "size": size},
    }
    return config, tf.InternVLForConditionalGeneration, tf.InternVLProcessor, "<IMG_CONTEXT>\n", parts


def _idefics(family: str):
    import transformers as tf

    rows = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
    tokenizer = _tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows])
    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    parts = {"tokenizer": tokenizer, "image_seq_len": 4}
    if family == "idefics3":
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Images

        classes = tf.Idefics3Config, tf.Idefics3ForConditionalGeneration, tf.Idefics3Processor
    else:
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil as Images

        classes = tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration, tf.SmolVLMProcessor
        parts["video"] = {
            "video_processor_type": "SmolVLMVideoProcessor",
            "num_frames": 4,
            "fps": 1,
            "video_sampling": {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 56}},
            **size,
        }
    parts["image_processor"] = Images(**size, do_image_splitting=True)
    config = classes[0](
        vision_config={**_VISION, "patch_size": 7},
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            **_TEXT,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return config, classes[1], classes[2], "<image>", parts


def _gemma3(family: str):
    import transformers as tf
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = _tokenizer(list(named.values()), named=named, pad="<pad>", bos="<bos>")
    config = tf.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "patch_size": 7, "vision_use_head": False},
        text_config={
            "vocab_size": len(tokenizer),
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 64,
            **_TEXT,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    parts = {
        "image_processor": Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, do_pan_and_scan=False),
        "tokenizer": tokenizer,
        "image_seq_length": 4,
    }
    return config, tf.Gemma3ForConditionalGeneration, tf.Gemma3Processor, "<start_of_image>", parts


def _pixtral(family: str):
    """Mistral 3, or Pixtral as the hub has it: a Llava with Pixtral's tower, and an image as large as it comes."""
    import transformers as tf
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    from mmrlhf.models.processors import pixtral_class

    tokenizer = _tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], bos="<s>")
    merge, patch = (2, 7) if family == "mistral3" else (1, 14)
    classes = {
        "mistral3": (tf.Mistral3Config, tf.Mistral3ForConditionalGeneration, {"spatial_merge_size": merge}),
        "pixtral": (tf.LlavaConfig, tf.LlavaForConditionalGeneration, {"vision_feature_select_strategy": "full"}),
    }
    config_class, model_class, extra = classes[family]
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": None, **_TEXT}
    config = config_class(
        vision_config={"model_type": "pixtral", **_VISION, "image_size": 56, "patch_size": patch},
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **extra,
    )
    edges = {"height": patch, "width": patch}
    parts = {
        "image_processor": PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size=edges),
        "tokenizer": tokenizer,
        "patch_size": patch,
        "spatial_merge_size": merge,
    }
    return config, model_class, pixtral_class(), "[IMG]", parts


def _glm4v(family: str):
    import transformers as tf
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    markers = {f"{kind}_{edge}": f"<|{word}_of_{kind}|>" for kind in ("image", "video") for edge, word in _EDGES}
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = _tokenizer([*markers.values(), *named.values()], named=named)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in markers.items()}
    ids |= {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
    config = tf.Glm4vConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **_TEXT},
        vision_config={**vision, "intermediate_size": 64, "out_hidden_size": 32, "image_size": 56},
        tie_word_embeddings=False,
        **ids,
    )
    grid = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    grid["size"] = {"shortest_edge": 2 * 28 * 28, "longest_edge": 8 * 28 * 28}  # pixels of two frames
    parts = {
        "image_processor": Glm4vImageProcessorPil(**grid),
        "tokenizer": tokenizer,
        "video": {"video_processor_type": "Glm4vVideoProcessor", **grid},
        "video_marker": "<|begin_of_video|><|video|><|end_of_video|>",
    }
    marker = "<|begin_of_image|><|image|><|end_of_image|>"
    return config, tf.Glm4vForConditionalGeneration, tf.Glm4vProcessor, marker, parts
