"""Loading: what is whole loads bitwise, everything else is refused by name (M01 to M04, M07, D16)."""

from __future__ import annotations

import json
import shutil
import socket
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmrlhf.models import load, shared_prefix
from mmrlhf.models.parts import lm_head
from tiny import FAMILIES, batch_of, read_json, tiny_folder, tiny_groups, tiny_image, tiny_messages, tiny_model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_folder("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def folder(original, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    """A folder with several shards and an index."""
    model, processor = tiny_model("llava")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "shards")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    return tmp_path / "shards"


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    """Save, load, save, load: weights bitwise, ids and pixels equal, the pair accepted."""
    model, processor = tiny_model(family)
    first = load.save_pretrained(model, processor, tmp_path / "first")
    once = load.load_processor(first)  # with torchvision its pixels differ from the PIL original's by up to 0.016
    second = load.save_pretrained(load.load_model(first), once, tmp_path / "second")
    again, reloaded = load.load_model(second), load.load_processor(second)
    assert again.training
    want = dict(model.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in again.named_parameters())
    load.check_pair(again, reloaded)
    groups = [tiny_groups(each, (2, 1), images=(2, 0)) for each in (once, reloaded, processor)]
    for one, other, made in zip(*groups, strict=True):
        assert one.prefix == other.prefix == made.prefix
        assert one.vision.keys() == other.vision.keys()
        assert all(torch.equal(one.vision[key], other.vision[key]) for key in one.vision)
    assert not list(second.glob("*.bin"))


def test_shards_load(shards):
    model = load.load_model(shards, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_m07_loads_without_the_network(original, monkeypatch):
    """Everything is local, so no socket is opened."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load.load_model(original)
    load.load_processor(original)


# M01: code from the hub


def test_m01_remote_code_is_refused_and_the_flag_named(folder):
    config = read_json(folder / "config.json")
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "configuration_my.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"code of its own \(configuration_my.MyConfig\).*trust_remote_code=True"):
        load.load_model(folder)


def test_m01_native_model_with_an_auto_map_loads_natively(folder):
    config = read_json(folder / "config.json") | {"auto_map": {"AutoConfig": "configuration_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_evil.py").write_text("raise SystemExit('code from the folder was run')")
    assert type(load.load_model(folder)).__name__ == "LlavaForConditionalGeneration"


def test_m01_remote_code_in_a_processor_is_refused(folder):
    for name in ("processor_config.json", "tokenizer_config.json"):
        config = read_json(folder / name)
        config["processor_class"] = "MyOwnProcessor"
        config["auto_map"] = {"AutoProcessor": "processing_my.MyOwnProcessor"}
        (folder / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load.load_processor(folder)


def test_m01_trusting_a_hub_id_needs_a_revision():
    with pytest.raises(ValueError, match="pin the revision"):
        load.load_model("someone/model", trust_remote_code=True)


def test_m01_code_from_another_repository_is_refused_even_when_trusted(folder):
    config = read_json(folder / "config.json")
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "else/where--configuration.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="from another repository"):
        load.load_model(folder, trust_remote_code=True)


def test_unknown_model_type(folder):
    config = read_json(folder / "config.json") | {"model_type": "not_yet_written"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'not_yet_written' is not in this version of transformers"):
        load.load_model(folder)


# M02: pickles


def test_m02_pickled_weights_are_refused_with_the_cure(folder):
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"only as pickle \(pytorch_model.bin\).*Convert them once"):
        load.load_model(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights: neither model\.safetensors"):
        load.load_model(folder)


# M03: corrupt safetensors


def header_of(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def huge_header(path):
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 62) + raw[8:])


def overlapping(path):
    header, data = header_of(path)
    names = [name for name in header if name != "__metadata__"]
    sizes = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}
    a, b = next((x, y) for x in names for y in names if x < y and sizes[x] == sizes[y])
    header[a]["data_offsets"] = header[b]["data_offsets"]
    write(path, header, data)


def lying_dtype(path):
    header, data = header_of(path)
    name = next(name for name in header if name != "__metadata__")
    header[name]["dtype"] = "F16"
    write(path, header, data)


def not_json(path):
    path.write_bytes(struct.pack("<Q", 5) + b"{{{{{" + path.read_bytes())


@pytest.mark.parametrize("spoil", [truncated, empty, huge_header, overlapping, lying_dtype, not_json])
def test_m03_corrupt_weights_are_named(folder, spoil):
    spoil(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model/model\.safetensors is not a whole safetensors file"):
        load.load_model(folder)


def test_m03_corrupt_and_missing_shards_are_named(shards):
    files = sorted(shards.glob("model-*.safetensors"))
    truncated(files[1])
    with pytest.raises(ValueError, match=f"{files[1].name} is not a whole safetensors file"):
        load.load_model(shards)
    files[1].unlink()
    with pytest.raises(ValueError, match=rf"{files[1].name} is missing: model\.safetensors\.index\.json lists \d+"):
        load.load_model(shards)


def test_m03_shard_outside_the_folder_is_refused(shards):
    index = read_json(shards / "model.safetensors.index.json")
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "../elsewhere.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must be a file in the same folder"):
        load.load_model(shards)


def test_m03_shard_without_a_listed_tensor(shards):
    file = sorted(shards.glob("model-*.safetensors"))[0]
    state = load_file(file)
    state.pop(sorted(state)[0])
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{file.name} lacks tensors that model.safetensors.index.json lists"):
        load.load_model(shards)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state, key: state.pop(key), "1 missing keys: .*gate_proj.weight"),
        (lambda state, key: state.update(extra=torch.zeros(2)), "1 unexpected keys: extra"),
        (lambda state, key: state.update({key: torch.zeros(3, 3)}), "1 mismatched keys: .*gate_proj.weight"),
    ],
)
def test_m03_no_half_loaded_model(folder, change, word):
    state = load_file(folder / "model.safetensors")
    key = next(key for key in state if key.endswith("layers.0.mlp.gate_proj.weight"))
    change(state, key)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=word):
        load.load_model(folder)


