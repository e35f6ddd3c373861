"""Scoring: one cache for critiques and scores, work that is never done twice, margins that reach MM-DPO."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from mmrlhf.cli import main
from mmrlhf.data.readers import TooManyBadRows, read_groups
from mmrlhf.data.schema import BadRow, VideoRef
from mmrlhf.data.writers import write_ranked
from mmrlhf.models import shared_prefix
from mmrlhf.reward import decode, score
from mmrlhf.reward.critique import load_reward_model
from mmrlhf.reward.encode import CritiqueEncoder
from mmrlhf.reward.score import Scoring, score_file, score_groups
from mmrlhf.train.loop import train
from rewarddata import critiqued_file, reward_folder, with_critiques
from tiny import tiny_model
from tinyrun import make_groups, metrics_of, settings_for

SHORT = {"max_new_tokens": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def reward(reward_model):
    return load_reward_model(reward_model, device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return root, with_critiques(make_groups(root, 5))


def scores_of(found) -> list[float]:
    return [value for one in sorted(found, key=lambda each: each.index) for value in one.scores]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"], ids=["plain positions", "mRoPE"])
def test_critiques_and_scores_from_one_cache_are_those_of_the_model_itself(family, tmp_path):
    """Prompts of several lengths in one padded cache, with pictures and without: the critiques are those of the
    model's own generate on whole prompts, and the scores those of reading prompt, answer and critique again."""
    reward = load_reward_model(reward_folder(tmp_path / "m", family), device="cpu")
    groups = make_groups(tmp_path, 5)[3:]
    ids: list[list[int]] = []

    def noted(*args, **options):
        found = speak(*args, **options)
        ids.extend(found[0])
        return found

    speak = decode.speak
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "speak", noted)
        shared = list(score_groups(reward, groups, root=tmp_path, max_new_tokens=6))
    assert [one.index for one in shared] == [0, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "why_not", lambda model: "the test says so")
        # A text need not have the tokens it was decoded from, least of all an untrained model's.
        patch.setattr(CritiqueEncoder, "spoken", lambda encoder, text: ids.pop(0))
        apart = list(score_groups(reward, groups, root=tmp_path, max_new_tokens=6))
    assert [one.critiques for one in shared] == [one.critiques for one in apart]
    assert any(text for one in shared for text in one.critiques)
    torch.testing.assert_close(torch.tensor(scores_of(shared)), torch.tensor(scores_of(apart)), rtol=1e-3, atol=1e-4)


def test_a_window_or_a_state_is_decoded_apart_and_said(reward, caplog):
    assert decode.why_not(reward.model) is None
    sliding, _ = tiny_model("gemma3")
    assert decode.why_not(sliding) == "its decoder attends within a window"


@pytest.mark.parametrize("critic", ["generated", "given", "none"])
def test_batches_change_nothing(reward, world, critic):
    """One group a batch, or all in one: the same critiques, and scores but for rounding."""
    root, groups = world
    options = {"root": root, "critic": critic, "max_new_tokens": 5}
    together = list(score_groups(reward, groups, **options))
    alone = list(score_groups(reward, groups, tokens_per_batch=1, **options))
    assert [one.critiques for one in together] == [one.critiques for one in alone]
    torch.testing.assert_close(torch.tensor(scores_of(together)), torch.tensor(scores_of(alone)), rtol=1e-3, atol=1e-4)
    assert len({round(value, 4) for value in scores_of(together)}) > len(groups), "answers have scores of their own"


def test_samples_are_averaged_and_do_not_depend_on_their_batch(reward, world):
    root, groups = world
    options = {"root": root, "max_new_tokens": 4, "samples": 3, "seed": 5}
    first = list(score_groups(reward, groups[:2], **options))
    again = list(score_groups(reward, groups[:2], tokens_per_batch=1, **options))
    other = list(score_groups(reward, groups[:2], **{**options, "seed": 6}))
    assert [one.critiques for one in first] == [one.critiques for one in again]
    assert [one.critiques for one in first] != [one.critiques for one in other]
    torch.testing.assert_close(torch.tensor(scores_of(first)), torch.tensor(scores_of(again)), rtol=1e-3, atol=1e-4)


def test_samples_of_a_decoder_without_a_shared_cache_do_not_depend_on_their_batch(reward, world, monkeypatch):
    """A stopped run goes on with other batches: it must write what it would have written."""
    monkeypatch.setattr(decode, "why_not", lambda model: "the test says so")
    root, groups = world
    options = {"root": root, "max_new_tokens": 4, "samples": 2, "seed": 5}
    whole = list(score_groups(reward, groups[:2], **options))
    rest = list(score_groups(reward, groups[1:2], **options))
    assert whole[1].critiques == rest[0].critiques
    assert whole[1].scores == pytest.approx(rest[0].scores, rel=1e-3, abs=1e-4)


