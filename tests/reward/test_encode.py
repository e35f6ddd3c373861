"""What a reward model reads: the tokens of whole conversations, in the form that the data's critiques allow."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmrlhf.data.collate import PreferenceDataset, collate
from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import BadRow, ListedPair, Message, Part, Response
from mmrlhf.data.writers import write_ranked
from mmrlhf.reward.encode import (
    INSTRUCTION,
    CritiqueEncoder,
    asking,
    listed,
    split,
    tied_pairs,
    with_places,
)
from rewarddata import CRITIQUES, with_critiques
from tiny import tiny_model
from tinyrun import make_groups


@pytest.fixture(scope="module")
def processor():
    return tiny_model("llava_onevision")[1]


@pytest.fixture
def groups(tmp_path):
    return with_critiques(make_groups(tmp_path, 2))


@pytest.fixture
def encoder(processor, tmp_path):
    return CritiqueEncoder(processor, root=tmp_path)


def decoded(encoder, ids) -> str:
    return encoder.chat.tokenizer.decode(ids.tolist())


def test_the_prefix_ends_where_answers_begin_and_weights_mark_critiques(encoder, groups):
    """Instruction, question and picture are read once; only a critique and its end of turn have an NLL."""
    encoded = encoder.encode(groups[0])
    prefix = decoded(encoder, encoded.prefix_ids)
    assert INSTRUCTION in prefix
    assert prefix.endswith("[LMM Response]:")
    for index, (ids, weights) in enumerate(zip(encoded.response_ids, encoded.weights, strict=True)):
        text = groups[0].responses[index].text
        assert decoded(encoder, ids).startswith(f" {text}\n\n[Evaluation]:<|im_end|>")
        assert decoded(encoder, ids[weights > 0]) == f"{CRITIQUES[index]}<|im_end|>"
        assert weights[-1] == 0, "the token nobody reads"
        assert decoded(encoder, ids[:-1]).endswith("<|im_end|>\n"), "the score is read where the template ends a turn"
    batch = with_places(collate([encoded]))
    assert batch.last is not None
    assert batch.critique_cu is not None
    assert batch.last.tolist() == (batch.cu_seqlens[1:] - 1).tolist()
    assert batch.critique_cu.diff().tolist() == [int(weights.sum()) for weights in encoded.weights]


def test_without_critiques_the_answer_is_the_turn(encoder, tmp_path):
    group = make_groups(tmp_path, 1)[0]
    encoded = encoder.encode(group)
    assert INSTRUCTION not in decoded(encoder, encoded.prefix_ids)
    assert all(not weights.any() for weights in encoded.weights)
    assert decoded(encoder, encoded.response_ids[0]).startswith(f"{group.responses[0].text}<|im_end|>")


def test_pairs_of_both_kinds_are_two_groups(tmp_path):
    """A score with a critique is never compared with one without: 0 > 1 is read with both, 0 > 2 and 1 > 2 without."""
    group = with_critiques(make_groups(tmp_path, 1), without=(2,))[0]
    spoken, plain = split(group)
    assert [(p.better, p.worse) for p in spoken.pairs or ()] == [(0, 1)]
    assert [(p.better, p.worse) for p in plain.pairs or ()] == [(0, 2), (1, 2)]
    assert (spoken.id, plain.id) == ("g0", "g0#plain")
    whole = with_critiques(make_groups(tmp_path, 1))[0]
    assert split(whole) == [whole]


def test_ties_of_both_kinds_go_with_their_half(encoder, tmp_path):
    """0 > 1 and the tie of 0 and 2 have critiques, the tie of 1 and 3 has none: each is read once, in its own form."""
    (group,) = with_critiques(make_groups(tmp_path, 1))
    a, b, c = group.responses
    answers = (a, b, c, dataclasses.replace(c, text="a dog", critique=None))
    answers = tuple(dataclasses.replace(r, rank=None, score=None) for r in answers)
    pairs = (ListedPair(0, 1),)
    group = dataclasses.replace(group, responses=answers, pairs=pairs, ties=((0, 2), (1, 3)))
    spoken, plain = split(group)
    assert [p[:2] for p in encoder.encode(spoken).pairs.tolist()] == [[0, 1], [0, 2]]
    encoded = encoder.encode(plain)
    assert (encoded.responses, encoded.pairs.tolist(), encoded.ties.tolist()) == ((1, 3), [[0, 1]], [True])
    ranked = dataclasses.replace(
        group,
        responses=tuple(dataclasses.replace(r, rank=n) for r, n in zip(answers, (1, 2, 1, 2), strict=True)),
        pairs=None,
        ties=(),
    )
    read = [
        {tuple(encoded.responses[i] for i in pair) for pair in encoded.pairs.tolist()}
        for encoded in map(encoder.encode, split(ranked))
    ]
    assert read == [{(0, 1), (2, 1), (0, 2)}, {(0, 3), (2, 3), (1, 3)}]
    with pytest.raises(BadRow, match="some pairs have critiques and some have not"):
        encoder.encode(group)


@pytest.mark.parametrize(
    ("mode", "plain"), [("all", [(0, 2), (1, 2)]), ("adjacent", [(1, 2)]), ("best_vs_rest", [(0, 2)])]
)
def test_halves_have_the_pairs_that_the_whole_would(mode, plain, processor, tmp_path):
    """In its half 1 > 2 is beaten by nobody, and 0 > 2 implied by nothing: the mode is the whole group's affair."""
    (group,) = with_critiques(make_groups(tmp_path, 1), without=(2,))
    encoder = CritiqueEncoder(processor, root=tmp_path, pairs=mode)
    found = [
        [tuple(encoded.responses[i] for i in pair) for pair in encoded.pairs.tolist()]
        for encoded in map(encoder.encode, split(group, mode))
    ]
    assert found == [[(0, 1)], plain]


