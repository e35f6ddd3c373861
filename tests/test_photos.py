"""The photos example, from the wheels to a trained model: real pictures of many shapes, at native resolution."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from mmrlhf import config
from mmrlhf.data.images import open_image
from mmrlhf.data.readers import read_groups

for name, package in (("skimage", "scikit-image"), ("sklearn", "scikit-learn")):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the photographs ship inside {package}, which is not installed", allow_module_level=True)

HERE = Path(__file__).resolve().parents[1] / "examples" / "photos"


@pytest.fixture(scope="module")
def example():
    """examples/photos/build.py as a module."""
    spec = importlib.util.spec_from_file_location("photos_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def entries(example) -> list[dict]:
    import yaml

    return yaml.safe_load(example.TEXTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(example, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    counts = example.build(folder)
    assert counts == {"pictures": 16, "responses": 66, "pairs": 97, "corrections": 18}
    return folder


def question(group) -> str:
    return "".join(part.text for message in group.prompt for part in message.content)


def better_and_worse(groups) -> set[tuple[str, str, str, float | None]]:
    """Every pair as (prompt, better text, worse text, margin)."""
    return {
        (question(group), group.responses[pair.better].text, group.responses[pair.worse].text, pair.margin)
        for group in groups
        for pair in group.preference_pairs()
    }


def test_ranked_lists_are_in_order_and_have_ties(entries):
    ties = 0
    for entry in entries:
        responses = entry["ranked"]["responses"]
        assert 3 <= len(responses) <= 5, entry["id"]
        assert len({r["text"] for r in responses}) == len(responses)
        levels = [(r["rank"], -r["score"]) for r in responses]
        assert levels == sorted(levels), entry["id"]
        assert len({r["rank"] for r in responses}) == len(set(levels)) == responses[-1]["rank"], entry["id"]
        ties += len(responses) - responses[-1]["rank"]
    assert ties == 7
    assert len({entry["id"] for entry in entries}) == len(entries) == 16


def test_corrections_replace_delete_and_insert(example, entries):
    kinds = {"replace": 0, "delete": 0, "insert": 0}
    for entry in entries:
        for correction in entry["corrections"]:
            for mark in example.CORRECTION.finditer(correction["text"]):
                kinds["delete" if not mark[2] else "insert" if not mark[1] else "replace"] += 1
    assert min(kinds.values()) >= 10, kinds


def test_a_correction_changes_nothing_outside_its_segments(example, entries):
    for entry in entries:
        for correction in entry["corrections"]:
            rests = []
            for response in example.split_correction(correction["text"]):
                rest = list(response.text)
                for start, end in reversed(response.segments):
                    del rest[start:end]
                rests.append("".join(rest))
                assert "  " not in response.text, response.text
                assert response.text == response.text.strip()
                assert response.text[0].isupper(), response.text
                assert response.text.endswith("."), response.text
                for mark in (" .", " ,", "..", ",,"):
                    assert mark not in response.text, response.text
            assert rests[0] == rests[1]


def test_split_correction_by_hand(example):
    rejected, chosen = example.split_correction("A {blue|dark red} cup{, hot|} stands{| here}.")
    assert (rejected.text, chosen.text) == ("A blue cup, hot stands.", "A dark red cup stands here.")
    assert [rejected.text[a:b] for a, b in rejected.segments] == ["blue", ", hot"]
    assert [chosen.text[a:b] for a, b in chosen.segments] == ["dark red", " here"]


@pytest.mark.parametrize("text", ["nothing to correct.", "{one side only} of {a|b}.", "{a|b|c} and {d|e}."])
def test_broken_corrections_are_refused(example, text):
    with pytest.raises(ValueError, match="no correction of the form"):
        example.split_correction(text)


def test_pictures_are_distinct_and_whole(built, entries):
    files = sorted((built / "images").iterdir())
    assert len(files) == 16
    assert len({file.read_bytes() for file in files}) == 16
    shapes = set()
    for file in files:
        with Image.open(file) as picture:
            picture.load()
            assert max(picture.size) <= 768
            shapes.add(picture.size)
    assert len(shapes) >= 8  # many shapes: no batch of them can be stacked without cropping or native resolution


def test_pictures_are_copied_byte_for_byte_unless_too_large(example, built, entries):
    scaled = []
    for entry in entries:
        source = example.find_picture(entry["picture"])
        copy = built / "images" / f"{entry['id']}{source.suffix}"
        if copy.read_bytes() != source.read_bytes():
            scaled.append(entry["id"])
    assert scaled == ["galaxies", "retina"]


def test_a_picture_that_does_not_ship_is_never_fetched(example):
    with pytest.raises(FileNotFoundError, match=r"scikit-image .* has no data/eagle\.png in its wheel"):
        example.find_picture("skimage/eagle.png")


def test_a_missing_package_is_named(example, monkeypatch):
    monkeypatch.setattr(example.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        example.find_picture("sklearn/china.jpg")


def test_every_format_says_the_same(built):
    ranked = read_groups(built / "ranked.jsonl")
    pairs = read_groups(built / "dpo_pairs.jsonl")
    assert (ranked.format, pairs.format) == ("mmrlhf", "mm_rlhf")
    assert not ranked.bad_rows
    assert not pairs.bad_rows
    assert len(ranked.groups) == len(pairs.groups) == 16
    assert pairs.rows == 97
    assert better_and_worse(ranked.groups) == better_and_worse(pairs.groups)
    critiques = [{r.text: r.critique for g in read.groups for r in g.responses} for read in (ranked, pairs)]
    assert critiques[0] == critiques[1]

    spans = read_groups(built / "corrections.jsonl")
    parquet = read_groups(built / "rlhf_v.parquet")
    assert (spans.format, parquet.format) == ("mmrlhf", "rlhf_v")
    assert len(spans.groups) == len(parquet.groups) == parquet.rows == 18
    assert better_and_worse(spans.groups) == better_and_worse(parquet.groups)
    assert all(r.segments is not None for g in spans.groups for r in g.responses)


def test_ranked_lists_read_back_whole(built, entries):
    groups = read_groups(built / "ranked.jsonl").groups
    for entry, group in zip(entries, groups, strict=True):
        wanted = entry["ranked"]["responses"]
        assert question(group) == entry["ranked"]["prompt"]
        got = [{"rank": r.rank, "score": r.score, "text": r.text, "critique": r.critique} for r in group.responses]
        assert got == wanted


def test_parquet_has_the_published_columns(built):
    import pyarrow.parquet as pq

    table = pq.read_table(built / "rlhf_v.parquet")
    columns = ["ds_name", "image", "text", "origin_dataset", "origin_split", "idx", "image_path"]
    assert table.column_names == columns
    row = table.slice(0, 1).to_pylist()[0]
    assert list(json.loads(row["text"])) == ["question", "chosen", "rejected"]
    assert json.loads(row["origin_split"])["type"] == "detailed_description"
    assert row["image"]["bytes"] == (built / "images" / "astronaut.png").read_bytes()
    assert table.column("idx").to_pylist() == list(range(18))


def test_parquet_pictures_are_the_same(built):
    spans, parquet = (read_groups(built / name) for name in ("corrections.jsonl", "rlhf_v.parquet"))
    limits = {"max_pixels": 10**7, "max_bytes": 10**7}
    for one, other in zip(spans.groups, parquet.groups, strict=True):
        images = [open_image(g.images[0], r.root, **limits) for g, r in ((one, spans), (other, parquet))]
        assert images[0].mode == "RGB"
        assert images[0].tobytes() == images[1].tobytes()


@pytest.fixture
def native():
    """A tiny Qwen2.5-VL whose processor has the published limits: none of the pictures is scaled down."""
    from tiny import tiny_model

    model, processor = tiny_model("qwen2_5_vl")
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}
    return model, processor


def run_on(built: Path, recipe: str, data: str, output: Path, native, *words: str) -> list[dict]:
    """Train with one of the example's recipes and return the lines of metrics.jsonl."""
    from mmrlhf.train.loop import train

    model, processor = native
    common = [f"data.path={built / data}", f"output={output}", "device=cpu", "samples=2", "sample_tokens=4"]
    assert train(config.load(HERE / recipe, [*common, *words]), model=model, processor=processor) == output
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_processor_sees_every_picture_at_its_own_resolution(built, native):
    from mmrlhf.data.collate import Encoder

    found = read_groups(built / "ranked.jsonl")
    encoder = Encoder(native[1], root=found.root)
    grids = set()
    for group in found.groups:
        with Image.open(built / str(group.images[0].path)) as picture:
            width, height = picture.size
        encoded = encoder.encode(group)
        grid = encoded.vision["image_grid_thw"].tolist()
        assert grid == [[1, 2 * round(height / 28), 2 * round(width / 28)]], group.id  # patches of 14, merged by 2 x 2
        image_token = native[1].tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert int((encoded.prefix_ids == image_token).sum()) == grid[0][1] * grid[0][2] // 4
        grids.add(tuple(grid[0]))
    assert len(grids) >= 8


