"""`mmrlhf trl config.yaml`: the keys of `trl dpo`, local data of any format, errors in one line."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl", "1.15", reason="TRL 1.15 or later is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

from mmrlhf.cli import main
from tiny import tiny_folder, tiny_image

pytestmark = pytest.mark.hosts

RUN = """
model_name_or_path: {model}
dataset_name: {data}
output_dir: {out}
learning_rate: 1e-3
per_device_train_batch_size: 2
max_steps: 3
logging_steps: 1
report_to: none
save_strategy: "no"
use_cpu: true
bf16: false
gradient_checkpointing: false
precompute_ref_log_probs: {cached}
beta_mode: margin
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.25]
{more}
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("trl_yaml")
    tiny_folder("llava_onevision", root / "model")
    (root / "data").mkdir()
    rows = []
    for index in range(5):
        tiny_image(28, 28, seed=index).save(root / "data" / f"{index}.png")
        texts = [f"a cat {index}", f"a dog {index}", "a red square"]
        responses = [{"text": text, "score": 2.0 - i} for i, text in enumerate(texts)]
        rows.append({"id": f"r{index}", "images": [f"{index}.png"], "prompt": "what is it ?", "responses": responses})
    (root / "data" / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write(places, name, *, cached="false", more="", data="data/ranked.jsonl"):
    path = places / f"{name}.yaml"
    path.write_text(RUN.format(model=places / "model", data=places / data, out=places / name, cached=cached, more=more))
    return str(path)


@pytest.mark.parametrize("cached", ["false", "true"])
def test_a_run_from_yaml(places, cached, capsys):
    name = f"run-{cached}"
    assert main(["trl", write(places, name, cached=cached), "--max_steps", "2"]) == 0
    assert f"the model lies in {places / name}" in capsys.readouterr().out
    assert (places / name / "model.safetensors").exists()


def test_lora_from_yaml(places):
    more = "use_peft: true\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]"
    assert main(["trl", write(places, "lora", more=more)]) == 0
    assert (places / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("pad_to_multiple_of: 8", "pad_to_multiple_of = 8 is not supported by mmrlhf"),
        ("eval_strategy: steps\neval_steps: 1", "which has no splits"),
        ("segments: words", "segments must be None or one of"),
        ("no_such_key: 3", "no_such_key"),
    ],
)
def test_errors_are_one_line(places, more, message, capsys):
    assert main(["trl", write(places, "bad", more=more)]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_missing_file_is_named(capsys):
    assert main(["trl", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such file" in capsys.readouterr().err
