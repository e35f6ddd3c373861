"""Let a torchvision built for CUDA be imported beside a CPU build of torch, for the environments of `make test-hosts`.

PyPI has torchvision for CUDA alone; its compiled part does not load beside the CPU torch, and then neither does
transformers' AutoProcessor. Declaring the two operators it looks for is enough for the image transforms.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_kept = []  # a Library forgets its operators when it goes


def declare() -> None:
    """Call before the first import of torchvision or transformers; does nothing where the builds agree."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda is not None or _kept:
        return
    if "cuda = None" in (Path(spec.origin).parent / "version.py").read_text():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
