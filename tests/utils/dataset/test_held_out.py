"""What is held out follows from the pictures alone, and none of their versions is trained."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from utils.dataset.collection import Collection, Source, divided
from utils.dataset.held_out import held_out, place_of
from utils.dataset.samples import Bucket, MediaFile, Sample, Take
from utils.dataset.sources import Locator
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

RULES = DirectorySettings(path=Path("pictures"))
SIZES = (Bucket(64, 64, 1), Bucket(96, 48, 1))


def picture(number: int, bucket: Bucket = SIZES[0], rules: DirectorySettings = RULES) -> Sample:
    digest = hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()
    media = MediaFile(Locator(f"{number}.png"), digest, bucket.width, bucket.height, 1)
    takes = (Take(), Take(flip=True))
    return Sample(f"{digest}-{bucket}", media, bucket, takes, ("a", "b"), (), None, 0.0, 2.5, rules, 0.5)


def names(samples: list[Sample]) -> set[str]:
    return {sample.media.locator.path.name for sample in samples}


def collection(samples: list[Sample]) -> Collection:
    source = Source("train", Path("data.toml"), DatasetSettings(directory=[{"path": "pictures"}]))
    return Collection(source, samples, [], [], len(samples))


def test_about_the_fraction_is_held_out_and_stays_so_when_others_come() -> None:
    few, many = ([picture(number) for number in range(count)] for count in (1000, 2000))
    held = held_out(few, 0.0, 0.1)
    assert 70 <= len(held) <= 130
    assert names(held) == names(held_out(many, 0.0, 0.1)) & names(few)
    assert names(held_out(few[::-1], 0.0, 0.1)) == names(held)
    # Two parts have nothing in common.
    assert not names(held) & names(held_out(few, 0.1, 0.1))


def test_one_version_of_a_picture_is_evaluated_and_none_is_trained() -> None:
    samples = [picture(number, size) for number in range(200) for size in SIZES]
    part = Source("part", Path("data.toml"), DatasetSettings(directory=[{"path": "pictures"}]), 0.3)
    training, held = divided(collection(samples), [part])
    assert len(names(held.samples)) == len(held.samples) and not names(held.samples) & names(training.samples)
    assert len(names(training.samples)) + len(held.samples) == 200 and len(training.samples) == 400 - 2 * len(
        held.samples
    )
    assert {sample.bucket for sample in held.samples} == set(SIZES)
    assert {(one.takes, one.captions, one.repeats, one.turn) for one in held.samples} == {
        ((Take(),), ("a",), 1.0, None)
    }
    # The turns of those that are left are spread evenly.
    assert sorted(one.turn for one in training.samples) == [
        n / len(training.samples) for n in range(len(training.samples))
    ]


def test_of_a_few_pictures_one_is_held_out() -> None:
    samples = [picture(number) for number in range(5)]
    (one,) = held_out(samples, 0.0, 1e-9)
    assert place_of(one.media.digest) == min(place_of(sample.media.digest) for sample in samples)


def test_regularisation_data_is_not_held_out() -> None:
    rules = DirectorySettings(path=Path("class"), is_regularisation_data=True)
    samples = [replace(picture(number), rules=rules if number % 2 else RULES) for number in range(100)]
    assert all(not sample.rules.is_regularisation_data for sample in held_out(samples, 0.0, 0.9))


def test_a_size_of_which_nothing_is_left_is_told() -> None:
    samples = [picture(number) for number in range(50)]
    lone = next(n for n in range(1000, 2000) if place_of(picture(n).media.digest) < 0.5)
    part = Source("part", Path("data.toml"), DatasetSettings(directory=[{"path": "pictures"}]), 0.5)
    training, held = divided(collection([*samples, picture(lone, SIZES[1])]), [part])
    assert f"{lone}.png" in names(held.samples)
    (remark,) = training.remarks
    assert remark.file == "96x48x1" and "all 1 samples of this size are in 'part'" in remark.text


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_fraction_is_a_part(fraction: float) -> None:
    from utils.settings.run_tables import EvalDataset

    with pytest.raises(ValueError, match="fraction"):
        EvalDataset(name="part", fraction=fraction)