def test_an_unsplit_group_of_both_kinds_is_refused(encoder, tmp_path):
    group = with_critiques(make_groups(tmp_path, 1), without=(2,))[0]
    with pytest.raises(BadRow, match="g0: some pairs have critiques and some have not"):
        encoder.encode(group)


def test_ties_are_equal_ranks_or_equal_scores(groups):
    ranked = dataclasses.replace(
        groups[0],
        responses=tuple(dataclasses.replace(r, rank=n) for r, n in zip(groups[0].responses, (1, 2, 2), strict=True)),
    )
    assert tied_pairs(ranked) == ((1, 2),)
    scored = dataclasses.replace(
        groups[0],
        responses=tuple(
            dataclasses.replace(r, rank=None, score=s)
            for r, s in zip(groups[0].responses, (0.5, 0.5, 0.1), strict=True)
        ),
    )
    assert tied_pairs(scored) == ((0, 1),)
    kept = listed(scored)
    assert [(p.better, p.worse) for p in kept.pairs or ()] == [(0, 2), (1, 2)]
    assert tied_pairs(kept) == ((0, 1),), "as ranks, since scores will be others"
    assert tied_pairs(dataclasses.replace(scored, pairs=(ListedPair(0, 2),))) == (), "a list says nothing of ties"


def test_rows_marked_as_ties_are_read_written_and_read_again(tmp_path):
    """MM-RLHF's `is_tie` rows: of the group's prompt, ordered by nobody; an order that is stated goes before."""
    row = {"id": "x", "prompt": "why ?", "chosen_reason": "r", "rejected_reason": "s"}
    rows = [row | {"chosen": "a", "rejected": "b"}, row | {"chosen": "b", "rejected": "c", "is_tie": True}]
    (group,) = read_groups([*rows, row | {"chosen": "b", "rejected": "a", "is_tie": True}]).groups
    assert (tied_pairs(group), len(group.preference_pairs())) == (((1, 2),), 1)
    write_ranked([group], tmp_path / "d.jsonl")
    (again,) = read_groups(tmp_path / "d.jsonl").groups
    assert (again.ties, again.pairs) == (group.ties, group.pairs)


