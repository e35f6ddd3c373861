"""read_groups: every published format by its exact schema, detected and forced."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from mmrlhf.data.formats import COLUMNS, PARSERS, detect, parse_ranking
from mmrlhf.data.readers import FORMATS, read_groups
from mmrlhf.data.schema import BadRow, Part
from records import (
    CONVERSATIONAL,
    PAIR,
    SHAREGPT,
    SWIFT,
    edges,
    kinds,
    parquet,
    rlhf_v_row,
    texts,
    write,
)

BENCH = Path(__file__).resolve().parents[3] / "shared" / "data" / "mm_reward_bench.jsonl"


def test_mm_rlhf_pairs_become_one_group(tmp_path):
    rows = [
        {**PAIR, "chosen_reason": "right", "rejected_reason": "wrong"},
        {**PAIR, "rejected": "A fish.", "chosen_reason": "right"},
        {**PAIR, "chosen": "A dog.", "rejected": "A fish."},
        {"id": "v", "video": "video/clip", "prompt": "And here?", "chosen": "x", "rejected": "y"},
        {"id": "two", "image": ["a.png", "b.png"], "prompt": "Both?", "chosen": "x", "rejected": "y"},
        {"id": "none", "prompt": "Text only?", "chosen": "x", "rejected": "y", "ls_factor": 0.5},
    ]
    found = read_groups(write(tmp_path / "dpo_pairs.jsonl", *rows))
    assert (found.format, found.rows, len(found)) == ("mm_rlhf", 6, 4)
    first, video, two, none = found.groups
    assert texts(first) == ["A cat.", "A dog.", "A fish."]
    assert edges(first) == [(0, 1), (0, 2), (1, 2)]
    assert [r.critique for r in first.responses] == ["right", "wrong", None]
    assert first.images[0].path == "mcq/a.png"
    assert kinds(first) == ["image", "text"]
    assert first.prompt[0].content[-1] == Part("text", "What?")
    assert kinds(video) == ["video", "text"]
    assert video.videos[0].path == "video/clip"
    assert kinds(two) == ["image", "image", "text"]
    assert kinds(none) == ["text"]
    assert none.meta == {"ls_factor": "0>1: 0.5"}
    assert none.preference_pairs()[0].margin is None  # ls_factor is no reward margin
    assert first.source.endswith("dpo_pairs.jsonl:1")
    assert found.root == tmp_path


@pytest.mark.skipif(not BENCH.exists(), reason=f"{BENCH} is absent")
def test_reward_bench_as_published():
    found = read_groups(BENCH)
    assert (found.format, found.rows, len(found.groups)) == ("mm_rlhf", 170, 46)
    assert sum(len(g.preference_pairs()) for g in found.groups) == 170
    assert sum(len(g.responses) for g in found.groups) == 170
    assert found.bad_rows == []
    assert (found.contradictions, found.duplicate_pairs, found.without_pairs) == (0, 0, [])
    assert found.ignored_columns == {}
    # (responses, pairs) of the groups, counted by hand from the file
    shapes = sorted((len(g.responses), len(g.preference_pairs())) for g in found.groups)
    assert shapes == sorted(
        [(4, 5)] * 11 + [(3, 2)] * 11 + [(4, 3)] * 7 + [(3, 3)] * 6 + [(4, 6)] * 5 + [(4, 4)] * 3 + [(5, 4)] * 3
    )
    assert all(r.critique for g in found.groups for r in g.responses)


def test_ranked_lists_with_ties(tmp_path):
    row = {"images": ["a.png"], "prompt": "What?", "responses": ["a", "b", "c", "d"]}
    rows = [
        {**row, "id": "string", "ranking": "1>2=3>4"},
        {**row, "id": "ranks", "prompt": "2", "ranks": [1, 2, 2, 4]},
        {**row, "id": "scores", "prompt": "3", "scores": [3.5, 1, 1, -2]},
        {
            **row,
            "id": "inside",
            "prompt": "4",
            "responses": [{"text": t, "rank": r} for t, r in zip("abcd", (1, 2, 2, 4), strict=True)],
        },
        {**row, "id": "listed", "prompt": "5", "pairs": [[0, 3], [1, 2, 0.5]]},
    ]
    found = read_groups(write(tmp_path / "ranked.jsonl", *rows))
    assert found.format == "mmrlhf"
    for group in found.groups[:4]:
        assert edges(group) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert [p.margin for p in found.groups[2].preference_pairs()] == [2.5, 2.5, 5.5, 3.0, 3.0]
    assert [(p.better, p.worse, p.margin) for p in found.groups[4].preference_pairs()] == [(0, 3, None), (1, 2, 0.5)]


def test_ranked_full_record(tmp_path):
    row = {
        "id": "r",
        "images": ["a.png"],
        "videos": ["clip"],
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        ],
        "responses": [
            {"text": "good one", "score": 2, "rank": 1, "critique": "fine", "segments": [[0, 4]]},
            {"text": "bad one", "score": 0.5, "rank": 2},
        ],
    }
    (group,) = read_groups(write(tmp_path / "x.jsonl", row)).groups
    assert kinds(group) == ["text", "video", "text", "image"]
    assert group.responses[0].segments == ((0, 4),)
    assert group.responses[0].critique == "fine"
    assert group.preference_pairs()[0].margin == 1.5


@pytest.mark.parametrize(
    ("text", "count", "ranks"),
    [("1>2=3>4", 4, (1, 2, 2, 4)), ("3>1>2", 3, (2, 3, 1)), (" 2 = 1 ", 2, (1, 1)), ("1=2>3", 3, (1, 1, 3))],
)
def test_ranking_strings(text, count, ranks):
    assert parse_ranking(text, count) == ranks


@pytest.mark.parametrize("text", ["1>2", "1>2>2", "1>2>4", "0>1>2", "1>>2>3", "", "a>b>c", "1>2>3>", "1,2,3", "²>1>3"])
def test_ranking_strings_refused(text):
    with pytest.raises(ValueError, match=r"must name each of 1..3 once|names 2 of 3"):
        parse_ranking(text, 3)


def test_rlhf_v_parquet(tmp_path, picture):
    rows = [
        rlhf_v_row(picture, 0),
        rlhf_v_row(picture, 1, rejected="A green cat."),
        rlhf_v_row(picture, 2, color=(9, 9, 9)),
    ]
    found = read_groups(parquet(tmp_path / "RLHF-V-Dataset.parquet", rows, row_group_size=1))
    assert (found.format, found.rows, len(found)) == ("rlhf_v", 3, 2)  # same picture and question: one group
    assert texts(found.groups[0]) == ["A red cat.", "A blue cat.", "A green cat."]
    assert found.groups[0].images[0].data == picture(color=(1, 2, 3))
    assert found.groups[0].id == "RLHF-V-0"
    assert found.groups[0].meta["origin_dataset"] == "coco"
    assert found.ignored_columns == {}
    as_jsonl = write(tmp_path / "old.jsonl", {**rlhf_v_row(picture, 0), "image": "images/a.jpg"})
    assert read_groups(as_jsonl).groups[0].images[0].path == "images/a.jpg"


def test_rlhf_v_text_with_cached_logps(tmp_path, picture):
    row = rlhf_v_row(picture, 0)
    row["text"] = json.dumps({**json.loads(row["text"]), "logps": [1, 2, [3], 4, 5, [6]]})
    assert len(read_groups(parquet(tmp_path / "x.parquet", [row]))) == 1


def test_rlaif_v_folder_of_parquet_files(tmp_path, picture):
    def row(idx, chosen, **more):
        return {
            "ds_name": "RLAIF-V",
            "image": {"bytes": picture(color=(idx, 0, 0)), "path": "x.jpg"},
            "question": "What is it?",
            "chosen": chosen,
            "rejected": "bad",
            "origin_dataset": "coco",
            "origin_split": "{}",
            "idx": str(idx),
            "image_path": "x.jpg",
            **more,
        }

    parquet(tmp_path / "RLAIF-V-Dataset_001.parquet", [row(2, "c", logps="{}")])
    parquet(tmp_path / "RLAIF-V-Dataset_000.parquet", [row(0, "a"), row(1, "b")])
    (tmp_path / "README.md").write_text("card")
    found = read_groups(tmp_path)
    assert (found.format, found.rows) == ("rlaif_v", 3)
    assert [g.responses[0].text for g in found.groups] == ["a", "b", "c"]
    assert found.ignored_columns == {"logps": 1}
    assert found.root == tmp_path


@pytest.mark.parametrize(
    "row",
    [
        CONVERSATIONAL,
        {**CONVERSATIONAL, "prompt": [{"role": "user", "content": "What?"}]},
        {**CONVERSATIONAL, "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."},
        {
            "images": ["a.png"],  # implicit prompt: what both sides begin with
            "chosen": CONVERSATIONAL["prompt"] + CONVERSATIONAL["chosen"],
            "rejected": CONVERSATIONAL["prompt"] + CONVERSATIONAL["rejected"],
        },
        {**{k: v for k, v in CONVERSATIONAL.items() if k != "images"}, "image": {"bytes": None, "path": "a.png"}},
    ],
    ids=["parts", "content string", "plain", "implicit", "single image"],
)
def test_trl_spellings(tmp_path, row):
    found = read_groups(write(tmp_path / "x.jsonl", {**row, "margin": 0.25}))
    (group,) = found.groups
    assert found.format == "trl"
    assert texts(group) == ["A cat.", "A dog."]
    assert kinds(group) == ["image", "text"]
    assert group.images[0].path == "a.png"
    assert group.preference_pairs()[0].margin == 0.25


def test_trl_text_only_rows_in_a_mixed_set(tmp_path):
    text = {**CONVERSATIONAL, "images": [], "prompt": [{"role": "user", "content": "Text?"}]}
    found = read_groups(write(tmp_path / "x.jsonl", CONVERSATIONAL, text))
    assert [len(g.images) for g in found.groups] == [1, 0]


def test_trl_save_to_disk_and_dataset_in_memory(tmp_path, picture):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pixels = [Image.new("RGB", (6, 5), (i * 40, 0, 0)) for i in range(3)]
    data = datasets.Dataset.from_list(
        [{**CONVERSATIONAL, "images": [image]} for image in pixels],
        features=datasets.Features(
            {
                "images": datasets.Sequence(datasets.Image()),
                "prompt": [
                    {
                        "role": datasets.Value("string"),
                        "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                    }
                ],
                "chosen": [
                    {
                        "role": datasets.Value("string"),
                        "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                    }
                ],
                "rejected": [
                    {
                        "role": datasets.Value("string"),
                        "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                    }
                ],
            }
        ),
    )
    data.save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "saved", data):
        found = read_groups(source)
        assert (found.format, found.rows, len(found)) == ("trl", 3, 3)
        assert all(g.images[0].data for g in found.groups)
        assert kinds(found.groups[0]) == ["image", "text"]
    data.to_parquet(str(tmp_path / "x.parquet"))
    assert len(read_groups(tmp_path / "x.parquet")) == 3
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(BadRow, match="a DatasetDict: name one of its splits"):
        read_groups(tmp_path / "dict")
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace('"filename": "', '"filename": "../'))
    with pytest.raises(BadRow, match="is not a plain name in this folder"):
        read_groups(tmp_path / "saved")


def test_llama_factory_sharegpt_and_alpaca(tmp_path):
    two = {**SHAREGPT, "system": "Be brief."}
    two["conversations"] = [
        {"from": "human", "value": "First <image> then <video>?"},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "Sure?"},
    ]
    two["videos"] = ["clip.mp4"]
    alpaca = {
        "instruction": "<image>Look",
        "input": "closely",
        "chosen": "x",
        "rejected": "y",
        "images": ["a.png"],
        "score_chosen": 3.0,
        "score_rejected": 1.0,
    }
    (tmp_path / "data.json").write_text(json.dumps([SHAREGPT, two, alpaca]))
    found = read_groups(tmp_path / "data.json")
    assert found.format == "llama_factory"
    first, second, third = found.groups
    assert kinds(first) == ["image", "text"]
    assert [m.role for m in second.prompt] == ["system", "user", "assistant", "user"]
    assert kinds(second) == ["text", "text", "image", "text", "video", "text", "text", "text"]
    assert third.prompt[0].content == (Part("image"), Part("text", "Look\nclosely"))
    assert third.preference_pairs()[0].margin == 2.0
    assert first.source.endswith("data.json:row 0")


@pytest.mark.parametrize(
    "row",
    [
        SWIFT,
        {**SWIFT, "rejected_response": [{"role": "assistant", "content": "A dog."}]},
        {k: v for k, v in SWIFT.items() if k != "rejected_response"}
        | {"rejected_messages": [SWIFT["messages"][0], {"role": "assistant", "content": "A dog."}]},
        {"query": "What?", "response": "A cat.", "rejected_response": "A dog.", "images": ["a.png"]},
    ],
    ids=["text", "message", "rejected_messages", "query"],
)
def test_swift_spellings(tmp_path, row):
    found = read_groups(write(tmp_path / "x.jsonl", row))
    (group,) = found.groups
    assert found.format == "swift"
    assert kinds(group) == ["image", "text"]
    assert texts(group) == ["A cat.", "A dog."]


def test_swift_several_rejected_and_refusals(tmp_path):
    several = {**SWIFT, "rejected_response": ["A dog.", "A fish."]}
    assert edges(read_groups(write(tmp_path / "a.jsonl", several)).groups[0]) == [(0, 1), (0, 2)]
    with pytest.raises(BadRow, match=r"b.jsonl:1: 'rejected_images' compares two images"):
        read_groups(write(tmp_path / "b.jsonl", {**SWIFT, "rejected_images": ["b.png"]}))
    other = {k: v for k, v in SWIFT.items() if k != "rejected_response"}
    other["rejected_messages"] = [{"role": "user", "content": "Else?"}, SWIFT["messages"][1]]
    with pytest.raises(BadRow, match="must repeat the prompt of 'messages' exactly"):
        read_groups(write(tmp_path / "c.jsonl", other))


def test_data_addresses_in_rows(tmp_path, picture):
    uri = "data:image/png;base64," + base64.b64encode(picture()).decode()
    assert read_groups(write(tmp_path / "x.jsonl", {**PAIR, "image": uri})).groups[0].images[0].data == picture()


def test_format_can_be_forced_and_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR)
    assert read_groups(path, format="trl").format == "trl"
    with pytest.raises(BadRow, match=r"'conversations' must be a list|'instruction' is missing"):
        read_groups(path, format="llama_factory")
    with pytest.raises(ValueError, match="format must be one of auto, mm_rlhf"):
        read_groups(path, format="csv")
    assert set(FORMATS) == {"auto", *PARSERS}
    assert set(COLUMNS) == set(PARSERS)


def test_detection_goes_by_most_of_the_first_rows(tmp_path):
    rows = [{"chosen": "x", "rejected": "y"}, PAIR, {**PAIR, "id": "b", "prompt": "B?"}]
    found = read_groups(write(tmp_path / "x.jsonl", *rows), on_bad_row="skip", max_bad_rows=1.0)
    assert (found.format, len(found), len(found.bad_rows)) == ("mm_rlhf", 2, 1)
    with pytest.raises(BadRow, match=r"no known format .* has columns a, b"):
        read_groups(write(tmp_path / "y.jsonl", {"b": 1, "a": 2}))
    assert detect({"a": 1}) is None
