"""What must hold of every order, whatever the groups and the global batch."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.dataset.ordering import LIKE, EpochOrder, Group, deal, steps_per_epoch
from utils.diffusion.seeds import permutation

WORK = st.sampled_from([1.0, 1.05, 1.3, 4.0, 21.0])


@st.composite
def some_group(draw, taken=True):
    size = draw(st.integers(0, 40))
    return Group(size, draw(st.integers(1, 4)), draw(WORK), draw(st.integers(0, size)) if taken else 0)


GROUPS = st.lists(some_group(), min_size=1, max_size=6)
PER_STEP = st.integers(1, 12)
SEEDS = st.integers(0, 1000)
ORDERS = st.tuples(GROUPS, PER_STEP, SEEDS, st.integers(0, 3))


def own(micro_batch):
    """The samples of a micro-batch that are no fill."""
    return micro_batch.samples[: len(micro_batch.samples) - micro_batch.fill]


def all_of(order):
    return [micro_batch for step in order for micro_batch in step]


def in_time(order, group):
    """A group's samples in the order in which they are shown, of the epoch itself."""
    return [at for one in all_of(order) if one.group == group for at in own(one)]


@given(ORDERS)
def test_every_sample_is_in_an_epoch_exactly_once_beside_fill(arguments):
    """What another order has taken before is not."""
    groups, _, seed, epoch = arguments
    shown = [(one.group, at) for one in all_of(EpochOrder(*arguments)) for at in own(one)]
    expected = {
        number: permutation(group.size, seed, "order", epoch, number)[group.taken :]
        for number, group in enumerate(groups)
    }
    assert sorted(shown) == sorted((number, at) for number, those in expected.items() for at in those)


@given(ORDERS)
def test_steps_are_whole(arguments):
    groups, per_step, *_ = arguments
    steps = list(EpochOrder(*arguments))
    assert len(steps) == steps_per_epoch(groups, per_step)
    assert all(len(step) == per_step for step in steps)
    for micro_batch in (one for step in steps for one in step):
        assert len(micro_batch.samples) == groups[micro_batch.group].micro_batch


