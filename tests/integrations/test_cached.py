"""The cached reference column: read where it is, made anew where what it depends on has changed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from dporows import lora, model_and_processor, trl_rows  # noqa: E402
from mmrlhf.integrations import cached  # noqa: E402
from mmrlhf.integrations.cached import with_reference  # noqa: E402
from mmrlhf.integrations.rows import BATCH, REFERENCE, PreferenceCollator  # noqa: E402
from mmrlhf.train.reference import reference_key  # noqa: E402
from tiny import tiny_image  # noqa: E402

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def processor():
    return model_and_processor("llava_onevision")[1]


class Score:
    """Numbers that depend on the batch alone, and the rows of each batch that was asked for."""

    def __init__(self, fail_after: int | None = None):
        self.seen: list[int] = []
        self.fail_after = fail_after

    def __call__(self, packed) -> torch.Tensor:
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen.append(packed.batch.num_groups)
        return -packed.batch.targets.float() / 8


def column(dataset) -> list[list[float]]:
    return [list(row[REFERENCE]) for row in dataset]


def expected(dataset, collator) -> list[list[float]]:
    return [(-collator([row])[BATCH].batch.targets.float() / 8).tolist() for row in dataset]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cached, "SHARD_GROUPS", 4)


def test_the_column_is_read_the_second_time(processor, tmp_path):
    rows, collator = datasets.Dataset.from_list(trl_rows(10)), PreferenceCollator(processor)
    first, second = Score(), Score()
    made = with_reference(rows, collator, first, tmp_path, key="a" * 64, batch_size=3)
    assert first.seen == [3, 1, 3, 1, 2]  # shards of four in batches of three
    assert column(made) == expected(rows, collator)
    again = with_reference(rows, collator, second, tmp_path, key="a" * 64, batch_size=3)
    assert second.seen == []
    assert column(again) == column(made)
    assert again.column_names == [*rows.column_names, REFERENCE]
    # Mapped from the file, not read into memory; and a column that was there is replaced.
    assert any(file["filename"].endswith(".arrow") and str(tmp_path) in file["filename"] for file in again.cache_files)
    assert column(with_reference(again, collator, Score(), tmp_path, key="b" * 64, batch_size=3)) == column(made)


def test_whatever_the_numbers_depend_on_is_in_the_name(processor, tmp_path):
    rows, collator = trl_rows(4), PreferenceCollator(processor)
    other_picture = [dict(rows[0], images=[tiny_image(28, 28, seed=77)]), *rows[1:]]
    other_text = [dict(rows[0], chosen=rows[1]["chosen"]), *rows[1:]]
    plain = {"key": "a" * 64, "batch_size": 2}
    with_reference(datasets.Dataset.from_list(rows), collator, Score(), tmp_path, **plain)
    for changed, collate, settings in (
        (other_picture, collator, {}),
        (other_text, collator, {}),
        (rows[::-1], collator, {}),
        (rows, PreferenceCollator(processor, max_length=64), {}),
        (rows, PreferenceCollator(processor, segments="paper"), {}),
        (rows, collator, {"key": "b" * 64}),
        (rows, collator, {"batch_size": 3}),
    ):
        score = Score()
        with_reference(datasets.Dataset.from_list(changed), collate, score, tmp_path, **plain | settings)
        assert score.seen


def test_a_killed_run_keeps_its_whole_shards(processor, tmp_path):
    rows, collator = datasets.Dataset.from_list(trl_rows(12)), PreferenceCollator(processor)
    with pytest.raises(KeyboardInterrupt):
        with_reference(rows, collator, Score(fail_after=3), tmp_path, key="a" * 64, batch_size=2)
    rest = Score()
    made = with_reference(rows, collator, rest, tmp_path, key="a" * 64, batch_size=2)
    assert rest.seen == [2] * 4  # the second and third shard
    assert column(made) == expected(rows, collator)


def test_a_damaged_shard_is_computed_again(processor, tmp_path):
    rows, collator = datasets.Dataset.from_list(trl_rows(3)), PreferenceCollator(processor)
    made = with_reference(rows, collator, Score(), tmp_path, key="a" * 64, batch_size=2)
    (shard,) = tmp_path.rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    score = Score()
    with pytest.warns(UserWarning, match="computed again"):
        again = with_reference(rows, collator, score, tmp_path, key="a" * 64, batch_size=2)
    assert score.seen
    assert column(again) == column(made)


def test_processes_share_the_rows_and_agree(processor, tmp_path):
    """Seven rows for two: equally many batches each, every row scored, the same column as one process makes."""
    rows, collator = datasets.Dataset.from_list(trl_rows(7)), PreferenceCollator(processor)
    barrier, board = threading.Barrier(2), {}

    class Threaded:
        def __init__(self, rank):
            self.rank, self.world, self.writes = rank, 2, rank == 0

        def gather(self, items):
            board[self.rank] = items
            barrier.wait(60)
            merged = board[0] + board[1]
            barrier.wait(60)
            return merged

    scores, made = [Score(), Score()], {}

    def work(rank):
        made[rank] = with_reference(
            rows, collator, scores[rank], tmp_path, key="a" * 64, batch_size=1, processes=Threaded(rank)
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert scores[0].seen == scores[1].seen == [1] * 4
    assert column(made[0]) == column(made[1]) == expected(rows, collator)


def test_formats_and_transforms_stay(processor, tmp_path):
    from mmrlhf.data.readers import read_groups
    from mmrlhf.integrations.trl_yaml import group_dataset

    collator = PreferenceCollator(processor)
    groups = group_dataset(read_groups(trl_rows(3)).groups)
    made = with_reference(groups, collator, Score(), tmp_path, key="a" * 64, batch_size=2)
    assert column(made) == expected(groups, collator)
    assert made[1]["group"] == groups[1]["group"]
    rows = datasets.Dataset.from_list(trl_rows(5)).select([4, 0, 2])
    made = with_reference(rows, collator, Score(), tmp_path, key="a" * 64, batch_size=2)
    assert column(made) == expected(rows, collator)
    assert made[0]["prompt"] == rows[0]["prompt"]


def test_a_number_that_is_not_finite_names_its_row(processor, tmp_path):
    rows = datasets.Dataset.from_list([{**row, "id": f"r{i}"} for i, row in enumerate(trl_rows(2))])
    with pytest.raises(ValueError, match=r"row .*r0.*not finite"):
        with_reference(
            rows,
            PreferenceCollator(processor),
            lambda packed: torch.full((packed.batch.num_scored,), float("nan")),
            tmp_path,
            key="a" * 64,
            batch_size=1,
        )


def test_the_key_of_a_switched_off_adapter_is_that_of_the_model_below():
    from peft import get_peft_model

    model, _ = model_and_processor("llava_onevision")
    keys = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), lora())
        keys.append([reference_key(adapted, share_prefix=True, adapter=on) for on in (True, False)])
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] == keys[1][1]
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    assert reference_key(get_peft_model(model, lora()), share_prefix=True, adapter=False) != keys[0][1]
