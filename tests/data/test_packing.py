"""plan_epoch: pure, complete, within its budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.data.packing import over_budget, plan_epoch


@given(
    st.lists(st.integers(1, 100), max_size=60),
    st.integers(1, 20),
    st.integers(1, 150),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_every_group_once_and_no_batch_over_budget(lengths, per_step, budget, seed, epoch):
    plan = plan_epoch(lengths, groups_per_step=per_step, tokens_per_batch=budget, seed=seed, epoch=epoch)
    assert sorted(i for step in plan for batch in step for i in batch) == list(range(len(lengths)))
    sizes = [sum(map(len, step)) for step in plan]
    assert len(sizes) == -(-len(lengths) // per_step)
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or (sizes[0] <= per_step and sizes[0] - sizes[-1] <= 1)
    for step in plan:
        firsts = [lengths[batch[0]] for batch in step]
        assert firsts == sorted(firsts, reverse=True)
        for batch in step:
            assert batch
            assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    alone = over_budget(lengths, budget)
    assert alone == [i for i, n in enumerate(lengths) if n > budget]
    assert all([i] in step for i in alone for step in plan if any(i in batch for batch in step))


def test_the_plan_depends_on_seed_and_epoch_only():
    lengths = list(range(1, 40))
    settings = {"groups_per_step": 8, "tokens_per_batch": 64}
    plan = plan_epoch(lengths, **settings, seed=0, epoch=0)
    assert plan == plan_epoch(tuple(lengths), **settings, seed=0, epoch=0)
    assert plan != plan_epoch(lengths, **settings, seed=1, epoch=0)
    assert plan != plan_epoch(lengths, **settings, seed=0, epoch=1)


def test_the_order_never_changes_between_versions():
    plan = plan_epoch([1] * 8, groups_per_step=8, tokens_per_batch=8, seed=0, epoch=0)
    assert plan == [[ORDER]]


ORDER = [4, 1, 5, 0, 2, 7, 3, 6]


@pytest.mark.parametrize(
    ("groups", "per_step", "sizes"),
    [
        (9, 3, [3, 3, 3]),  # nothing left over: as it was
        (100, 32, [25, 25, 25, 25]),  # not 32, 32, 32 and an update from 4 groups
        (26, 4, [4, 4, 4, 4, 4, 3, 3]),  # more steps than groups in one: only the last ones move
        (7, 3, [3, 2, 2]),
        (5, 10, [5]),
    ],
)
def test_the_last_step_is_as_large_as_the_others(groups, per_step, sizes):
    lengths = [1 + i % 5 for i in range(groups)]
    settings = {"tokens_per_batch": 12, "seed": 3, "epoch": 1}
    plan = plan_epoch(lengths, groups_per_step=per_step, **settings)
    assert [sum(map(len, step)) for step in plan] == sizes
    # Steps that kept their size hold what consecutive steps of a full size hold, micro-batch by micro-batch.
    whole = plan_epoch(lengths + [1] * (-groups % per_step), groups_per_step=per_step, **settings)
    order = [i for step in plan_epoch(lengths, groups_per_step=1, **settings) for i in step[0]]
    at = 0
    for step, size in zip(plan, sizes, strict=True):
        assert sorted(i for batch in step for i in batch) == sorted(order[at : at + size])
        at += size
    if groups % per_step == 0:
        assert plan == whole


def test_first_fit_decreasing_fills_batches():
    plan = plan_epoch([6, 4, 5, 5, 3, 7], groups_per_step=6, tokens_per_batch=10, seed=0, epoch=0)
    assert len(plan[0]) == 3
    assert [sum([6, 4, 5, 5, 3, 7][i] for i in batch) for batch in plan[0]] == [10, 10, 10]


def test_groups_over_the_budget_are_told():
    assert over_budget([5, 11, 10, 12], 10) == [1, 3]
    assert over_budget([], 1) == []
    with pytest.raises(ValueError, match="tokens_per_batch must be positive, got 0"):
        over_budget([1], 0)


@pytest.mark.parametrize(
    ("lengths", "change", "message"),
    [
        ([1], {"groups_per_step": 0}, "groups_per_step must be positive, got 0"),
        ([1], {"tokens_per_batch": -1}, "tokens_per_batch must be positive, got -1"),
        ([1, 0], {}, "lengths must be positive"),
    ],
)
def test_bad_arguments_are_named(lengths, change, message):
    settings = {"groups_per_step": 2, "tokens_per_batch": 8, "seed": 0, "epoch": 0} | change
    with pytest.raises(ValueError, match=message):
        plan_epoch(lengths, **settings)


def test_d19_fewer_groups_than_a_step():
    assert plan_epoch([], groups_per_step=4, tokens_per_batch=8, seed=0, epoch=0) == []
    assert len(plan_epoch([5], groups_per_step=4, tokens_per_batch=8, seed=0, epoch=0)) == 1