def test_mm_dpo_trains_on_ranked_lists(built, native, tmp_path):
    steps = run_on(built, "mm_dpo.yaml", "ranked.jsonl", tmp_path / "run", native, "max_steps=2", "optim.lr=1e-3")
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["images"] for line in steps] == [4, 4]  # each picture once, however many responses it has
    first = steps[0]  # the policy is the reference: every margin is 0 and the preference loss ln 2
    assert first["loss"] == pytest.approx(math.log(2) + 0.25 * first["sft_loss"], abs=2e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for line in steps:
        assert all(math.isfinite(value) for value in line.values())
        # beta (1 + w (1 - exp(-k margin))), margins between 1 and 5
        assert (
            0.1 * (1 + 0.5 * (1 - math.exp(-0.5))) - 1e-6 <= line["beta/min"] <= line["beta/mean"] <= line["beta/max"]
        )
        assert line["beta/max"] <= 0.1 * (1 + 0.5 * (1 - math.exp(-2.5))) + 1e-6


def test_ddpo_learns_the_corrections_and_the_report_shows_them(built, native, tmp_path):
    words = ("groups_per_step=18", "max_steps=3", "optim.lr=3e-3", "optim.warmup=0")
    steps = run_on(built, "rlhf_v.yaml", "rlhf_v.parquet", tmp_path / "run", native, *words)
    assert [line["images"] for line in steps] == [18, 18, 18]
    losses = [line["loss"] for line in steps]  # every step is all of the data
    assert losses[0] == pytest.approx(math.log(2), abs=2e-6)
    assert losses[2] < losses[1] < losses[0]
    assert steps[2]["rewards/accuracies"] > 0.9

    pytest.importorskip("matplotlib")
    from mmrlhf.report import write_report

    html = write_report(tmp_path / "run").read_text()
    assert html.count("<img ") == 2
    assert "18 groups · 18 pairs" in html
    assert "What this folder lacks" not in html