def test_a_video_without_a_shared_cache_is_a_bad_row(reward, world, monkeypatch):
    """`generate` takes pictures alone: the group is named or left out, and the others are scored."""
    monkeypatch.setattr(decode, "why_not", lambda model: "the test says so")
    root, groups = world
    filmed = dataclasses.replace(groups[0], videos=(VideoRef("clip"),))
    options = {"root": root, "max_new_tokens": 2}
    with pytest.raises(BadRow, match="g0: critiques of videos are not possible here: the test says so"):
        list(score_groups(reward, [filmed, groups[1]], **options))
    bad: list[BadRow] = []
    (one,) = score_groups(reward, [filmed, groups[1]], on_bad_row="skip", bad_rows=bad, **options)
    assert (one.id, len(bad)) == ("g1", 1)


def test_padding_of_a_step_is_text(reward, world, monkeypatch):
    """Rows that have ended are fed a token that stands for no picture, which the tower would be asked for."""
    monkeypatch.setattr(shared_prefix, "text_token", lambda model: 2)
    fed, forward = [], decode._Run._forward

    def noted(run, module, inputs, ids, positions):
        fed.extend(ids[run.mask[:, -ids.shape[1] :] == 0].tolist())
        return forward(run, module, inputs, ids, positions)

    monkeypatch.setattr(decode._Run, "_forward", noted)
    root, groups = world
    list(score_groups(reward, groups, root=root, max_new_tokens=8, samples=3, temperature=5.0))
    assert set(fed) == {2}


def test_a_picture_is_encoded_once_a_group(reward, world):
    """Three answers, their critiques and their scores: one pass of the tower for the prompt of all."""
    root, groups = world
    seen = []
    handle = reward.model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    try:
        list(score_groups(reward, groups[:1], root=root, max_new_tokens=4))
    finally:
        handle.remove()
    assert len(seen) == 1


def test_margins_reach_mm_dpo(reward_model, model_folder, critiqued, tmp_path, capsys):
    """`reward score`, then `train mm_dpo` on its output: beta is that of r(better) - r(worse), the order the data's."""
    out = tmp_path / "scored.jsonl"
    words = ["-o", str(out), "--max-new-tokens", "6", "--device", "cpu"]
    assert main(["reward", "score", str(reward_model), str(critiqued), *words]) == 0
    printed = capsys.readouterr().out
    assert f"mmrlhf train mm_dpo data.path={out} data.root={critiqued.parent}" in printed
    before, after = read_groups(critiqued).groups, read_groups(out, root=critiqued.parent).groups
    assert [one.id for one in before] == [one.id for one in after]
    margins = []
    for one, other in zip(before, after, strict=True):
        pairs = other.preference_pairs()
        assert [(p.better, p.worse) for p in one.preference_pairs()] == [(p.better, p.worse) for p in pairs]
        assert [r.rank for r in one.responses] == [r.rank for r in other.responses]
        for pair in pairs:
            better, worse = other.responses[pair.better].score, other.responses[pair.worse].score
            assert better is not None
            assert worse is not None
            assert pair.margin == better - worse
            margins.append(pair.margin)
    settings = settings_for(
        *(tmp_path / "run", out, "recipe=mm_dpo", f"data.root={critiqued.parent}", "groups_per_step=6"),
        *("tokens_per_batch=4096", "max_steps=1"),
        model=model_folder,
    )
    line = metrics_of(train(settings))[0]
    betas = [min(0.15, max(0.1, 0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * margin))))) for margin in margins]
    assert line["beta/mean"] == pytest.approx(sum(betas) / len(betas), rel=1e-5)
    assert line["beta/max"] == pytest.approx(max(betas), rel=1e-5)
    assert min(betas) < max(betas)


