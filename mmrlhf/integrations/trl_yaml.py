"""`mmrlhf trl config.yaml`: what `trl dpo --config config.yaml` does, with PreferenceTrainer.

The file holds the keys that `trl dpo` takes (ScriptArguments, DPOConfig, ModelConfig, dataset mixtures) and those of
PreferenceConfig. `dataset_name` may also be a local file or folder of any format `mmrlhf data check` knows.
Not covered: evaluation on a local file's own rows (a file has no splits).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import PreferenceGroup


class Groups:
    """A `datasets` transform: the numbers in the column `group` become the groups themselves."""

    def __init__(self, groups: Sequence[PreferenceGroup]):
        self.groups = list(groups)

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        if "group" not in columns:
            return columns
        return {**columns, "group": [self.groups[index] for index in columns["group"]]}


def group_dataset(groups: Sequence[PreferenceGroup]) -> Any:
    """Groups as a `datasets.Dataset` whose rows are {"group": PreferenceGroup}, which the collators take."""
    from datasets import Dataset

    return Dataset.from_dict({"group": list(range(len(groups)))}).with_transform(Groups(groups))


def run(path: str | Path, words: Sequence[str] = ()) -> Path:
    """Train as the YAML file says (`words` are further `--key value` arguments); returns the output folder.

    Raises FileNotFoundError, ValueError for a key or a combination that is not supported, ImportError without TRL.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        import trl
    except ImportError as error:
        raise ImportError("mmrlhf trl needs TRL: pip install 'trl>=1.15'") from error
    from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer

    kinds: Any = (trl.ScriptArguments, PreferenceConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    script, training, model, mixture = trl.TrlParser(kinds).parse_args_and_config(["--config", str(path), *words])
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    train, test = _datasets(script, training, mixture)
    trainer = PreferenceTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=trl.get_quantization_config(model),
        peft_config=trl.get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return Path(training.output_dir)


def _datasets(script: Any, training: Any, mixture: Any) -> tuple[Any, Any]:
    """(train, test or None)."""
    import trl
    from datasets import load_dataset

    evaluates = training.eval_strategy != "no"
    if mixture.datasets and script.dataset_name:
        raise ValueError("datasets and dataset_name are both given; leave one out")
    if mixture.datasets:
        found = trl.get_dataset(mixture)
    elif not script.dataset_name:
        raise ValueError("dataset_name or datasets is needed")
    elif Path(script.dataset_name).exists():
        if evaluates:
            raise ValueError(
                f"eval_strategy is {training.eval_strategy!r}, but {script.dataset_name} is a local file or folder, "
                "which has no splits; set it to 'no', or name a data set of the hub"
            )
        rows = read_groups(script.dataset_name)
        if training.image_root == ".":
            training.image_root = str(rows.root)
        return group_dataset(rows.groups), None
    else:
        found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    return found[script.dataset_train_split], found[script.dataset_test_split] if evaluates else None
