"""Processors with, without, and in spite of torchvision.

transformers needs torchvision for every video processor, and refuses to build or reload a processor that has one
(LLaVA-OneVision, Qwen-VL, InternVL, SmolVLM) where torchvision is missing, although images need none of it. Here the
image side is loaded as transformers would (its PIL backend) and `frames.FrameProcessor` stands in for the video side:
it keeps the saved settings, so that saving writes what was read, and takes lists of frames where that is simple.
Pixtral's processor (also Mistral 3's) has no video side; only an import of its keeps it from working: `pixtral_class`.
Before 5.18 transformers also hides some PIL image processors it has (Idefics3, SmolVLM): `_hidden_pil_class`.

Pixels of the two backends differ by up to 0.26 for Qwen (0.016 elsewhere), ids never: `image_backend` names the one
in use, for cache keys. Not covered: audio, and processors whose code comes from the hub.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ABSENT = object()


def has_torchvision() -> bool:
    """Whether torchvision can be used. RuntimeError if it is installed but cannot be imported.

    A torchvision built for another torch fails at import and takes transformers' processors with it, which is worse
    than none; that is reported as what it is, with the cure.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        import torch

        raise RuntimeError(
            f"torchvision is installed but broken: importing it fails with {type(error).__name__}: {error}. "
            f"Install the build that matches torch {torch.__version__}, or uninstall it (pip uninstall torchvision): "
            "mmrlhf works without torchvision"
        ) from error
    return True


def image_backend(processor: Any) -> str:
    """ "pil" or "torchvision": which library prepares this processor's pixels."""
    image_processor = getattr(processor, "image_processor", processor)
    return "pil" if type(image_processor).__name__.endswith("Pil") else "torchvision"


@contextlib.contextmanager
def processor_scope() -> Iterator[None]:
    """Inside, a processor with a `FrameProcessor` can be built without torchvision; nothing remains patched after.

    ProcessorMixin looks the class it expects up by name in the transformers module, which hides it (or a dummy of it)
    without torchvision; SmolVLM asks for num2words, which only the text about a video uses.
    """
    if has_torchvision():
        yield
        return
    from transformers import processing_utils

    from mmrlhf.models.frames import FrameProcessor

    expected = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING["video_processor"]
    smolvlm = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    changes: list[tuple[Any, str, Any]] = [(processing_utils.transformers_module, str(expected), FrameProcessor)]
    if getattr(smolvlm, "num2words", True) is None:
        changes.append((smolvlm, "num2words", str))
    before = [vars(module).get(name, _ABSENT) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            if value is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, value)


def pixtral_class() -> Any:
    """transformers' PixtralProcessor, with torchvision or without.

    Its module takes one helper from the torchvision image processor's module, and the PIL one has the same; without
    torchvision that one stands in while the module is imported.
    """
    name = "transformers.models.pixtral.processing_pixtral"
    if has_torchvision() or name in sys.modules:
        return importlib.import_module(name).PixtralProcessor
    pixels = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules[pixels] = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    try:
        return importlib.import_module(name).PixtralProcessor
    finally:
        del sys.modules[pixels]


def build_video_processor(settings: dict[str, Any], image_processor: Any) -> Any:
    """The video processor that `settings` (a saved video processor config) describes.

    transformers' own with torchvision, `frames.FrameProcessor` without.
    """
    if has_torchvision():
        import transformers

        return getattr(transformers, settings["video_processor_type"])(
            **{key: value for key, value in settings.items() if key != "video_processor_type"}
        )
    from mmrlhf.models.frames import FrameProcessor

    return FrameProcessor(image_processor=image_processor, settings=settings)


def processor_from_folder(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The processor saved in a local folder (a tokenizer alone for a text-only model). See `load.load_processor`."""
    torchvision = has_torchvision()
    from transformers import AutoProcessor

    if torchvision:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    name = _processor_class_name(folder)
    processor_class = _class_of(name) if name else None
    attributes = processor_class.get_attributes() if processor_class else []
    by_parts = "video_processor" in attributes or name == "PixtralProcessor" or _hidden_pil_class(folder) is not None
    if not by_parts:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    return _by_parts(folder, processor_class, attributes)


def _by_parts(folder: Path, processor_class: Any, attributes: list[str]) -> Any:
    """Build a processor part by part, with the stand-in as its video processor if it has one."""
    from transformers import AutoTokenizer

    parts: dict[str, Any] = {}
    for attribute in attributes:
        if attribute == "tokenizer":
            parts[attribute] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        elif attribute == "image_processor":
            parts[attribute] = _image_processor(folder)
        elif attribute != "video_processor":
            raise ValueError(
                f"{folder}: {processor_class.__name__} has a part {attribute!r} that mmrlhf does not know; "
                "install torchvision to load it the ordinary way"
            )
    if "video_processor" in attributes:
        parts["video_processor"] = build_video_processor(_video_settings(folder), parts["image_processor"])
    with processor_scope():
        saved, _ = processor_class.get_processor_dict(folder, local_files_only=True)
        return processor_class.from_args_and_dict([parts[attribute] for attribute in attributes], saved)


def _image_processor(folder: Path) -> Any:
    """The folder's PIL image processor, also where transformers hides it."""
    hidden = _hidden_pil_class(folder)
    if hidden is not None:
        return hidden.from_pretrained(folder, local_files_only=True)
    # From its own module: before 5.18 the package's top level hides it without torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except ImportError as error:  # LLaVA-OneVision in transformers 5.4
        raise RuntimeError(
            f"{folder}: this version of transformers needs torchvision for its images ({error}); upgrade "
            "transformers, or install the torchvision that matches torch"
        ) from error


def _hidden_pil_class(folder: Path) -> Any | None:
    """The PIL class of the folder's image processor, if transformers has it but shows a placeholder for it.

    Before 5.18 a module that mentions TorchvisionBackend even in a comment counts as one that needs torchvision, and so
    Idefics3's and SmolVLM's PIL modules do. The placeholder names the module it stands for.
    """
    import transformers

    nested = read_json(folder / "processor_config.json").get("image_processor")
    settings = nested or read_json(folder / "preprocessor_config.json")
    name = str(settings.get("image_processor_type", "")).removesuffix("Fast").removesuffix("Pil") + "Pil"
    shown = getattr(transformers, name, None)
    if not getattr(shown, "is_dummy", False):
        return None
    try:
        return getattr(importlib.import_module(shown.__module__), name)
    except ImportError:
        return None  # it does need what is missing


def _video_settings(folder: Path) -> dict[str, Any]:
    """What the folder says about its video processor, from whichever file its transformers version wrote."""
    nested = read_json(folder / "processor_config.json").get("video_processor")
    return (
        nested or read_json(folder / "video_preprocessor_config.json") or read_json(folder / "preprocessor_config.json")
    )


def _processor_class_name(folder: Path) -> str | None:
    """The processor's class name, from the files AutoProcessor reads, in its order; then from the model type."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "config.json"):
        name = read_json(folder / file).get("processor_class")
        if name:
            return name
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return PROCESSOR_MAPPING_NAMES.get(read_json(folder / "config.json").get("model_type", ""))


def _class_of(name: str) -> Any:
    from transformers.models.auto.processing_auto import processor_class_from_name

    if name == "PixtralProcessor":
        return pixtral_class()
    found = processor_class_from_name(name)
    if found is None:
        raise ValueError(f"the processor class {name} is not in this version of transformers; upgrade transformers")
    return found


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(found).__name__}")
    return found
