"""What the epochs of a run have in them, counted sample by sample."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.dataset.conftest import plain_sample
from utils.dataset.epochs import BucketLine, Epochs, format_table, micro_batch_of
from utils.dataset.samples import Bucket, Take, VersionPicker
from utils.diffusion import seeds
from utils.errors import UserError
from utils.settings.schema import Settings

SQUARE, WIDE, CLIP = Bucket(64, 64, 1), Bucket(128, 32, 1), Bucket(64, 64, 5)
MICRO_BATCHES = {SQUARE: 2, WIDE: 3, CLIP: 1}
REPEATS = st.sampled_from([1, 2, 3, 0.5, 1.7, 1 / 3])
TAKES = tuple(Take(start=float(number)) for number in range(4))


def epochs_of(samples, ranks=1, accumulation=1, seed=0):
    return Epochs(samples, MICRO_BATCHES.__getitem__, ranks, accumulation, seed)


@st.composite
def sample_lists(draw, repeats=REPEATS, curricula=False, least=1):
    """Samples of three shapes, with keys that say how often and when they are used; one of them is in every epoch."""
    samples = [plain_sample("always", draw(st.sampled_from([SQUARE, WIDE, CLIP])), draw(st.integers(1, 2)))]
    for number in range(draw(st.integers(least - 1, 25))):
        keys = {}
        if curricula:
            first = draw(st.integers(1, 5))
            step = draw(st.integers(0, 30))
            keys = {
                "start_epoch": first,
                "end_epoch": draw(st.none() | st.integers(first, 6)),
                "start_step": step,
                "end_step": draw(st.none() | st.integers(step + 1, 40)),
            }
        bucket = draw(st.sampled_from([SQUARE, WIDE, CLIP]))
        samples.append(plain_sample(f"s{number}", bucket, draw(repeats), takes=TAKES, **keys))
    return samples


LAYOUT = {"ranks": st.integers(1, 4), "accumulation": st.integers(1, 4), "seed": st.integers(0, 99)}
LAYOUTS = st.fixed_dictionaries(LAYOUT)


def appearances(epochs, epoch, ranks, with_fill=False):
    """(sample's name, copy) in the order in which the ranks together show them."""
    found = []
    for step in range(epochs.steps_in(epoch)):
        for slot in epochs.step(epoch, step):
            shares = [epochs.samples_of(slot, epoch, rank) for rank in range(ranks)]
            version = [(sample.id, copy) for share in shares for sample, copy in share]
            found += version if with_fill else version[: len(version) - slot.fill]
    return found


def counts_by_hand(samples, seed, epochs):
    """How often each sample is shown in each epoch, and the step that the epoch begins at, given its steps."""

    def count(sample, epoch, begins):
        rules = sample.rules
        if not rules.start_epoch <= epoch + 1 <= (rules.end_epoch or math.inf):
            return 0
        if not rules.start_step <= begins < (rules.end_step or math.inf):
            return 0
        phase = 0.0 if sample.repeats == int(sample.repeats) else seeds.uniform(seed, "repeats", sample.id)
        return math.floor(sample.repeats * (epoch + 1) + phase) - math.floor(sample.repeats * epoch + phase)

    return lambda epoch: {s.id: count(s, epoch, epochs.first_step(epoch)) for s in samples}


@given(sample_lists(), LAYOUTS)
def test_every_sample_appears_as_often_as_it_is_repeated(samples, layout):
    epochs = epochs_of(samples, **layout)
    expected = counts_by_hand(samples, layout["seed"], epochs)
    for epoch in range(3):
        found = appearances(epochs, epoch, layout["ranks"])
        wanted = [(name, copy) for name, count in expected(epoch).items() for copy in range(count)]
        assert sorted(found) == sorted(wanted)


@settings(max_examples=40)
@given(sample_lists(curricula=True), LAYOUTS)
def test_curricula_by_epochs_and_by_steps(samples, layout):
    epochs = epochs_of(samples, **layout)
    expected = counts_by_hand(samples, layout["seed"], epochs)
    for epoch in (0, 3, 1, 5):
        found = Counter(name for name, _ in appearances(epochs, epoch, layout["ranks"]))
        assert found == +Counter(expected(epoch))


@settings(max_examples=40)
@given(sample_lists(repeats=st.floats(0.05, 3.5)), st.integers(0, 99), st.integers(1, 40))
def test_fractions_of_repeats_add_up(samples, seed, number):
    epochs = epochs_of(samples, seed=seed)
    found = Counter(name for epoch in range(number) for name, _ in appearances(epochs, epoch, 1))
    for sample in samples:
        assert abs(found[sample.id] - round(sample.repeats * number)) <= 1


@settings(max_examples=40)
@given(sample_lists(), LAYOUTS, st.integers(0, 4))
def test_places_count_the_samples_of_a_step_and_of_an_epoch(samples, layout, epoch):
    """At any layout a sample has the same place in its epoch, also where it fills a batch."""
    alone = {copy: position for _, copy, position in placed(epochs_of(samples, seed=layout["seed"]), epoch, 1)}
    assert sorted(alone.values()) == list(range(len(alone)))
    epochs = epochs_of(samples, **layout)
    assert {copy: position for _, copy, position in placed(epochs, epoch, layout["ranks"])} == alone
    for step in range(epochs.steps_in(epoch)):
        of_ranks = [epochs.positions(epoch, step, rank) for rank in range(layout["ranks"])]
        in_step = [position for slots in of_ranks for positions in slots for position in positions.in_step]
        assert sorted(in_step) == list(range(epochs.examples(epoch, step)))
        for positions in (positions for slots in of_ranks for positions in slots):
            assert (positions.step, positions.of_step, positions.of_epoch) == (step, len(in_step), len(alone))


def placed(epochs, epoch, ranks):
    """(place in its step, (sample's name, copy), place in the epoch) of all that an epoch shows."""
    found = []
    for step in range(epochs.steps_in(epoch)):
        for rank in range(ranks):
            for slot, positions in zip(epochs.step(epoch, step), epochs.positions(epoch, step, rank), strict=True):
                version = [(sample.id, copy) for sample, copy in epochs.samples_of(slot, epoch, rank)]
                found += zip(positions.in_step, version, positions.in_epoch, strict=True)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_places_of_a_step_do_not_depend_on_how_it_is_shared(ranks):
    """Of samples of one shape: two data ranks are as two accumulated micro-batches."""
    samples = [plain_sample(str(number), SQUARE) for number in range(32)]
    alone, shared = epochs_of(samples, 1, accumulation=ranks), epochs_of(samples, ranks)
    assert sorted(placed(alone, 1, 1)) == sorted(placed(shared, 1, ranks))


@settings(max_examples=40)
@given(sample_lists(least=12), st.integers(0, 99), st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_within_a_group_the_order_is_the_same_for_any_number_of_data_ranks(samples, seed, ranks):
    bucket_of = {sample.id: sample.bucket for sample in samples}

    def by_bucket(count):
        found = {}
        for name, copy in appearances(epochs_of(samples, count, 2, seed), 1, count):
            found.setdefault(bucket_of[name], []).append((name, copy))
        return found

    assert all(by_bucket(count) == by_bucket(1) for count in ranks)


@given(sample_lists(), LAYOUTS)
def test_all_of_a_shape_appears_before_any_of_it_appears_again(samples, layout):
    epochs, bucket_of = epochs_of(samples, **layout), {sample.id: sample.bucket for sample in samples}
    version = appearances(epochs, 0, layout["ranks"], with_fill=True)
    for bucket in MICRO_BATCHES:
        mine = [one for one in version if bucket_of[one[0]] == bucket]
        different = len(set(mine))
        assert len(set(mine[:different])) == different


@given(sample_lists(repeats=st.sampled_from([0.5, 1, 1.5, 0.25, 3])), st.integers(0, 99))
@settings(max_examples=40)
def test_takes_are_used_alike(samples, seed):
    """Also by a sample that is in every other epoch alone."""
    epochs, picker = epochs_of(samples, seed=seed), VersionPicker(seed, ["text"])
    by_id = {sample.id: sample for sample in samples}
    used = {sample.id: Counter() for sample in samples}
    for epoch in range(12):
        for name, copy in appearances(epochs, epoch, 1):
            used[name][picker.pick(by_id[name], epoch, copy).take.start] += 1
    for sample in samples:
        counts = [used[sample.id][take.start] for take in sample.takes]
        assert max(counts) - min(counts) <= 1


def test_the_order_is_a_function_of_the_seed_and_new_in_each_epoch():
    samples = [plain_sample(f"s{number}") for number in range(30)]
    orders = [appearances(epochs_of(samples, seed=seed), epoch, 1) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


@given(sample_lists(curricula=True), LAYOUTS)
@settings(max_examples=40)
def test_the_table_counts_what_the_order_does(samples, layout):
    epochs, ranks = epochs_of(samples, **layout), layout["ranks"]
    *lines, total = epochs.table()
    slots = [slot for step in range(epochs.steps_in(0)) for slot in epochs.step(0, step)]
    assert total.batches == len(slots)
    assert total.fill == sum(slot.fill for slot in slots)
    assert total.samples == len(appearances(epochs, 0, ranks)) and total.files == len(samples)
    assert sum(epochs.examples(0, step) for step in range(epochs.steps_in(0))) == total.samples + total.fill
    assert sorted((line.name, line.frames) for line in lines) == sorted(
        (f"{bucket.width}x{bucket.height}", bucket.frames) for bucket in {sample.bucket for sample in samples}
    )
    for number, line in enumerate(lines):
        own = [slot for slot in slots if slot.group == number and slot.fill < len(slot.samples)]
        assert (line.batches, line.fill) == (len(own), sum(slot.fill for slot in own))


def test_the_table_as_text():
    samples = [plain_sample(f"s{number}", repeats=2) for number in range(5)] + [plain_sample("w", WIDE, 2)]
    lines = epochs_of(samples, ranks=2, accumulation=3).table()
    assert lines == [
        BucketLine("64x64", 1, 5, 10, 2.0, 3, 2),
        BucketLine("128x32", 1, 1, 2, 2.0, 1, 4),
        # Two slots more complete the second step: those that the epoch begins with.
        BucketLine("", 0, 6, 12, 2.0, 6, lines[-1].fill),
    ]
    assert lines[-1].fill in (6 + 8, 6 + 10)
    *text, told = format_table(lines).splitlines()
    assert told.startswith("fill: how often samples are used once more")
    assert "fill:" not in format_table(epochs_of(samples[:5]).table())
    assert text[1].split() == ["64x64", "1", "5", "10", "2", "3", "2"] and text[3].split()[0] == "total"
    assert len({len(line) for line in text}) == 1


def test_an_epoch_without_samples_is_told():
    epochs = epochs_of([plain_sample("a", end_epoch=2), plain_sample("b", start_epoch=4)])
    assert epochs.first_step(2) == 2
    for ask in (lambda: epochs.first_step(3), lambda: epochs.step(2, 0), lambda: epochs.table(2)):
        with pytest.raises(UserError, match="epoch 3 has no sample at all"):
            ask()


def test_steps_of_epochs_far_ahead():
    samples = [plain_sample(f"s{number}", repeats=2) for number in range(5)]
    assert epochs_of(samples).first_step(100_000) == 500_000
    halves = epochs_of([plain_sample(f"s{number}", repeats=0.5) for number in range(100)])
    assert halves.first_step(2) == sum(math.ceil(len(appearances(halves, epoch, 1)) / 2) for epoch in (0, 1))


def test_reading_ahead_into_the_next_epoch_costs_no_other_one():
    epochs = epochs_of([plain_sample(f"s{number}") for number in range(5)])
    opened = epochs._open(2)
    assert epochs._open(3) is not opened and epochs._open(2) is opened


def test_many_threads_may_ask_at_once():
    samples = [plain_sample(f"s{number}", repeats=1.5, start_step=number) for number in range(12)]
    samples.append(plain_sample("always"))
    expected = [appearances(epochs_of(samples), epoch, 1) for epoch in range(8)]
    for _ in range(5):
        epochs = epochs_of(samples)
        with ThreadPoolExecutor(8) as pool:
            asked = [epoch for epoch in (0, 1, 7, 2, 6, 3, 5, 4) for _ in range(4)]
            found = list(pool.map(partial(appearances, epochs, ranks=1), asked))
        assert found == [expected[epoch] for epoch in asked]


def run_settings(**keys):
    defaults = {"output_dir": Path("out"), "dataset": Path("d.toml"), "model": {"type": "flux"}}
    return Settings.model_validate({**defaults, "optimizer": {"type": "adamw", "lr": 1e-4}, **keys})


@pytest.mark.parametrize(
    ("keys", "bucket", "expected"),
    [
        ({}, SQUARE, 1),
        ({"micro_batch_size_per_gpu": 4}, CLIP, 4),
        ({"micro_batch_size_per_gpu": 4, "image_micro_batch_size_per_gpu": 7}, SQUARE, 7),
        ({"micro_batch_size_per_gpu": 4, "image_micro_batch_size_per_gpu": 7}, CLIP, 4),
        ({"micro_batch_size_per_gpu": [[512, 8], [1024, 2]]}, Bucket(1216, 832, 1), 2),
        ({"micro_batch_size_per_gpu": [[512, 8], [1024, 2]]}, Bucket(640, 384, 1), 8),
        # 724 is half-way between 512 and 1024.
        ({"micro_batch_size_per_gpu": [[512, 8], [1024, 2]]}, Bucket(730, 730, 1), 2),
        ({"micro_batch_size_per_gpu": [[512, 8], [1024, 2]]}, Bucket(720, 720, 1), 8),
        ({"micro_batch_size_per_gpu": 2, "image_micro_batch_size_per_gpu": [[64, 9], [512, 3]]}, SQUARE, 9),
    ],
)
def test_micro_batch_sizes(keys, bucket, expected):
    assert micro_batch_of(run_settings(**keys), bucket) == expected


def test_micro_batch_sizes_of_evaluation():
    chosen = run_settings(micro_batch_size_per_gpu=2, image_micro_batch_size_per_gpu=3, eval_micro_batch_size_per_gpu=5)
    assert [micro_batch_of(chosen, bucket, evaluating=True) for bucket in (SQUARE, CLIP)] == [5, 5]
    other = run_settings(micro_batch_size_per_gpu=2, image_micro_batch_size_per_gpu=3)
    assert [micro_batch_of(other, bucket, evaluating=True) for bucket in (SQUARE, CLIP)] == [3, 2]
    both = run_settings(eval_micro_batch_size_per_gpu=5, eval_image_micro_batch_size_per_gpu=[[64, 9], [512, 6]])
    assert [micro_batch_of(both, bucket, evaluating=True) for bucket in (SQUARE, CLIP)] == [9, 5]
    assert [micro_batch_of(both, bucket) for bucket in (SQUARE, CLIP)] == [1, 1]
