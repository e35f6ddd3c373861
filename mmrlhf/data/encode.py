"""PreferenceGroup -> EncodedGroup: tokens, segment weights, pairs and pixels of one group.

The processor sees each prompt once, with its images: the placeholders it expands are the prefix's image tokens, and
whatever else it returns (pixel_values, image_grid_thw, image_sizes …) is carried as it is. Responses follow as plain
tokens. A group too long is dropped whole: no cut ever goes through an image or an answer. `measure` makes the tokens
alone, from the sizes of the pictures, where the processor's tokens follow from them (which it checks).

With segments, a token's weight belongs to a pair: a response that is corrected in one way against one rival and in
another way against the next is repeated, once for each set of weights, so that every pair keeps its own. With two
responses, or with explicit segments, nothing is repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrlhf.data.chat import Answer, Chat
from mmrlhf.data.encoded import EncodedGroup, TooLong, same_tokens
from mmrlhf.data.images import (
    MAX_PIXELS,
    MAX_VIDEO_BYTES,
    frame_names,
    image_bytes,
    open_image,
    open_inside,
    open_video,
    uniform_indices,
)
from mmrlhf.data.looks import Look, Looks
from mmrlhf.data.schema import PAIR_MODES, BadRow, ImageRef, Message, PairMode, Part, PreferenceGroup, VideoRef
from mmrlhf.data.segments import STYLES, segment_weights, weights_from_characters
from mmrlhf.data.standin import blank, stand_in

CHECKED = 3  # combinations of picture sizes whose measured tokens are compared with the processor's own
logger = logging.getLogger(__name__)


class Encoder:
    """Turns groups into tensors with one processor and one set of settings.

    Args:
        processor: a transformers processor with a chat template (a bare tokenizer will do for text).
        root: folder that image and video paths are relative to; nothing outside it is opened.
        pairs: "all", "adjacent" or "best_vs_rest", see PreferenceGroup.preference_pairs.
        segments: "paper", "muffin", or None: every token weighs 1. Explicit `Response.segments` go before the diff.
        gamma: weight of a token in a corrected segment.
        max_group_tokens: a longer group raises TooLong.
        max_image_pixels: an image with more raises BadRow before it is decoded.
        video_frames: frames taken from a video, evenly spaced.
        videos: "native" gives them to the processor's video side, "frames" as that many images; "auto" is native
            where the processor has a video side that can run (it needs torchvision), which `video_mode` tells.
        measure: whether `measure` may make tokens from the sizes of pictures; False always asks the processor.
        looks: folder where sizes and hashes of pictures (`data.looks`) and the tokens that a PreferenceDataset makes
            (`data.kept`) are kept between runs, or None.
    """

    makes: type[EncodedGroup] = EncodedGroup

    def __init__(
        self,
        processor: Any,
        *,
        root: str | Path,
        pairs: PairMode = "all",
        segments: str | None = None,
        gamma: float = 1.0,
        max_group_tokens: int = 8192,
        max_image_pixels: int = MAX_PIXELS,
        video_frames: int = 8,
        videos: str = "auto",
        measure: bool = True,
        looks: str | Path | None = None,
    ):
        if pairs not in PAIR_MODES:
            raise ValueError(f"pairs must be one of {', '.join(PAIR_MODES)}, got {pairs!r}")
        if segments is not None and segments not in STYLES:
            raise ValueError(f"segments must be None or one of {', '.join(STYLES)}, got {segments!r}")
        if not (gamma > 0 and math.isfinite(gamma)):
            raise ValueError(f"gamma must be finite and positive, got {gamma!r}")
        for name, value in (("max_group_tokens", max_group_tokens), ("video_frames", video_frames)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if videos not in ("auto", "native", "frames"):
            raise ValueError(f"videos must be auto, native or frames, got {videos!r}")
        self.processor, self.chat, self.root = processor, Chat(processor), Path(root)
        self.pairs, self.segments, self.gamma = pairs, segments, float(gamma)
        self.max_group_tokens, self.max_image_pixels = max_group_tokens, max_image_pixels
        self.video_frames = video_frames
        self.video_mode = _video_mode(processor) if videos == "auto" else videos
        self.folder = None if looks is None else Path(looks)
        self.looks = Looks(self.root, max_pixels=max_image_pixels, folder=looks)
        self._checked: set[tuple] = set()
        self._measures = measure

    def encode(self, group: PreferenceGroup) -> EncodedGroup:
        """The group as CPU tensors. Raises BadRow (TooLong) for the group, ValueError for an unusable template."""
        return self._encode(group, None)

    def measure(self, group: PreferenceGroup, look: Callable[[ImageRef], Look] | None = None) -> EncodedGroup:
        """`encode` without `vision`, pictures looked at but not processed: 10 ms of CPU time for 34 with one
        of 0.3 megapixels, most of it tokenizing.

        The first CHECKED combinations of sizes are encoded as well; if that gives other tokens, or a group cannot be
        measured (a video file, a processor of another build), it comes as from `encode`, `vision` included. `look`
        gives what is known of a picture; by default that is looked up. Raises as `encode`.
        """
        refs = self.pictures(group)
        if not refs:
            return self.encode(group)
        try:
            looks = {ref: look(ref) if look is not None else self.looks(ref, group.source or group.id) for ref in refs}
            measured = self._encode(group, looks)
        except TooLong:
            raise
        except (BadRow, AttributeError, NotImplementedError) as error:
            encoded = self.encode(group)  # says in its own words what is wrong, if it is the group
            self._no_measuring(f"its tokens cannot be had from the sizes of pictures ({error})")
            return encoded
        sizes = tuple((looks[ref].width, looks[ref].height) for ref in refs)
        if len(self._checked) < CHECKED and sizes not in self._checked:
            self._checked.add(sizes)
            encoded = self.encode(group)
            if not same_tokens(measured, encoded):
                self._no_measuring(f"its tokens for pictures of {sizes} do not follow from their sizes")
            return encoded
        return measured

    @property
    def measures(self) -> bool:
        """Whether tokens are made from the sizes of pictures, as far as is known by now."""
        return self._measures

    def pictures(self, group: PreferenceGroup) -> list[ImageRef] | None:
        """The pictures that the processor would get, in order; None if they cannot stand for the group's tokens."""
        if not self._measures or not (group.images or group.videos) or self._stand_in is None:
            return None
        frames: list[ImageRef] = []
        for video in group.videos:
            found = self._frames(video, group.source or group.id) if self.video_mode == "frames" else None
            if found is None:
                return None
            frames += found
        return [*group.images, *frames]

    def _frames(self, video: VideoRef, source: str) -> list[ImageRef] | None:
        """The frames `open_video` takes of a folder; None for a file, or one that says itself what is wrong with it."""
        try:
            names = frame_names(video, self.root, source=source)
        except BadRow:
            return None
        if names is None:
            return None
        return [ImageRef(path=names[i]) for i in uniform_indices(len(names), self.video_frames)]

    @cached_property
    def _stand_in(self) -> Any:
        try:
            return stand_in(self.processor)
        except TypeError as error:
            self._no_measuring(str(error))
            return None

    def _no_measuring(self, why: str) -> None:
        self._measures = False
        logger.warning("%s: %s; every picture is processed to count tokens", type(self.processor).__name__, why)

    def _encode(self, group: PreferenceGroup, looks: Mapping[ImageRef, Look] | None) -> EncodedGroup:
        source = group.source or group.id
        listed = group.preference_pairs(self.pairs)
        if not listed:
            raise BadRow(source, group.why_no_pairs(self.pairs))
        prefix_ids, aligned, vision, messages, prompt = self._prefix(group, looks)
        frame = self.chat.frame(messages, prompt, source)
        answers: dict[int, Answer] = {}
        for index in sorted({i for p in listed for i in (p.better, p.worse)}):
            response = group.responses[index]
            if not response.text.strip():
                raise BadRow(source, f"response {index} is empty")
            wanted = self.segments is not None and response.segments is not None
            answers[index] = self.chat.answer(frame, response.text, source, offsets=wanted)
        slots, pairs = self._slots(group, listed, answers)
        encoded = EncodedGroup(
            id=group.id,
            prefix_ids=prefix_ids,
            response_ids=tuple(torch.tensor(answers[index].ids, dtype=torch.int64) for index, _ in slots),
            weights=tuple(torch.tensor(weights, dtype=torch.float32) for _, weights in slots),
            responses=tuple(index for index, _ in slots),
            pairs=torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
            margin=torch.tensor([math.nan if p.margin is None else p.margin for p in listed], dtype=torch.float32),
            aligned=aligned,
            vision=vision if looks is None else {},
            images=len(group.images) + len(group.videos),
        )
        self._check_length(encoded, source)
        return encoded

    def _check_length(self, encoded: EncodedGroup, source: str) -> None:
        if encoded.num_tokens > self.max_group_tokens:
            raise TooLong(
                source,
                f"too long: {encoded.num_tokens} tokens ({encoded.prefix_ids.numel()} of them prompt and images), "
                f"max_group_tokens is {self.max_group_tokens}",
            )

    def vision(self, group: PreferenceGroup, prefix_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Only the processor's vision outputs of a group. RuntimeError if it makes other tokens than `prefix_ids`."""
        made, _, vision, _, _ = self._prefix(group, None)
        if prefix_ids is not None and not torch.equal(made, prefix_ids.to(made.dtype)):
            raise RuntimeError(
                f"{group.source or group.id}: the processor makes {made.numel()} prompt tokens, and made or measured "
                f"{prefix_ids.numel()} before: the pictures changed, or their tokens do not follow from their sizes "
                "(then use Encoder(measure=False))"
            )
        return vision

    def _slots(self, group: PreferenceGroup, listed: Sequence, answers: dict[int, Answer]):
        """Responses with their weights, each distinct (response, weights) once in order of response; pairs of them."""
        needed: list[tuple[tuple[int, tuple[float, ...]], tuple[int, tuple[float, ...]]]] = []
        for pair in listed:
            better, worse = answers[pair.better].ids, answers[pair.worse].ids
            if self.segments is None:
                w_better, w_worse = [1.0] * len(better), [1.0] * len(worse)
            else:
                w_worse, w_better = segment_weights(worse, better, gamma=self.gamma, style=self.segments)
                w_better = self._explicit(group, pair.better, answers) or w_better
                w_worse = self._explicit(group, pair.worse, answers) or w_worse
            needed.append(((pair.better, tuple(w_better)), (pair.worse, tuple(w_worse))))
        slots = sorted(dict.fromkeys(slot for pair in needed for slot in pair), key=lambda slot: slot[0])
        number = {slot: index for index, slot in enumerate(slots)}
        return slots, [(number[better], number[worse]) for better, worse in needed]

    def _explicit(self, group: PreferenceGroup, index: int, answers: dict[int, Answer]) -> list[float] | None:
        segments = group.responses[index].segments
        if segments is None:
            return None
        offsets = answers[index].offsets
        if offsets is None:
            raise ValueError(f"segments given as characters need a fast tokenizer, not {type(self.chat.tokenizer)}")
        return weights_from_characters(offsets, segments, gamma=self.gamma)

    def _prefix(self, group: PreferenceGroup, looks: Mapping[ImageRef, Look] | None):
        """Prefix ids [L], aligned outputs, vision outputs, the messages as encoded, and the prompt's text.

        With `looks`, pictures are empty ones of their sizes and vision outputs mean nothing.
        """
        source = group.source or group.id
        counted = {kind: sum(p.type == kind for m in group.prompt for p in m.content) for kind in ("image", "video")}
        for kind, given in (("image", group.images), ("video", group.videos)):
            if counted[kind] != len(given):
                raise BadRow(source, f"{counted[kind]} {kind} placeholders for {len(given)} {kind}s")
        if self.chat.text_only and (group.images or group.videos):
            raise BadRow(source, f"{type(self.processor).__name__} is a tokenizer and takes no images or videos")
        messages, images, videos = self._media(group, source, looks)
        prompt = self.chat.prompt(group, messages)
        words: dict[str, Any] = {}
        if images:
            words["images"] = [images]
        if videos:
            words.update(videos=[videos], videos_kwargs={"do_sample_frames": False})
        bos = self.chat.tokenizer.bos_token
        if bos and prompt.startswith(bos):
            words["add_special_tokens"] = False  # the template wrote it; the tokenizer would add another
        try:
            processor = self.processor if looks is None else self._stand_in
            made = dict(processor(text=[prompt], return_tensors="pt", **words))
        except (ValueError, TypeError, IndexError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise BadRow(source, f"{type(self.processor).__name__}: {type(error).__name__}: {error}") from error
        ids = made.pop("input_ids")  # [1, L]
        made.pop("attention_mask", None)
        aligned = {k: made.pop(k)[0] for k in list(made) if k.endswith("type_ids") and made[k].shape == ids.shape}
        self.chat.check_prefix(ids[0, -1:].tolist(), prompt)
        vision = {}
        for key, value in made.items():
            if not isinstance(value, Tensor):
                raise BadRow(source, f"{type(self.processor).__name__} returned {key} as {type(value).__name__}")
            vision[key] = value
        return ids[0], aligned, vision, messages, prompt

    def _media(self, group: PreferenceGroup, source: str, looks: Mapping[ImageRef, Look] | None):
        """Messages as the template should see them, and the pictures and videos in the order of their parts."""
        pictures, clips = iter(group.images), iter(group.videos)
        images: list[Any] = []
        videos: list[Any] = []
        messages = []
        for message in group.prompt:
            parts: list[Part] = []
            for part in message.content:
                if part.type == "image":
                    images.append(self._open(next(pictures), source, looks))
                elif part.type == "video":
                    frames = self._open_video(next(clips), source, looks)
                    if self.video_mode == "frames":
                        images.extend(frames)
                        parts.extend([Part("image")] * len(frames))
                        continue
                    videos.append(frames)
                parts.append(part)
            messages.append(Message(message.role, tuple(parts)))
        return messages, images, videos

    def _open(self, ref: ImageRef, source: str, looks: Mapping[ImageRef, Look] | None) -> Any:
        if looks is not None:
            return blank(looks[ref].width, looks[ref].height)
        return open_image(ref, self.root, max_pixels=self.max_image_pixels, source=source)

    def _open_video(self, ref: VideoRef, source: str, looks: Mapping[ImageRef, Look] | None) -> list[Any]:
        if looks is not None:
            return [self._open(frame, source, looks) for frame in self._frames(ref, source) or ()]
        return open_video(ref, self.root, frames=self.video_frames, max_pixels=self.max_image_pixels, source=source)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything here that changes tokens, pixels, weights or pairs."""
        tokenizer = self.chat.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts: dict[str, Any] = {
            "template": self.chat.template,
            "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
            "settings": [self.pairs, self.segments, self.gamma, self.max_image_pixels, self.video_frames],
            **self._pixel_settings(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _pixel_settings(self) -> dict[str, Any]:
        """What turns pictures into pixels."""
        parts: dict[str, Any] = {"processor": type(self.processor).__name__, "videos": self.video_mode}
        for name in ("image_processor", "video_processor"):
            part = getattr(self.processor, name, None)
            if part is not None:  # the class names the backend: PIL and torchvision give different pixels
                state = part.to_dict() if hasattr(part, "to_dict") else {}
                parts[name] = [type(part).__name__, state]
        plain = {k: v for k, v in vars(self.processor).items() if isinstance(v, (int, float, str, bool))}
        parts["processor settings"] = plain
        return parts

    def vision_hash(self, group: PreferenceGroup) -> str:
        """Hash of a group's pictures, in order, and of what turns them into pixels; opens its files.

        Two prompts about the same pictures have the same one.
        """
        order = [part.type for message in group.prompt for part in message.content if part.type != "text"]
        settings = {**self._pixel_settings(), "video_frames": self.video_frames, "order": order}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        self._add_media(digest, group)
        return digest.hexdigest()

    def row_hash(self, group: PreferenceGroup) -> str:
        """Hash of a group's texts and preferences, its image bytes, and these settings; opens its files."""
        digest = hashlib.sha256(self.fingerprint.encode())
        content = [group.id, group.prompt, group.responses, group.preference_pairs(self.pairs)]
        digest.update(repr(content).encode("utf-8", "surrogatepass"))
        self._add_media(digest, group)
        return digest.hexdigest()

    def _add_media(self, digest: Any, group: PreferenceGroup) -> None:
        for ref in group.images:
            digest.update(self.looks.digest(ref, group.source))
        for video in group.videos:
            digest.update(_video_digest(video.path, self.root, group.source))


def _video_digest(path: str, root: Path, source: str) -> bytes:
    """Names and bytes of the frames of a directory, or the bytes of a file."""
    digest = hashlib.sha256(path.encode())
    names = frame_names(VideoRef(path), root, source=source)
    if names is not None:
        for name in names:
            digest.update(name.encode() + image_bytes(ImageRef(path=name), root, source=source))
        return digest.digest()
    with open_inside(path, root, max_bytes=MAX_VIDEO_BYTES, source=source) as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.digest()


def _video_mode(processor: Any) -> str:
    """ "native" if the processor's video side is a real one (they need torchvision), else "frames"."""
    side = getattr(processor, "video_processor", None)
    if side is None:
        return "frames"
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        return "frames"
    from transformers.video_processing_utils import BaseVideoProcessor

    return "native" if isinstance(side, BaseVideoProcessor) else "frames"