@given(ORDERS)
def test_fill_is_of_the_group_itself_and_no_more_than_needed(arguments):
    groups, per_step, *_ = arguments
    every = all_of(EpochOrder(*arguments))
    again = [one for one in every if one.fill == len(one.samples)]
    partly = [one for one in every if 0 < one.fill < len(one.samples)]
    assert Counter({one.group: one.fill for one in partly}) == Counter(
        {number: group.fill for number, group in enumerate(groups) if group.fill}
    )
    assert len(again) == -sum(group.micro_batches for group in groups) % per_step
    assert every[len(every) - len(again) :] == again
    for one in every:
        size, counts = groups[one.group].size, Counter(one.samples)
        assert all(0 <= at < size for at in one.samples)
        # A group smaller than a micro-batch repeats evenly; of any other nothing is twice in one, but in a part of an
        # epoch the fill comes from what was taken before.
        assert max(counts.values()) <= -(-len(one.samples) // max(1, size - groups[one.group].taken))


@given(st.lists(some_group(taken=False), min_size=1, max_size=6), PER_STEP, SEEDS)
def test_nothing_of_a_group_appears_again_before_all_of_it_has_appeared(groups, per_step, seed):
    shown = {number: [] for number in range(len(groups))}
    for one in all_of(EpochOrder(groups, per_step, seed, 1)):
        shown[one.group] += one.samples
    for number, group in enumerate(groups):
        assert sorted(shown[number][: group.size]) == list(range(group.size))


@given(st.lists(some_group(taken=False), min_size=1, max_size=6), PER_STEP, SEEDS)
def test_within_a_group_the_order_is_the_same_for_any_global_batch(groups, per_step, seed):
    for number, group in enumerate(groups):
        expected = permutation(group.size, seed, "order", 2, number)
        assert in_time(EpochOrder(groups, per_step, seed, 2), number) == expected


@given(ORDERS, PER_STEP, st.floats(0, 1))
def test_an_epoch_that_goes_on_with_another_global_batch_shows_what_it_has_not_shown(arguments, then, share):
    groups, per_step, seed, epoch = arguments
    order = EpochOrder(*arguments)
    done = int(share * len(order))
    taken = order.taken(done)
    rest = [Group(g.size, g.micro_batch, g.work, t) for g, t in zip(groups, taken, strict=True)]
    before = Counter((one.group, at) for index in range(done) for one in order.step(index) for at in own(one))
    after = Counter((one.group, at) for one in all_of(EpochOrder(rest, then, seed, epoch)) for at in own(one))
    assert before + after == Counter((one.group, at) for one in all_of(order) for at in own(one))


@given(ORDERS)
def test_the_work_of_a_step_is_alike_as_long_as_there_is_enough_of_its_kind(arguments):
    """All steps are but those at the end, into which less than one for each kind of work goes."""
    groups, per_step, *_ = arguments
    steps = list(EpochOrder(*arguments))
    spread = [max(loads) / min(loads) for loads in ([groups[one.group].load for one in step] for step in steps)]
    kinds = len({group.load for group in groups})
    assert all(one <= LIKE for one in spread[: max(0, len(steps) - kinds)])


@given(ORDERS)
def test_a_pure_function_of_its_arguments(arguments):
    assert list(EpochOrder(*arguments)) == list(EpochOrder(*arguments))


@settings(max_examples=30)
@given(st.integers(20, 40), PER_STEP, SEEDS)
def test_new_in_each_epoch_and_for_each_seed(size, per_step, seed):
    def order(seed, epoch):
        return in_time(EpochOrder([Group(size, 2), Group(5, 1)], per_step, seed, epoch), 0)

    # By chance two orders of 20 samples are the same once in 10^18 times.
    assert len({tuple(order(*at)) for at in ((seed, 0), (seed, 1), (seed, 2), (seed + 1, 0))}) == 4


def test_by_hand():
    """Five samples of one group by two, three of another by one; four in a step."""
    groups = [Group(5, 2, work=1), Group(3, 1, work=2)]
    first, second = (permutation(size, 9, "order", 1, number) for number, size in enumerate((5, 3)))
    in_turn = [(0, 0, 0, 1, 1, 1)[position] for position in permutation(6, 9, "slots", 1)]
    order = EpochOrder(groups, 4, seed=9, epoch=1)
    assert len(order) == 2
    found = all_of(order)
    # Both kinds of micro-batch are of the same work.
    assert [one.group for one in found[:6]] == in_turn
    assert [one.samples for one in found[:6] if one.group == 0] == [
        tuple(first[:2]),
        tuple(first[2:4]),
        (first[4], first[0]),
    ]
    assert [one.samples for one in found[:6] if one.group == 1] == [(at,) for at in second]
    # The first two come again to complete the second step.
    assert [(one.group, one.samples) for one in found[6:]] == [(one.group, one.samples) for one in found[:2]]
    assert [one.fill for one in found[6:]] == [len(one.samples) for one in found[6:]]


def test_the_last_step_is_completed_with_what_is_nearest_to_its_work():
    """Nine large and six small ones, four in a step: one large and two small are left, and one is lacking."""
    order = EpochOrder([Group(9, 1, work=4), Group(6, 1, work=1)], 4, seed=0, epoch=0)
    *whole, last = order
    assert [Counter(one.group for one in step) for step in whole[:3]].count(Counter({0: 4})) == 2
    assert Counter(one.group for one in last) == Counter({0: 1, 1: 3})
    assert own(last[3]) == () and last[3].samples not in [one.samples for one in last[1:3]]


def test_groups_are_mixed_and_fill_changes_from_epoch_to_epoch():
    steps = list(EpochOrder([Group(400, 4), Group(400, 4)], 1, seed=0, epoch=0))
    first_half = Counter(step[0].group for step in steps[:100])
    assert 30 < first_half[0] < 70
    filled = set()
    for epoch in range(20):
        for one in all_of(EpochOrder([Group(10, 4)], 1, seed=0, epoch=epoch)):
            filled.update(one.samples[len(one.samples) - one.fill :])
    assert filled == set(range(10))


def test_steps_of_unlike_work_come_in_turn():
    """Not all of one kind before all of the other."""
    steps = list(EpochOrder([Group(200, 1, work=1), Group(200, 1, work=9)], 4, seed=3, epoch=0))
    first_half = Counter(step[0].group for step in steps[:50])
    assert 15 < first_half[0] < 35


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=6), st.integers(1, 8))
def test_dealing_gives_every_rank_as_many_and_none_twice(some, ranks):
    loads = [load * (1 + rank / 10) for load in some for rank in range(ranks)]
    shares = deal(loads, ranks)
    assert [len(share) for share in shares] == [len(some)] * ranks
    assert sorted(number for share in shares for number in share) == list(range(len(loads)))
    assert all(share == sorted(share) for share in shares)
    if ranks == 1:
        assert shares == [list(range(len(loads)))]


def test_dealing_balances_work():
    assert deal([3, 1, 1, 3], 2) == [[0, 1], [2, 3]] or deal([3, 1, 1, 3], 2) == [[0, 2], [1, 3]]
    shares = deal([8, 7, 6, 5, 4, 3, 2, 1], 2)
    sums = sorted(sum(8 - number for number in share) for share in shares)
    assert sums == [18, 18]
    assert math.isclose(sum(sums), 36)


def test_a_step_that_is_not_there():
    with pytest.raises(AssertionError):
        EpochOrder([Group(4, 2)], 1, 0, 0).step(2)
