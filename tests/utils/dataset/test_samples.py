"""How a sample is shown: which version of it, with which caption, masked or not."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.utils.dataset.conftest import plain_sample
from utils.dataset.captions import caption_variant
from utils.dataset.samples import (
    Bucket,
    Control,
    SampleVersion,
    Take,
    VersionPicker,
    evaluation_version,
    may_lack_caption,
    version_of_prompt,
)
from utils.media.colour import Jitter
from utils.media.geometry import View

ENCODERS = ("clip", "t5")
PICKER = VersionPicker(3, ENCODERS)


def shares(happens, count=2000):
    """In what share of many (sample, epoch) something happens."""
    return sum(happens(plain_sample(f"s{number // 10}"), number % 10) for number in range(count)) / count


def test_a_pure_function_of_the_seed_and_the_names():
    sample = plain_sample("a", captions=("one", "two", "three"), takes=(Take(), Take(flip=True)))
    version = [PICKER.pick(sample, epoch, copy) for epoch in range(20) for copy in range(2)]
    assert version == [VersionPicker(3, ENCODERS).pick(sample, epoch, copy) for epoch in range(20) for copy in range(2)]
    assert len({one.caption for one in version}) == 3
    other = VersionPicker(4, ENCODERS)
    assert version != [other.pick(sample, epoch, copy) for epoch in range(20) for copy in range(2)]


def test_the_copies_of_an_epoch_draw_different_noise():
    sample = plain_sample("a", repeats=3)
    assert [PICKER.pick(sample, 1, copy).draw for copy in range(3)] == ["a", "a#1", "a#2"]
    assert PICKER.pick(sample, 1, 0).draw == PICKER.pick(sample, 2, 0).draw


@given(st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(0, 50))
def test_takes_follow_one_another(count, repeats, seed):
    sample = plain_sample("a", takes=tuple(Take(start=float(n)) for n in range(count)), repeats=repeats)
    picker = VersionPicker(seed, ())
    turns = [(epoch, copy) for epoch in range(10) for copy in range(repeats)]
    starts = [picker.pick(sample, *turn).take.start for turn in turns]
    assert starts == [(starts[0] + turn) % count for turn in range(len(turns))]


def test_captions_are_drawn_alike():
    captions = ("one", "two", "three", "four")
    found = Counter(PICKER.pick(plain_sample(f"s{number}", captions=captions), 0, 0).caption for number in range(2000))
    assert all(400 < found[caption] < 600 for caption in captions)


def test_fresh_captions_are_new_in_each_epoch():
    caption = ", ".join("abcdefgh")
    sample = plain_sample("a", captions=(caption,), cache_shuffle_num=1, keep_tokens=1)
    fresh = VersionPicker(3, ENCODERS, fresh_captions=True)
    found = [fresh.pick(sample, epoch, 0).caption for epoch in range(6)]
    assert found == [caption_variant(caption, sample.rules, 3, "a", epoch) for epoch in range(6)]
    assert len(set(found)) == 6 and {PICKER.pick(sample, epoch, 0).caption for epoch in range(6)} == {caption}


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_share_of_captions_that_are_left_out(fraction):
    def happens(sample, epoch):
        version = PICKER.pick(replace(sample, rules=plain_sample(uncond_fraction=fraction).rules), epoch, 0)
        assert version.unconditional in (frozenset(), frozenset(ENCODERS))
        return bool(version.unconditional)

    assert shares(happens) == pytest.approx(fraction, abs=0.04 if 0 < fraction < 1 else 0)


def test_each_encoder_may_have_a_share_of_its_own():
    rules = plain_sample(uncond_fraction_per_encoder={"clip": 0.5, "t5": 0.2}).rules
    found = Counter()
    for number in range(2000):
        version = PICKER.pick(replace(plain_sample(f"s{number}"), rules=rules), 0, 0)
        found[version.unconditional] += 1
        for name in ENCODERS:
            assert version.caption_for(name) == ("" if name in version.unconditional else version.caption)
    expected = {frozenset(ENCODERS): 0.1, frozenset(["clip"]): 0.4, frozenset(["t5"]): 0.1, frozenset(): 0.4}
    assert {names: count / 2000 for names, count in found.items()} == pytest.approx(expected, abs=0.04)


def test_every_nth_epoch_is_without_captions():
    sample = plain_sample("a", uncond_every_n_epochs=3)
    without = [epoch for epoch in range(9) if PICKER.pick(sample, epoch, 0).unconditional == frozenset(ENCODERS)]
    assert without == [2, 5, 8]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, False),
        ({"uncond_fraction": 0.1}, True),
        ({"uncond_every_n_epochs": 2}, True),
        ({"uncond_fraction_per_encoder": {"t5": 0.0}}, False),
        ({"uncond_fraction_per_encoder": {"t5": 0.1}}, True),
    ],
)
def test_what_may_lack_its_caption(keys, expected):
    assert may_lack_caption(plain_sample("a", **keys)) is expected


@pytest.mark.parametrize("probability", [0.0, 0.4, 1.0])
def test_the_share_of_masks_that_are_applied(probability):
    rules = plain_sample(mask_probability=probability).rules

    def happens(sample, epoch):
        return PICKER.is_masked(PICKER.pick(replace(sample, rules=rules), epoch, 0), epoch)

    assert shares(happens) == pytest.approx(probability, abs=0.04 if 0 < probability < 1 else 0)


def test_evaluation_shows_the_first_version_of_all():
    sample = plain_sample("a", captions=("one", "two"), takes=(Take(flip=True), Take()), uncond_fraction=1.0)
    assert evaluation_version(sample) == SampleVersion(sample, Take(flip=True), "one", "a")


def test_a_prompt_is_a_sample_without_a_file():
    version = version_of_prompt("a bear", Bucket(64, 32, 1))
    assert (version.caption, version.caption_for("t5"), version.sample.media) == ("a bear", "a bear", None)


def test_what_a_take_shows():
    take = Take((0.25, 0.75), True, Jitter(1.1, 0.9, 1.0, 0.02), 1.5)
    assert take.view(Bucket(64, 32, 9)) == View(64, 32, (0.25, 0.75), True, Jitter(1.1, 0.9, 1.0, 0.02))
    assert take.plain_view(Bucket(32, 16, 1)) == View(32, 16, (0.25, 0.75), True)


def test_a_batch_shares_the_sizes_of_its_controls():
    bucket, other = Bucket(64, 64, 1), Bucket(32, 32, 1)
    sample = plain_sample("a", bucket)
    edit = replace(sample, controls=(Control(sample.media, other),))
    assert sample.shape == (bucket,) and edit.shape == (bucket, other)