def test_tied_weights_are_not_missing(tmp_path):
    model, processor = tiny_model("gemma3")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    folder = load.save_pretrained(model, processor, tmp_path)
    again = load.load_model(folder)
    assert lm_head(again).weight is again.get_input_embeddings().weight


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="not in the hub cache"):
        load.load_model("no-one-at-all/nothing-here")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load.load_model(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        load.load_model(tmp_path, dtype="int7")


@pytest.mark.parametrize(
    ("file", "of"),
    [
        ("config.json", "both"),
        ("generation_config.json", "model"),
        ("tokenizer.json", "processor"),
        ("tokenizer_config.json", "processor"),
        ("processor_config.json", "processor"),
    ],
)
def test_m03_broken_json_is_named(file, of, folder):
    assert (folder / file).is_file() or of == "model"
    (folder / file).write_text("{")
    for part, function in (("model", load.load_model), ("processor", load.load_processor)):
        if of in (part, "both"):
            with pytest.raises(ValueError, match=rf"model/{file} is not valid JSON"):
                function(folder)


def test_a_folder_without_a_model_is_named(tmp_path):
    """A run reads the processor first, and transformers' own error speaks of "processing classes"."""
    for function in (load.load_model, load.load_processor):
        with pytest.raises(ValueError, match=rf"{tmp_path}.* not a model folder"):
            function(tmp_path)


def test_revision_of_a_local_folder_is_refused(folder):
    for function in (load.load_model, load.load_processor):
        with pytest.raises(
            ValueError, match=r"revision names a commit of a hub id, got 'c0ffee'; .* is a local folder"
        ):
            function(folder, revision="c0ffee")


# M04, D16: model and processor that do not belong together


def test_m04_tokenizer_larger_than_the_head():
    model, processor = tiny_model("llava")
    rows = lm_head(model).weight.shape[0]
    processor.tokenizer.add_tokens(["<new1>", "<new2>"])
    with pytest.raises(ValueError, match=f"{rows + 2} entries but the model's lm_head only {rows} rows"):
        load.check_pair(model, processor)


def test_m04_no_pad_token():
    model, processor = tiny_model("llava")
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        load.check_pair(model, processor)


def test_m04_processor_of_another_model():
    model, _ = tiny_model("qwen2_5_vl")
    _, processor = tiny_model("llava_onevision")
    with pytest.raises(ValueError, match=r"writes image token \d+ but the model's config reads \d+"):
        load.check_pair(model, processor)


# PEFT


def test_an_adapter_is_saved_alone_and_loads_on_its_base(original, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = load.load_model(original), load.load_processor(original)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    saved = load.save_pretrained(tuned, processor, tmp_path / "adapter")
    assert not (saved / "model.safetensors").exists()
    again = load.load_model(saved)
    assert any(parameter.requires_grad for parameter in again.parameters())
    batch = batch_of(tiny_groups(processor, (2,)))
    got, want = (shared_prefix.response_hidden(each, batch) for each in (again, tuned))
    assert torch.equal(got, want)
    truncated(saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        load.load_model(saved)


def test_images_of_a_loaded_processor_are_rgb_whatever_came(original):
    """A palette or grey image must not reach the model as another shape."""
    processor = load.load_processor(original)
    text = processor.apply_chat_template(tiny_messages(1), add_generation_prompt=True, tokenize=False)
    for mode in ("RGB", "L", "P", "RGBA"):
        out = processor(text=[text], images=[[tiny_image().convert(mode)]], return_tensors="pt")
        assert out["pixel_values"].shape == (1, 3, 28, 28)
