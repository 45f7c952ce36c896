"""What must hold of every order, over many random layouts."""

import random
from collections import Counter

from utils.dataset.ordering import count_fill, epoch_order, steps_per_epoch


def layouts(count=300):
    """Random bucket sizes and batch layouts."""
    draw = random.Random(0)
    for _ in range(count):
        sizes = [draw.randint(1, 40) for _ in range(draw.randint(1, 5))]
        yield sizes, draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 5), draw.randrange(1000)


def own_samples(steps):
    """The samples that are no fill, as (bucket, position)."""
    slots = [slot for step in steps for slot in step]
    return [(slot.bucket, at) for slot in slots for at in slot.samples[: len(slot.samples) - slot.fill]]


def test_every_sample_is_in_an_epoch_exactly_once_beside_fill():
    for sizes, micro_batch, data_ranks, accumulation, seed in layouts():
        steps = epoch_order(sizes, micro_batch, data_ranks, accumulation, seed, epoch=3)
        expected = [(bucket, at) for bucket, size in enumerate(sizes) for at in range(size)]
        assert sorted(own_samples(steps)) == expected


def test_steps_are_whole():
    for sizes, micro_batch, data_ranks, accumulation, seed in layouts():
        steps = epoch_order(sizes, micro_batch, data_ranks, accumulation, seed, epoch=0)
        assert len(steps) == steps_per_epoch(sizes, micro_batch, data_ranks, accumulation)
        assert all(len(step) == accumulation for step in steps)
        assert all(len(slot.samples) == micro_batch * data_ranks for step in steps for slot in step)
        assert all(0 <= at < sizes[slot.bucket] for step in steps for slot in step for at in slot.samples)


def test_fill_is_no_more_than_needed_and_counted():
    for sizes, micro_batch, data_ranks, accumulation, seed in layouts():
        steps = epoch_order(sizes, micro_batch, data_ranks, accumulation, seed, epoch=0)
        slot = micro_batch * data_ranks
        slots = sum(-(-size // slot) for size in sizes)
        fill = count_fill(steps)
        assert fill.samples == sum(-size % slot for size in sizes)
        assert fill.slots == -slots % accumulation
        assert all(
            other.fill == 0 or other.fill == slot
            for step in steps[:-1]
            for other in step
            if sizes[other.bucket] % slot == 0
        )


def test_fill_takes_others_first():
    for sizes, micro_batch, data_ranks, accumulation, seed in layouts():
        for step in epoch_order(sizes, micro_batch, data_ranks, accumulation, seed, epoch=0):
            for slot in step:
                counts = Counter(slot.samples)
                size = sizes[slot.bucket]
                # A bucket smaller than a slot repeats evenly; any other never within a slot.
                assert max(counts.values()) == max(1, -(-len(slot.samples) // size))


def test_ranks_share_a_slot_between_them():
    step = epoch_order([24], 3, 4, 2, seed=0, epoch=0)[0]
    for slot in step:
        shares = [slot.of_rank(rank, 3) for rank in range(4)]
        assert [len(share) for share in shares] == [3] * 4 and sum(shares, ()) == slot.samples


def test_a_pure_function_that_differs_by_seed_and_epoch():
    arguments = ([17, 5, 40], 2, 2, 2)
    first = epoch_order(*arguments, seed=1, epoch=0)
    assert epoch_order(*arguments, seed=1, epoch=0) == first
    assert epoch_order(*arguments, seed=1, epoch=1) != first
    assert epoch_order(*arguments, seed=2, epoch=0) != first


def test_buckets_are_mixed_and_fill_changes_from_epoch_to_epoch():
    steps = epoch_order([400, 400], 4, 1, 1, seed=0, epoch=0)
    first_half = Counter(step[0].bucket for step in steps[:100])
    assert 30 < first_half[0] < 70
    filled = set()
    for epoch in range(20):
        for (slot,) in epoch_order([10], 4, 1, 1, seed=0, epoch=epoch):
            filled.update(slot.samples[len(slot.samples) - slot.fill :])
    assert filled == set(range(10))
