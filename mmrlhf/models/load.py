"""Loading and saving models and processors, with every way it can go wrong said before training starts.

A path is a local folder or a hub id; a hub id becomes a local folder first (its cached snapshot, or a download of its
safetensors and text files), so that one set of checks serves both. Weights come from safetensors only: each shard is
opened and its header checked, every key must be there, and none may be left over. Code from the hub runs only when
asked for by name, at a pinned revision. A folder with `adapter_config.json` is a LoRA on the base model it names.

Not covered: quantised loading, sharding over devices (the caller moves the model).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.models.parts import Head, base_model, image_token_ids, lm_head
from mmrlhf.models.processors import has_torchvision, image_backend, processor_from_folder, read_json

__all__ = [
    "Head",
    "base_model",
    "check_pair",
    "image_backend",
    "lm_head",
    "load_model",
    "load_processor",
    "save_pretrained",
]
_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PROCESSOR_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
logger = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """The model of a local folder or hub id, whole or not at all, in train mode.

    `dtype`: "auto" (as saved), a torch.dtype or its name. Raises ValueError for weights that are not safetensors,
    corrupt or missing shards (naming the file), missing or unexpected keys, mismatched shapes, and models whose code
    is not in transformers unless `trust_remote_code`, which for a hub id also needs a `revision`; FileNotFoundError
    for a path that is not there; RuntimeError for a torchvision that is installed but broken.
    """
    wanted = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} or a torch.dtype, got {dtype!r}")
    has_torchvision()
    folder = local_folder(path, trust_remote_code=trust_remote_code, revision=revision)
    if (folder / "adapter_config.json").is_file():
        return _load_adapter(folder, wanted, device, trust_remote_code)
    config = _config(folder, trust_remote_code)
    read_json(folder / "generation_config.json")
    check_weights(folder)
    model, info = auto_class(config).from_pretrained(
        folder,
        config=config,
        dtype=wanted,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are listed with the rest below, not raised one by one
    )
    problems = [
        f"{len(info[kind])} {kind.replace('_', ' ')}: {_few(info[kind])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info.get(kind)
    ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit {type(model).__name__}: " + "; ".join(problems))
    return model.to(device).train()


def load_processor(path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The processor of a local folder or hub id; it saves and reloads like any other.

    Works with torchvision and without (images through PIL, videos as lists of frames where `frames` says so); raises
    RuntimeError for a torchvision that is installed but broken, ValueError for a folder without any of its files, for a
    file that is not JSON (naming it), and for code that would come from the hub unless `trust_remote_code`.
    """
    has_torchvision()
    folder = local_folder(path, trust_remote_code=trust_remote_code, revision=revision)
    if not any((folder / file).is_file() for file in _PROCESSOR_FILES):
        raise ValueError(f"{folder} is not a model folder: it has no config.json and no processor's files")
    for file in _PROCESSOR_FILES:
        read_json(folder / file)  # transformers' own error for a broken one does not name it
    if not trust_remote_code:
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            _refuse_remote_code(folder, read_json(folder / file), "AutoProcessor")
    return processor_from_folder(folder, trust_remote_code=trust_remote_code)


def save_pretrained(
    model: Any, processor: Any, folder: str | Path, *, state: Mapping[str, Tensor] | None = None
) -> Path:
    """Save model (safetensors) and processor as an ordinary folder; returns it.

    A PEFT model saves its adapter only, merged into nothing; `load_model` puts it back on its base model. `state`: the
    weights by name, where the model has only a share of them (FSDP2).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    model.save_pretrained(folder, safe_serialization=True, **({} if state is None else {"state_dict": dict(state)}))
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def check_pair(model: nn.Module, processor: Any) -> None:
    """Raise ValueError if model and processor do not belong together.

    A tokenizer with more entries than the head has rows would index past its end; a placeholder token that the model
    does not know would be trained as text; a missing pad token fails only when the first answer is generated.
    """
    whole = base_model(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    rows, entries = lm_head(model).weight.shape[0], len(tokenizer)
    if entries > rows:
        raise ValueError(
            f"the tokenizer has {entries} entries but the model's lm_head only {rows} rows: they belong to different "
            "models, or tokens were added; call model.resize_token_embeddings(len(tokenizer)) first"
        )
    embeddings = whole.get_input_embeddings().weight.shape[0]
    if entries > embeddings:
        raise ValueError(f"the tokenizer has {entries} entries but the model's embeddings only {embeddings} rows")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token (pad_token_id is None); set tokenizer.pad_token, for instance to its "
            f"eos_token {tokenizer.eos_token!r}, and save the processor again"
        )
    for kind, token in image_token_ids(whole.config).items():
        if token >= embeddings:
            raise ValueError(f"config.{kind}_token_id is {token}, outside the {embeddings} rows of the embeddings")
        owners = (processor, tokenizer)  # Gemma 3's processor names the start marker, its tokenizer the placeholder
        listed = [getattr(owner, f"{kind}_token_id", None) for owner in owners]
        own = {int(value) for value in listed if value is not None}
        if own and token not in own:
            raise ValueError(
                f"the processor writes {kind} token {', '.join(map(str, sorted(own)))} but the model's config reads "
                f"{token}: processor and model belong to different models"
            )
    patch = getattr(getattr(whole.config, "vision_config", None), "patch_size", None)
    own_patch = getattr(processor, "patch_size", None) or getattr(
        getattr(processor, "image_processor", None), "patch_size", None
    )
    if isinstance(patch, int) and isinstance(own_patch, int) and patch != own_patch:
        raise ValueError(f"the processor cuts patches of {own_patch} pixels, the model's vision tower takes {patch}")


def named_folder(path: str | Path, *, revision: str | None = None) -> Path | None:
    """The folder that `path` is, or None for what may be a hub id; touches no network.

    Raises FileNotFoundError for what can be neither, ValueError for a revision of a local folder.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision names a commit of a hub id, got {revision!r}; {folder} is a local folder")
        return folder
    text = str(path)
    if not _HUB_ID.fullmatch(text) or text.startswith(".") or folder.exists():
        raise FileNotFoundError(f"{path} is neither a folder nor a hub id (owner/name)")
    return None


