"""FrameProcessor: the video side of a processor where torchvision is missing.

It carries the saved settings of the real video processor unchanged (saving writes them back), and turns lists of
frames into pixels with the PIL image processor for LLaVA-OneVision and the Qwen-VL family. A video is a list of PIL
frames, all of one size, already sampled; files are not decoded here. Qwen's pixel budget covers a whole video, so
each frame gets its share of it. Other families raise a ValueError when a video is really given.

Import this module only inside functions: it needs transformers at once.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.video_utils import VideoMetadata

_FAMILIES = {
    "LlavaOnevisionVideoProcessor": "_llava_onevision",
    "Qwen2VLVideoProcessor": "_qwen",
    "Qwen3VLVideoProcessor": "_qwen",
}
_FRAMES_PER_SECOND = 2.0  # Qwen's default sampling rate, assumed for frames that come without times


class FrameProcessor(BaseImageProcessor):
    """Stands in for the video processor that `settings["video_processor_type"]` names."""

    def __init__(self, *, image_processor: Any = None, settings: dict[str, Any] | None = None):
        # The base classes' __init__ would turn settings into attributes of their own: here they stay one dict.
        self.settings = copy.deepcopy(settings or {})
        self.image_processor = image_processor
        self._processor_class = None

    def __getattr__(self, name: str) -> Any:
        """Settings read as attributes, as processors do (`video_processor.merge_size`)."""
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        image_processor = self.__dict__.get("image_processor")
        if name in ("merge_size", "patch_size", "temporal_patch_size") and image_processor is not None:
            return getattr(image_processor, name)
        raise AttributeError(f"FrameProcessor has no setting {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as they were read."""
        return copy.deepcopy(self.settings)

    def __repr__(self) -> str:
        return f"FrameProcessor({self.settings.get('video_processor_type', 'no settings')})"

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """Pixels of a list of videos, each a list of T PIL frames of one size.

        LLaVA-OneVision: pixel_values_videos [videos, T, 3, H, W]. Qwen: pixel_values_videos [patches, dim] and
        video_grid_thw [videos, 3]. Raises ValueError for a family that cannot do videos without torchvision, for a
        video that is not a non-empty list of frames, and for LLaVA-OneVision videos of different lengths.
        """
        kind = self.settings.get("video_processor_type")
        method = _FAMILIES.get(kind or "")
        if method is None:
            raise ValueError(
                f"videos need torchvision for this model ({kind or 'its folder has no video processor settings'}); "
                "images work without it. Install the torchvision that matches torch"
            )
        if isinstance(videos, (list, tuple)) and videos and not isinstance(videos[0], (list, tuple)):
            videos = [videos]
        for index, video in enumerate(videos):
            if not isinstance(video, (list, tuple)) or not video or not all(hasattr(f, "convert") for f in video):
                raise ValueError(
                    f"video {index} must be a non-empty list of PIL frames (without torchvision no file is decoded), "
                    f"got {type(video).__name__}"
                )
            if len({frame.size for frame in video}) > 1:
                raise ValueError(f"video {index} has frames of different sizes: {sorted({f.size for f in video})}")
        data = getattr(self, method)(videos)
        out = BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))
        out["video_metadata"] = [
            VideoMetadata(total_num_frames=len(video), fps=_FRAMES_PER_SECOND, frames_indices=list(range(len(video))))
            for video in videos
        ]
        return out

    def _llava_onevision(self, videos: list) -> dict[str, Any]:
        """Each frame resized to the tower's square, no tiles (what LlavaOnevisionVideoProcessor does)."""
        if len({len(video) for video in videos}) > 1:
            raise ValueError(
                f"videos of one batch must have equally many frames, got {[len(video) for video in videos]}"
            )
        from transformers.image_utils import SizeDict

        images = self.image_processor
        size = self.settings.get("size") or images.size
        size = SizeDict(height=size["height"], width=size["width"])
        frames = []
        for frame in (frame for video in videos for frame in video):
            array = np.asarray(frame.convert("RGB")).transpose(2, 0, 1)  # [3, H, W]
            array = images.resize(array, size=size, resample=images.resample)
            array = images.normalize(images.rescale(array, images.rescale_factor), images.image_mean, images.image_std)
            frames.append(torch.as_tensor(np.asarray(array, dtype=np.float32)))
        pixels = torch.stack(frames)  # [videos * T, 3, H, W]
        return {"pixel_values_videos": pixels.unflatten(0, (len(videos), len(videos[0])))}

    def _qwen(self, videos: list) -> dict[str, Any]:
        """Patches of `temporal_patch_size` frames each; the last frame is repeated to fill the last one.

        The image processor repeats its one frame along the temporal slots of a patch: slot j of a video patch is
        taken from frame j of its group.
        """
        slots = self.temporal_patch_size
        patches, grids = [], []
        for video in videos:
            frames = [frame.convert("RGB") for frame in video]
            frames += [frames[-1]] * (-len(frames) % slots)
            size = dict(self.settings.get("size") or self.image_processor.size)
            size = {edge: max(1, int(size[edge]) // len(frames)) for edge in ("shortest_edge", "longest_edge")}
            one = (self.patch_size * self.merge_size) ** 2  # pixels of the smallest frame, one merged patch
            size["longest_edge"] = max(size["longest_edge"], one)
            out = self.image_processor(images=frames, size=size, return_tensors="pt")
            _, height, width = out["image_grid_thw"][0].tolist()
            pixels = out["pixel_values"].unflatten(1, (3, slots, -1))  # [frames * L, 3, slots, patch]
            pixels = pixels.unflatten(0, (len(frames) // slots, slots, height * width))  # [t, slots, L, 3, slots, …]
            picked = torch.stack([pixels[:, slot, :, :, slot] for slot in range(slots)], dim=3)  # [t, L, 3, slots, …]
            patches.append(picked.flatten(2).flatten(0, 1))
            grids.append([len(frames) // slots, height, width])
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
