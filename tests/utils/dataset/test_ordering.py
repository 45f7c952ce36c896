"""What must hold of every order, whatever the groups, the data ranks and the accumulation."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.dataset.ordering import EpochOrder, Group, steps_per_epoch
from utils.diffusion.seeds import permutation

GROUPS = st.lists(st.builds(Group, st.integers(0, 40), st.integers(1, 4)), min_size=1, max_size=6)
RANKS = st.integers(1, 5)
ACCUMULATION = st.integers(1, 5)
SEEDS = st.integers(0, 1000)
LAYOUTS = st.tuples(GROUPS, RANKS, ACCUMULATION, SEEDS, st.integers(0, 3))


def own(slot):
    """The samples of a slot that are no fill."""
    return slot.samples[: len(slot.samples) - slot.fill]


def in_time(order, group):
    """A group's samples in the order in which they are shown, of the epoch itself."""
    return [at for step in order for slot in step if slot.group == group for at in own(slot)]


@given(LAYOUTS)
def test_every_sample_is_in_an_epoch_exactly_once_beside_fill(layout):
    version = [(slot.group, at) for step in EpochOrder(*layout) for slot in step for at in own(slot)]
    assert sorted(version) == [(number, at) for number, group in enumerate(layout[0]) for at in range(group.size)]


@given(LAYOUTS)
def test_steps_are_whole_and_all_ranks_do_equal_work(layout):
    groups, ranks, accumulation, *_ = layout
    steps = list(EpochOrder(*layout))
    assert len(steps) == steps_per_epoch(groups, ranks, accumulation)
    for slot in (slot for step in steps for slot in step):
        shares = [slot.of_rank(rank) for rank in range(ranks)]
        assert {len(share) for share in shares} == {groups[slot.group].micro_batch}
        assert sum(shares, ()) == slot.samples
    assert all(len(step) == accumulation for step in steps)


@given(LAYOUTS)
def test_fill_is_of_the_group_itself_and_no_more_than_needed(layout):
    groups, ranks, accumulation, *_ = layout
    order = EpochOrder(*layout)
    slots = [slot for step in order for slot in step]
    again = [slot for slot in slots if slot.fill == len(slot.samples)]
    partly = [slot for slot in slots if 0 < slot.fill < len(slot.samples)]
    assert Counter({slot.group: slot.fill for slot in partly}) == Counter(
        {number: group.fill(ranks) for number, group in enumerate(groups) if group.fill(ranks)}
    )
    assert len(again) == -sum(group.slots(ranks) for group in groups) % accumulation
    for slot in slots:
        size, counts = groups[slot.group].size, Counter(slot.samples)
        assert all(0 <= at < size for at in slot.samples)
        # A group smaller than a slot repeats evenly; any other never within a slot.
        assert max(counts.values()) == max(1, -(-len(slot.samples) // size))


@given(LAYOUTS)
def test_nothing_of_a_group_appears_again_before_all_of_it_has_appeared(layout):
    groups = layout[0]
    version = {number: [] for number in range(len(groups))}
    for slot in (slot for step in EpochOrder(*layout) for slot in step):
        version[slot.group] += slot.samples
    for number, group in enumerate(groups):
        assert sorted(version[number][: group.size]) == list(range(group.size))


@given(GROUPS, st.lists(st.tuples(RANKS, ACCUMULATION), min_size=2, max_size=4), SEEDS)
def test_within_a_group_the_order_is_the_same_for_any_layout(groups, layouts, seed):
    for number, group in enumerate(groups):
        expected = permutation(group.size, seed, "order", 2, number)
        for ranks, accumulation in layouts:
            assert in_time(EpochOrder(groups, ranks, accumulation, seed, 2), number) == expected


@given(LAYOUTS)
def test_a_pure_function_of_its_arguments(layout):
    assert list(EpochOrder(*layout)) == list(EpochOrder(*layout))


@settings(max_examples=30)
@given(st.integers(20, 40), RANKS, SEEDS)
def test_new_in_each_epoch_and_for_each_seed(size, ranks, seed):
    def order(seed, epoch):
        return in_time(EpochOrder([Group(size, 2), Group(5, 1)], ranks, 2, seed, epoch), 0)

    # By chance two orders of 20 samples are the same once in 10^18 times.
    assert len({tuple(order(*at)) for at in ((seed, 0), (seed, 1), (seed, 2), (seed + 1, 0))}) == 4


def test_by_hand():
    """Five samples of one group, three of another; two ranks, micro-batches of 2 and 1: slots of 4 and 2."""
    groups = [Group(5, 2), Group(3, 1)]
    first, second = (permutation(size, 9, "order", 1, number) for number, size in enumerate((5, 3)))
    slots = {
        0: [tuple(first[:4]), (first[4], *first[:3])],
        1: [tuple(second[:2]), (second[2], second[0])],
    }
    in_turn = [(0, 0, 1, 1)[position] for position in permutation(4, 9, "slots", 1)]
    order = EpochOrder(groups, 2, 3, seed=9, epoch=1)
    assert len(order) == 2
    found = [slot for step in order for slot in step]
    assert [slot.group for slot in found] == [*in_turn, *in_turn[:2]]
    for number in (0, 1):
        mine = [slot for slot in found[:4] if slot.group == number]
        assert [slot.samples for slot in mine] == slots[number]
        assert [slot.fill for slot in mine] == [0, (3, 1)[number]]
    assert [slot.samples for slot in found[4:]] == [slot.samples for slot in found[:2]]
    assert [slot.fill for slot in found[4:]] == [len(slot.samples) for slot in found[4:]]


def test_groups_are_mixed_and_fill_changes_from_epoch_to_epoch():
    steps = list(EpochOrder([Group(400, 4), Group(400, 4)], 1, 1, seed=0, epoch=0))
    first_half = Counter(step[0].group for step in steps[:100])
    assert 30 < first_half[0] < 70
    filled = set()
    for epoch in range(20):
        for (slot,) in EpochOrder([Group(10, 4)], 1, 1, seed=0, epoch=epoch):
            filled.update(slot.samples[len(slot.samples) - slot.fill :])
    assert filled == set(range(10))


def test_a_step_that_is_not_there():
    with pytest.raises(AssertionError):
        EpochOrder([Group(4, 2)], 1, 1, 0, 0).step(2)
