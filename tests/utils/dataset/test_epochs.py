"""What the epochs of a run have in them, counted sample by sample."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.utils.dataset.conftest import plain_sample
from utils.dataset.bucket_table import BucketLine, format_table
from utils.dataset.epochs import Epochs, micro_batch_of
from utils.dataset.going_on import going_on
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


def appearances(epochs, epoch, with_fill=False, first=0):
    """(sample's name, copy) in the order in which an epoch shows them, from its step `first` on."""
    found = []
    for step in range(first, epochs.steps_in(epoch)):
        for micro_batch in epochs.step(epoch, step):
            shown = [(sample.id, copy) for sample, copy in epochs.samples_of(micro_batch, epoch)]
            found += shown if with_fill else shown[: len(shown) - micro_batch.fill]
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
        found = appearances(epochs, epoch)
        wanted = [(name, copy) for name, count in expected(epoch).items() for copy in range(count)]
        assert sorted(found) == sorted(wanted)


@settings(max_examples=40)
@given(sample_lists(curricula=True), LAYOUTS)
def test_curricula_by_epochs_and_by_steps(samples, layout):
    epochs = epochs_of(samples, **layout)
    expected = counts_by_hand(samples, layout["seed"], epochs)
    for epoch in (0, 3, 1, 5):
        found = Counter(name for name, _ in appearances(epochs, epoch))
        assert found == +Counter(expected(epoch))


@settings(max_examples=40)
@given(sample_lists(repeats=st.floats(0.05, 3.5)), st.integers(0, 99), st.integers(1, 40))
def test_fractions_of_repeats_add_up(samples, seed, number):
    epochs = epochs_of(samples, seed=seed)
    found = Counter(name for epoch in range(number) for name, _ in appearances(epochs, epoch))
    for sample in samples:
        assert abs(found[sample.id] - round(sample.repeats * number)) <= 1


@settings(max_examples=40)
@given(sample_lists(), LAYOUTS, st.integers(0, 4))
def test_places_count_the_samples_of_a_step_and_of_an_epoch(samples, layout, epoch):
    """At any layout a sample has the same place in its epoch, also where it fills a batch."""
    alone = {copy: position for _, copy, position in placed(epochs_of(samples, seed=layout["seed"]), epoch)}
    assert sorted(alone.values()) == list(range(len(alone)))
    epochs = epochs_of(samples, **layout)
    assert {copy: position for _, copy, position in placed(epochs, epoch)} == alone
    for step in range(epochs.steps_in(epoch)):
        those = epochs.positions(epoch, step)
        in_step = [position for positions in those for position in positions.in_step]
        assert in_step == list(range(epochs.examples(epoch, step)))
        for positions in those:
            assert (positions.step, positions.of_step, positions.of_epoch) == (step, len(in_step), len(alone))


def placed(epochs, epoch):
    """(place in its step, (sample's name, copy), place in the epoch) of all that an epoch shows."""
    found = []
    for step in range(epochs.steps_in(epoch)):
        for micro_batch, positions in zip(epochs.step(epoch, step), epochs.positions(epoch, step), strict=True):
            shown = [(sample.id, copy) for sample, copy in epochs.samples_of(micro_batch, epoch)]
            found += zip(positions.in_step, shown, positions.in_epoch, strict=True)
    return found


@given(sample_lists(), st.sampled_from([(1, 4), (2, 2), (4, 1), (1, 6), (3, 2), (6, 1)]), st.integers(0, 99))
def test_a_step_does_not_depend_on_how_it_is_dealt(samples, layout, seed):
    """Each micro-batch of a step goes to one data rank, as many to each."""
    ranks, accumulation = layout
    alone, dealt = epochs_of(samples, 1, ranks * accumulation, seed), epochs_of(samples, ranks, accumulation, seed)
    assert alone.steps_in(1) == dealt.steps_in(1)
    for index in range(alone.steps_in(1)):
        assert alone.step(1, index) == dealt.step(1, index)
        assert alone.positions(1, index) == dealt.positions(1, index)
        shares = [dealt.share(1, index, rank) for rank in range(ranks)]
        assert [len(share) for share in shares] == [accumulation] * ranks
        assert sorted(sum(shares, [])) == alone.share(1, index, 0) == list(range(ranks * accumulation))


def test_work_is_dealt_alike():
    """Two large and two small micro-batches: one of each for each rank, as the given work says, and not the pixels."""
    samples = [plain_sample(f"s{number}", SQUARE) for number in range(4)]
    samples += [plain_sample(f"c{number}", CLIP) for number in range(2)]
    work = {(SQUARE,): 1.0, (CLIP,): 6.0}
    epochs = Epochs(samples, MICRO_BATCHES.__getitem__, 2, 2, 0, work=work.__getitem__)
    loads = [[epochs.work_of(epochs.step(0, 0)[number]) for number in epochs.share(0, 0, rank)] for rank in range(2)]
    assert [sorted(load) for load in loads] == [[2.0, 6.0], [2.0, 6.0]]


@settings(max_examples=40)
@given(sample_lists(least=12), LAYOUTS, LAYOUTS, st.floats(0, 1))
def test_with_another_global_batch_an_epoch_goes_on_with_what_it_has_not_had(samples, before, after, share):
    """Its samples come as often as without the change, and the epochs after it follow as they would."""
    seed = before["seed"]
    old, anew = epochs_of(samples, **before), epochs_of(samples, **{**after, "seed": seed})
    done = int(share * old.steps_in(1))
    shown = appearances(old, 1)[: len(appearances(old, 1)) - len(appearances(old, 1, first=done))]
    at = {"step": old.first_step(1) + done, "step_in_epoch": done, "share": done / old.steps_in(1)}
    gone_on, remark = going_on(anew, 1, **at, order=json.loads(json.dumps(old.state(1, done))))
    assert sorted(shown + appearances(gone_on, 1, first=done)) == sorted(appearances(old, 1))
    assert gone_on.first_step(1) == old.first_step(1)
    assert gone_on.first_step(3) - gone_on.first_step(2) == anew.steps_in(2)
    assert appearances(gone_on, 2) == appearances(anew, 2)
    if old.layout(1) == anew.layout(1):
        assert remark is None and appearances(gone_on, 1, first=done) == appearances(old, 1, first=done)
    else:
        assert remark.endswith(f"goes on with the {len(appearances(old, 1)) - len(shown)} samples that it has not had")
    # A stop in what it went on with changes nothing.
    further = done + (gone_on.steps_in(1) - done) // 2
    state = json.loads(json.dumps(gone_on.state(1, further)))
    at = {"step": gone_on.first_step(1) + further, "step_in_epoch": further, "share": 0.5}
    again, remark = going_on(anew, 1, **at, order=state)
    assert remark is None and again.steps_in(1) == gone_on.steps_in(1)
    assert appearances(again, 1, first=further) == appearances(gone_on, 1, first=further)


def test_with_other_data_the_same_share_of_an_epoch_is_done():
    few = epochs_of([plain_sample(f"s{number}") for number in range(8)])
    more = epochs_of([plain_sample(f"s{number}") for number in range(16)])
    at = {"step": 7, "step_in_epoch": 3, "share": 3 / 4}
    gone_on, remark = going_on(more, 1, **at, order=few.state(1, 3))
    assert remark is None and gone_on.first_step(1) == 4
    assert gone_on.steps_in(1) == 3 + 2 and len(appearances(gone_on, 1, first=3)) == 4
    of_before, remark = going_on(few, 1, **at, order=None)
    assert "of an earlier version" in remark and len(appearances(of_before, 1, first=3)) == 2
    _, remark = going_on(few, 1, step=4, step_in_epoch=0, share=0, order=None)
    assert remark is None


def test_a_curriculum_by_steps_counts_the_steps_that_were_made():
    """Ten steps of one micro-batch, then steps of five: what begins at step 14 begins with the fourth epoch."""
    samples = [plain_sample(f"s{number}", WIDE) for number in range(30)]
    samples += [plain_sample(f"l{number}", WIDE, start_step=14) for number in range(3)]
    old, anew = epochs_of(samples), epochs_of(samples, accumulation=5)
    gone_on, _ = going_on(anew, 1, step=10, step_in_epoch=0, share=0, order=old.state(1, 0))
    assert [gone_on.first_step(epoch) for epoch in range(1, 5)] == [10, 12, 14, 17]
    assert [anew.first_step(epoch) for epoch in range(1, 5)] == [2, 4, 6, 8]


@given(sample_lists(), LAYOUTS)
def test_all_of_a_shape_appears_before_any_of_it_appears_again(samples, layout):
    epochs, bucket_of = epochs_of(samples, **layout), {sample.id: sample.bucket for sample in samples}
    shown = appearances(epochs, 0, with_fill=True)
    for bucket in MICRO_BATCHES:
        mine = [one for one in shown if bucket_of[one[0]] == bucket]
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
        for name, copy in appearances(epochs, epoch):
            used[name][picker.pick(by_id[name], epoch, copy).take.start] += 1
    for sample in samples:
        counts = [used[sample.id][take.start] for take in sample.takes]
        assert max(counts) - min(counts) <= 1


def test_the_order_is_a_function_of_the_seed_and_new_in_each_epoch():
    samples = [plain_sample(f"s{number}") for number in range(30)]
    orders = [appearances(epochs_of(samples, seed=seed), epoch) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


@given(sample_lists(curricula=True), LAYOUTS)
@settings(max_examples=40)
def test_the_table_counts_what_the_order_does(samples, layout):
    epochs = epochs_of(samples, **layout)
    *lines, total = epochs.table()
    every = [micro_batch for step in range(epochs.steps_in(0)) for micro_batch in epochs.step(0, step)]
    assert total.batches == len(every)
    assert total.fill == sum(micro_batch.fill for micro_batch in every)
    assert total.samples == len(appearances(epochs, 0)) and total.files == len(samples)
    assert sum(epochs.examples(0, step) for step in range(epochs.steps_in(0))) == total.samples + total.fill
    assert sorted((line.name, line.frames) for line in lines) == sorted(
        (f"{bucket.width}x{bucket.height}", bucket.frames) for bucket in {sample.bucket for sample in samples}
    )
    for number, line in enumerate(lines):
        own = [one for one in every if one.group == number and one.fill < len(one.samples)]
        assert (line.batches, line.fill) == (len(own), sum(one.fill for one in own))


def test_the_table_as_text():
    samples = [plain_sample(f"s{number}", repeats=2) for number in range(5)] + [plain_sample("w", WIDE, 2)]
    lines = epochs_of(samples, ranks=2, accumulation=4).table()
    assert lines == [
        BucketLine("64x64", 1, 5, 10, 2.0, 5, 0),
        BucketLine("128x32", 1, 1, 2, 2.0, 1, 1),
        # Two micro-batches more complete the step.
        BucketLine("", 0, 6, 12, 2.0, 8, lines[-1].fill),
    ]
    assert lines[-1].fill in (1 + 4, 1 + 5)
    *text, told = format_table(lines).splitlines()
    assert told.startswith("fill: how often samples are used once more")
    assert "fill:" not in format_table(epochs_of(samples[:5]).table())
    assert text[1].split() == ["64x64", "1", "5", "10", "2", "5", "0"] and text[3].split()[0] == "total"
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
    assert halves.first_step(2) == sum(math.ceil(len(appearances(halves, epoch)) / 2) for epoch in (0, 1))


def test_reading_ahead_into_the_next_epoch_costs_no_other_one():
    epochs = epochs_of([plain_sample(f"s{number}") for number in range(5)])
    opened = epochs._open(2)
    assert epochs._open(3) is not opened and epochs._open(2) is opened


def test_many_threads_may_ask_at_once():
    samples = [plain_sample(f"s{number}", repeats=1.5, start_step=number) for number in range(12)]
    samples.append(plain_sample("always"))
    expected = [appearances(epochs_of(samples), epoch) for epoch in range(8)]
    for _ in range(5):
        epochs = epochs_of(samples)
        with ThreadPoolExecutor(8) as pool:
            asked = [epoch for epoch in (0, 1, 7, 2, 6, 3, 5, 4) for _ in range(4)]
            found = list(pool.map(partial(appearances, epochs), asked))
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