def test_ties_are_pairs_with_a_flag(encoder, groups):
    tied = dataclasses.replace(
        groups[0],
        responses=tuple(dataclasses.replace(r, rank=n) for r, n in zip(groups[0].responses, (1, 2, 2), strict=True)),
    )
    encoded = encoder.encode(tied)
    assert encoded.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert encoded.ties.tolist() == [False, False, True]
    assert torch.isnan(encoded.margin[2])


def test_the_question_keeps_its_media_and_turns():
    before = (Message("system", (Part("text", "s"),)),)
    asked = asking((*before, Message("user", (Part("image"), Part("text", "why ?")))), "because", "x")
    assert asked[0] == before[0]
    assert [part.type for part in asked[1].content] == ["image", "text"]
    assert asked[1].content[1].text == f"{INSTRUCTION}[Question]: why ?\n[LMM Response]: because\n\n[Evaluation]:"
    between = asking((Message("user", (Part("text", "is "), Part("image"), Part("text", " red ?"))),), "no", "x")
    assert [part.text for part in between[0].content if part.type == "text"] == [
        f"{INSTRUCTION}[Question]: is ",
        " red ?\n[LMM Response]: no\n\n[Evaluation]:",
    ]
    silent = asking((Message("user", (Part("image"),)),), "no", "x")
    assert [part.type for part in silent[0].content] == ["image", "text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"critique": "a <image> here"}, "g0: the critique of response 0: response holds '<image>'"),
        ({"text": "an <|im_end|> here"}, "g0: response holds '<|im_end|>'"),
    ],
    ids=["critique", "answer"],
)
def test_bad_rows_are_named(encoder, groups, change, message):
    first, *rest = groups[0].responses
    broken = dataclasses.replace(groups[0], responses=(dataclasses.replace(first, **change), *rest))
    with pytest.raises(BadRow) as caught:
        encoder.encode(broken)
    assert str(caught.value).startswith(message)


def test_a_prompt_that_ends_with_the_assistant_is_named(groups):
    turns = (*groups[0].prompt, Message("assistant", (Part("text", "well"),)))
    with pytest.raises(BadRow, match="x: the last turn of the prompt is the assistant's"):
        asking(turns, "yes", "x")


def test_given_critiques_have_to_be_there(encoder, tmp_path):
    group = with_critiques(make_groups(tmp_path, 1), without=(1,))[0]
    with pytest.raises(BadRow, match="g0: response 1 has no critique"):
        encoder.rows(group, "given")


def test_a_dataset_of_both_forms_finds_its_pixels_again(encoder, tmp_path):
    """The data set makes pixels anew and compares the prompt's tokens, which differ between the forms."""
    spoken, plain = split(with_critiques(make_groups(tmp_path, 1), without=(2,))[0])
    dataset = PreferenceDataset([spoken, plain], encoder, cache_bytes=0)
    for index in range(2):
        assert "pixel_values" in dataset[index].vision
    assert dataset.text(0).ties.tolist() == [False]  # type: ignore[attr-defined]
    assert dataset.row_hash(0) != dataset.row_hash(1)


def test_an_answer_that_is_a_prefix_of_another_is_its_own_branch(encoder, groups):
    """Nothing of an answer goes into the shared prefix, whatever answers have in common."""
    texts = ("a cat", "a cat and a dog", "a")
    group = dataclasses.replace(
        groups[0],
        responses=tuple(Response(t, rank=n + 1, critique=CRITIQUES[0]) for n, t in enumerate(texts)),
    )
    encoded = encoder.encode(group)
    assert decoded(encoder, encoded.prefix_ids).endswith("[LMM Response]:")
    assert [decoded(encoder, ids).split("\n")[0] for ids in encoded.response_ids] == [f" {text}" for text in texts]