def test_what_is_done_is_not_done_again(reward_model, tmp_path, monkeypatch):
    """Killed after three of five groups, in the middle of a line: the other two are computed, and the file is whole."""
    data, out = critiqued_file(tmp_path, 5), tmp_path / "out.jsonl"
    whole = score_file(reward_model, data, tmp_path / "whole.jsonl", tokens_per_batch=1, **SHORT)
    real, made = score.score_groups, []

    def stopping(reward, groups, **options):
        for place, one in enumerate(real(reward, groups, **options)):
            if place == 3:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(score, "score_groups", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_file(reward_model, data, out, tokens_per_batch=1, **SHORT)
    assert not out.exists()
    journal = tmp_path / "out.jsonl.journal"
    with open(journal, "ab") as file:
        file.write(b'{"group": "half a li')

    def counting(reward, groups, **options):
        made.extend(group.id for group in groups)
        return real(reward, groups, **options)

    monkeypatch.setattr(score, "score_groups", counting)
    done = score_file(reward_model, data, out, tokens_per_batch=1, **SHORT)
    assert made == ["g3", "g4"]
    assert (done.computed, done.groups, whole.computed) == (2, 5, 5)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert score_file(reward_model, data, out, **SHORT).computed == 0
    critiqued_file(tmp_path, 6)
    assert score_file(reward_model, data, out, **SHORT).computed == 1, "a row that was added"


def test_a_journal_of_other_options_or_damaged_is_refused(reward_model, critiqued, tmp_path):
    out = tmp_path / "out.jsonl"
    score_file(reward_model, critiqued, out, critic="none", **SHORT)
    with pytest.raises(ValueError, match="has scores of another model or with other options: remove it"):
        score_file(reward_model, critiqued, out, critic="given", **SHORT)
    journal = tmp_path / "out.jsonl.journal"
    key = json.loads(journal.read_text().splitlines()[0])["key"]
    in_use = pytest.raises(ValueError, match=r"out\.jsonl\.journal is in use by another process")
    with score.Journal(journal, key=key), in_use:
        score_file(reward_model, critiqued, out, critic="none", **SHORT)
    journal.write_text("nonsense\n" + journal.read_text())
    with pytest.raises(ValueError, match=r"out\.jsonl\.journal:1: not a line of a journal of scores"):
        score_file(reward_model, critiqued, out, critic="none", **SHORT)


def test_bad_rows_are_named_or_counted(reward, reward_model, tmp_path):
    groups = with_critiques(make_groups(tmp_path, 24)[:20])
    groups = [group for group in groups if group.images] + groups[4:5]  # prompts alike would be one group
    first, *rest = groups[1].responses
    broken = dataclasses.replace(first, text="an <image> that is none")
    groups[1] = dataclasses.replace(groups[1], responses=(broken, *rest))
    write_ranked(groups, tmp_path / "d.jsonl")
    with pytest.raises(BadRow, match=r"d\.jsonl:2: response holds '<image>'"):
        score_file(reward_model, tmp_path / "d.jsonl", tmp_path / "o.jsonl", critic="given", **SHORT)
    done = score_file(
        reward_model,
        tmp_path / "d.jsonl",
        tmp_path / "o.jsonl",
        critic="given",
        on_bad_row="skip",
        max_bad_rows=0.1,
        **SHORT,
    )
    assert (done.groups, [row.source for row in done.bad_rows]) == (16, [f"{tmp_path / 'd.jsonl'}:2"])
    assert "1 rows or groups are bad and left out" in done.text()
    gone = tmp_path / "pictures" / "0.png"
    gone.unlink()
    with pytest.raises(BadRow, match=r"d\.jsonl:1"):
        score_file(reward_model, tmp_path / "d.jsonl", tmp_path / "p.jsonl", critic="given", **SHORT)


def test_too_many_bad_rows_are_said_before_anything_is_scored(reward_model, tmp_path, monkeypatch):
    write_ranked(with_critiques(make_groups(tmp_path, 3)), tmp_path / "d.jsonl")
    (tmp_path / "pictures" / "0.png").unlink()
    monkeypatch.setattr(score, "score_groups", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(TooManyBadRows, match="1 of 3 rows are bad"):
        score_file(reward_model, tmp_path / "d.jsonl", tmp_path / "o.jsonl", on_bad_row="skip", **SHORT)


def test_scores_that_are_not_finite_are_named(reward, world):
    root, groups = world
    weight = reward.head.out_proj.weight
    before = weight.detach().clone()
    weight.data[:] = torch.nan
    try:
        with pytest.raises(ValueError, match=r"group g0 .*its scores are not finite"):
            list(score_groups(reward, groups[:1], root=root, critic="none"))
    finally:
        weight.data[:] = before


def test_groups_of_ties_alone_are_left_out_and_said(reward_model, tmp_path):
    groups = make_groups(tmp_path, 2)
    write_ranked(groups, tmp_path / "d.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    for response in rows[1]["responses"]:
        response.update(rank=1, score=0.0)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = score_file(reward_model, tmp_path / "d.jsonl", tmp_path / "o.jsonl", critic="none", **SHORT)
    assert (done.groups, done.without_pairs) == (1, (f"{tmp_path / 'd.jsonl'}:2",))
    assert "1 groups have no pair and are left out" in done.text()
    (tmp_path / "e.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match=r"e\.jsonl has no group with a pair to score: of 1 rows 0 are bad"):
        score_file(reward_model, tmp_path / "e.jsonl", tmp_path / "p.jsonl", critic="none", **SHORT)
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "2", "--critic", "given"], "samples is 2, but with critic given nothing is sampled"),
        (["--samples", "0"], "samples must be at least 1, got 0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be finite and positive, got 0.0"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["-o", "nowhere/out.jsonl"], "must be a file in a folder that is there"),
    ],
    ids=["given samples", "samples", "tokens", "temperature", "device", "output"],
)
def test_the_command_says_what_is_wrong(reward_model, critiqued, tmp_path, capsys, words, message):
    out = ["-o", str(tmp_path / "out.jsonl")]
    assert main(["reward", "score", str(reward_model), str(critiqued), *out, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_head_and_the_data_as_output_are_refused(model_folder, reward_model, critiqued, tmp_path):
    with pytest.raises(ValueError, match=r"has no reward_head\.json: it is no reward model"):
        score_file(model_folder, critiqued, tmp_path / "out.jsonl", **SHORT)
    with pytest.raises(ValueError, match="is the data itself"):
        score_file(reward_model, critiqued, critiqued, **SHORT)
    with pytest.raises(ValueError, match="critic must be one of generated, given, none, got 'human'"):
        Scoring(critic="human")
