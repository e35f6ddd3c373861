"""Preference data with critiques, and a reward model that nobody trained, for the tests of this room."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmrlhf.data.schema import PreferenceGroup
from mmrlhf.data.writers import write_ranked
from mmrlhf.reward import head as heads
from tiny import tiny_model
from tinyrun import make_groups

# A critique for each rank: what a scoring head can tell good answers by.
CRITIQUES = ("the square is green", "the photo is of a mat", "the dog is red", "a cat on the mat and a dog")


def with_critiques(groups: list[PreferenceGroup], *, without: tuple[int, ...] = ()) -> list[PreferenceGroup]:
    """The groups with a critique for each response, but those at `without`."""
    return [
        dataclasses.replace(
            group,
            responses=tuple(
                dataclasses.replace(r, critique=None if at in without else CRITIQUES[at])
                for at, r in enumerate(group.responses)
            ),
        )
        for group in groups
    ]


def critiqued_file(root: Path, count: int = 6, *, without: tuple[int, ...] = (), **options) -> Path:
    """`count` groups with critiques as a file, pictures beside it."""
    path = root / "critiques.jsonl"
    write_ranked(with_critiques(make_groups(root, count, **options), without=without), path)
    return path


def reward_folder(path: Path, family: str = "llava_onevision", *, kind: str = "tanh") -> Path:
    """A tiny model with a fresh scoring head, large enough to tell answers apart, as training would save it."""
    model, processor = tiny_model(family)
    head = heads.new_head(model, kind=kind, seed=3)
    head.out_proj.weight.data.mul_(20)
    heads.attach(model, head)
    heads.save(model, processor, path)
    return path