def local_folder(path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """The folder that holds a model: the path itself, or the snapshot of a hub id.

    A pinned commit that is cached is taken from there without the network, and so is everything in offline mode.
    """
    folder = named_folder(path, revision=revision)
    if folder is not None:
        return folder
    text = str(path)
    if trust_remote_code and revision is None:
        raise ValueError(
            f"trust_remote_code=True runs code from {text}: pin the revision you have read, revision=<commit hash>"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"] + (["*.py"] if trust_remote_code else [])
    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    for offline in (True, False) if pinned else (False,):
        try:
            return Path(snapshot_download(text, revision=revision, allow_patterns=patterns, local_files_only=offline))
        except LocalEntryNotFoundError as error:
            if offline and not constants.HF_HUB_OFFLINE:
                continue
            raise FileNotFoundError(
                f"{text} is not a local folder, and its snapshot is not in the hub cache and cannot be downloaded: "
                f"{error}"
            ) from error
        except HfHubHTTPError as error:
            raise FileNotFoundError(f"{text} is not a local folder, and the hub says: {error}") from error
    raise AssertionError("unreachable")


def read_config(path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The config of a folder or hub id, without its weights; of an adapter folder, that of its base model."""
    folder = local_folder(path, trust_remote_code=trust_remote_code, revision=revision)
    settings = read_json(folder / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if base:
        return read_config(base, trust_remote_code=trust_remote_code, revision=_base_revision(settings))
    return _config(folder, trust_remote_code)


def check_weights(folder: Path, *, names: Iterable[str] = _WEIGHTS) -> list[Path]:
    """The safetensors shards of a folder, each opened and its header checked; ValueError naming the file at fault.

    safetensors itself refuses headers that are too large, ranges that overlap or run past the end, and sizes that
    do not match shape and dtype.
    """
    single, index = (folder / name for name in names)
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index} has no weight_map")
        expected: dict[str, set[str]] = {}
        for key, file in listed.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: shard name {file!r} must be a file in the same folder")
            expected.setdefault(file, set()).add(key)
    elif single.is_file():
        expected = {single.name: set()}
    else:
        pickles = sorted(file.name for file in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise ValueError(
                f"{folder} has its weights only as pickle ({_few(pickles)}), which can run code when it is read, and "
                "mmrlhf does not. Convert them once, on a machine you can spare: AutoModelForImageTextToText"
                ".from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)"
            )
        raise ValueError(f"{folder} has no weights: neither {' nor '.join(names)}")
    from safetensors import SafetensorError, safe_open

    for file, keys in expected.items():
        path = folder / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: {index.name} lists {len(keys)} tensors in it")
        try:
            with safe_open(path, framework="pt") as shard:
                found = set(shard.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); download or copy it again") from error
        if keys - found:
            raise ValueError(f"{path} lacks tensors that {index.name} lists in it: {_few(sorted(keys - found))}")
    return [folder / file for file in expected]


def _load_adapter(folder: Path, dtype: Any, device: torch.device | str, trust_remote_code: bool) -> Any:
    """A LoRA folder on the base model it names."""
    from peft import PeftModel

    settings = read_json(folder / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path")
    check_weights(folder, names=("adapter_model.safetensors", "adapter_model.safetensors.index.json"))
    model = load_model(
        base,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        revision=_base_revision(settings),
    )
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True, local_files_only=True).to(device).train()


def _base_revision(settings: dict[str, Any]) -> str | None:
    """The commit an adapter was trained on; peft keeps it also where the base is a local folder, which has none."""
    local = Path(settings["base_model_name_or_path"]).expanduser().is_dir()
    return None if local else settings.get("revision")


def _config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = read_json(folder / "config.json")
    if not raw:
        raise ValueError(f"{folder} has no config.json: it is not a model folder")
    if raw.get("model_type") not in CONFIG_MAPPING:
        if not trust_remote_code:
            _refuse_remote_code(folder, raw, "AutoConfig")
            raise ValueError(
                f"{folder / 'config.json'}: model_type {raw.get('model_type')!r} is not in this version of transformers"
            )
        foreign = [ref for ref in (raw.get("auto_map") or {}).values() if "--" in str(ref)]
        if foreign:
            raise ValueError(f"{folder}: auto_map takes code from another repository ({_few(foreign)}), unpinned")
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def _refuse_remote_code(folder: Path, raw: dict[str, Any], name: str) -> None:
    reference = (raw.get("auto_map") or {}).get(name)
    native = raw.get("processor_class") if name == "AutoProcessor" else None
    if reference and not (native and _is_native(native)):
        raise ValueError(
            f"{folder} needs code of its own ({reference}), which mmrlhf does not run by default. Read that code; to "
            "run it, set trust_remote_code=True and, for a hub id, pin revision=<commit hash>"
        )


def _is_native(class_name: str) -> bool:
    from transformers.models.auto.processing_auto import processor_class_from_name

    return processor_class_from_name(class_name) is not None


def auto_class(config: Any) -> Any:
    """The auto class of a vision-language model, or of a text-only one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    remote = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in remote:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _few(names: Iterable[Any], most: int = 4) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
