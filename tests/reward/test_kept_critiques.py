"""Tokens of critiques kept on the disk: bitwise those that are made, ties included, and made anew where they differ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mmrlhf.data import dataset as dataset_module
from mmrlhf.data.collate import PreferenceDataset
from mmrlhf.data.encode import CHECKED
from mmrlhf.data.schema import ListedPair, PreferenceGroup
from mmrlhf.reward.encode import CritiqueEncoder, CritiqueGroup
from mmrlhf.reward.train import train
from rewarddata import critiqued_file, with_critiques
from tiny import tiny_model
from tinyrun import facts_of, make_groups, metrics_of, settings_for


@pytest.fixture(scope="module")
def processor():
    return tiny_model("llava_onevision")[1]


@pytest.fixture
def groups(tmp_path) -> list[PreferenceGroup]:
    """Two blocks of 4: ties by rank and by name, one without critiques, one without a picture, margins."""
    found = with_critiques(make_groups(tmp_path, 7), without=())
    (plain,) = with_critiques(make_groups(tmp_path, 1), without=(0, 1, 2))
    found.append(dataclasses.replace(plain, id="plain"))
    first, second, third = found[5].responses
    found[5] = dataclasses.replace(found[5], responses=(first, second, dataclasses.replace(third, rank=second.rank)))
    found[6] = named_tie(found[6], (1, 2))
    return found


def named_tie(group: PreferenceGroup, *ties: tuple[int, int]) -> PreferenceGroup:
    unranked = tuple(dataclasses.replace(response, rank=None) for response in group.responses)
    return dataclasses.replace(group, responses=unranked, pairs=(ListedPair(0, 1, 0.25),), ties=ties)


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Ids of the groups whose tokens were made, in order."""
    monkeypatch.setattr(dataset_module, "BLOCK", 4)
    ids, real = [], CritiqueEncoder._encode
    monkeypatch.setattr(CritiqueEncoder, "_encode", lambda self, g, looks: ids.append(g.id) or real(self, g, looks))
    return ids


def bits(data: PreferenceDataset) -> list:
    """Everything a data set gives that is not pixels, as bytes with dtypes and shapes."""
    rows = []
    for index in range(len(data)):
        each = data.text(index)
        assert type(each) is CritiqueGroup
        tensors = (*each.response_ids, *each.weights, each.prefix_ids, each.pairs, each.margin, each.ties)
        tensors += tuple(each.aligned.values())
        facts = (each.id, each.responses, each.images, list(each.aligned))
        rows.append((facts, [(t.dtype, t.shape, t.numpy().tobytes()) for t in tensors]))
    return rows


def test_a_second_start_reads_what_the_first_made(processor, groups, tmp_path, made):
    """Bitwise, but for the first few, which are made again and compared; not those of preferences in the folder."""
    folder = tmp_path / "kept"
    plain = PreferenceDataset(groups, CritiqueEncoder(processor, root=tmp_path))
    first = PreferenceDataset(groups, CritiqueEncoder(processor, root=tmp_path, looks=folder))
    files = sorted(path.name for path in (folder / "tokens").iterdir())
    assert len(files) == 2
    made.clear()
    second = PreferenceDataset(groups, CritiqueEncoder(processor, root=tmp_path, looks=folder))
    assert set(made) == {group.id for group in groups[:CHECKED]}
    assert bits(plain) == bits(first) == bits(second)
    assert [second.text(index).ties.tolist() for index in (5, 6)] == [[False, False, True], [False, True]]
    assert sorted(path.name for path in (folder / "tokens").iterdir()) == files
    PreferenceDataset(groups, type(plain.encoder).__mro__[1](processor, root=tmp_path, looks=folder))
    assert len(list((folder / "tokens").iterdir())) == 4, "the same groups as preferences are other tokens"


@pytest.mark.parametrize(
    "change",
    [
        lambda group: named_tie(group, (0, 2)),
        lambda group: named_tie(group),
        lambda group: dataclasses.replace(
            group, responses=tuple(dataclasses.replace(r, critique="the dog is green") for r in group.responses)
        ),
    ],
    ids=["another tie", "no tie", "critique"],
)
def test_another_row_is_another_block(processor, groups, tmp_path, made, change):
    """A row that changed after the compared ones: nothing but its key could tell."""
    kept = [CritiqueEncoder(processor, root=tmp_path, looks=tmp_path / "kept") for _ in range(2)]
    PreferenceDataset(groups, kept[0])
    other = [*groups[:6], change(groups[6]), groups[7]]
    plain = PreferenceDataset(other, CritiqueEncoder(processor, root=tmp_path))
    assert bits(PreferenceDataset(other, kept[1])) == bits(plain)
    assert len(list((tmp_path / "kept" / "tokens").iterdir())) == 3


def test_ties_that_a_file_has_wrong_are_found(processor, groups, tmp_path, made, caplog):
    """As a defect of what wrote it would leave them: the compared groups tell, and all are made again."""
    folder = tmp_path / "kept"
    tied = [groups[5], *groups[:3]]
    plain = PreferenceDataset(tied, CritiqueEncoder(processor, root=tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrlhf.reward.encode.tied_pairs", lambda group: ())
        PreferenceDataset(tied, CritiqueEncoder(processor, root=tmp_path, looks=folder))
    again = PreferenceDataset(tied, CritiqueEncoder(processor, root=tmp_path, looks=folder))
    assert "the tokens of group g5 are others now; all are made again" in caplog.text
    assert bits(again) == bits(plain)


def test_a_run_that_goes_on_reads_its_tokens(tmp_path, model_folder, made):
    """The same run folder, started again: the tokens lie in its data/ folder, and the run is the same."""
    data = critiqued_file(tmp_path, 8)
    words = ["recipe=mm_rlhf_reward", "groups_per_step=2", "save_every=0", "samples=0", "report=false"]
    settings = settings_for(tmp_path / "run", data, *words, model=model_folder)
    run = train(settings)
    lines, (block, _) = metrics_of(run), sorted((run / "data" / "tokens").iterdir())
    assert np.load(block)["flags"].dtype == bool
    made.clear()
    train(settings)
    again = {name for name in made if name not in {f"g{index}" for index in range(CHECKED)}}
    assert not again
    assert metrics_of(run) == lines
    assert facts_of(run)["status"] == "finished"
