"""That a cache has everything is known from the last time, and not once something may have changed."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.dataset.conftest import MeanEncoder, counts, dataset_of, draw_pictures, samples_of
from utils.dataset import encoding
from utils.dataset.encoding import CacheJob, fill, reclaim_unwanted
from utils.dataset.samples import Sample
from utils.dataset.store_index import INDEX_NAME
from utils.dataset.tensor_store import TensorStore
from utils.ranks import Ranks


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of each time that keys were computed for a store."""
    asked: list[int] = []
    wanted_by = encoding.wanted_by

    def counted(encoder: MeanEncoder, samples: Sequence[Sample]) -> dict:
        asked.append(len(samples))
        return wanted_by(encoder, samples)

    monkeypatch.setattr(encoding, "wanted_by", counted)
    return asked


@pytest.fixture
def samples(pictures: Path, cache: Path) -> list[Sample]:
    return samples_of(dataset_of(pictures), cache)


def job_of(cache: Path, **how: bool) -> CacheJob:
    (cache / "run.toml").touch()
    return CacheJob(cache, cache / "run.toml", Ranks(), **how)


def filled(cache: Path, samples: Sequence[Sample], encoder: MeanEncoder | None = None, **keys: object) -> tuple:
    how = {name: keys.pop(name) for name in ("regenerate", "verify") if name in keys}
    report = fill(encoder or MeanEncoder(), samples, job_of(cache, **how), **{"identity": "one", **keys})
    reclaim_unwanted(["vae"], job_of(cache, **how))
    return counts(report)


def test_what_is_known_is_not_computed(cache: Path, samples: list[Sample], computed: list[int]) -> None:
    assert filled(cache, samples) == (6, 0, 6, 0)
    assert [filled(cache, samples), filled(cache, samples)] == [(6, 6, 0, 0)] * 2
    assert computed == [6]
    with TensorStore(cache / "vae") as store:
        assert len(store) == 6


def test_samples_without_an_identity_are_looked_at(cache: Path, samples: list[Sample], computed: list[int]) -> None:
    assert [filled(cache, samples, identity="")[:3] for _ in range(2)] == [(6, 0, 6), (6, 6, 0)]
    assert computed == [6, 6]


def test_what_differs_is_looked_at(cache: Path, samples: list[Sample], computed: list[int], tmp_path: Path) -> None:
    draw_pictures(tmp_path / "prompts", 2, seed=9)
    prompts = samples_of(dataset_of(tmp_path / "prompts"), cache)
    filled(cache, samples[:4])
    assert filled(cache, samples, identity="two") == (6, 4, 2, 0)
    assert filled(cache, samples, identity="two", further=prompts) == (8, 6, 2, 0)
    assert filled(cache, samples, identity="two", further=prompts) == (8, 8, 0, 0)
    assert filled(cache, samples, MeanEncoder("mean-2"), identity="two", further=prompts) == (8, 0, 8, 0)
    assert filled(cache, samples, identity="two", further=prompts, verify=True)[0] == 8
    assert filled(cache, samples, identity="two", further=prompts, regenerate=True) == (8, 0, 8, 0)
    assert computed == [4, 6, 8, 8, 8, 8]


def test_what_was_deleted_is_made_again(cache: Path, samples: list[Sample]) -> None:
    """By a version of this program that knows nothing of this, too."""
    filled(cache, samples)
    with sqlite3.connect(cache / "vae" / INDEX_NAME) as index:
        index.execute("DELETE FROM items WHERE key = (SELECT min(key) FROM items)")
    assert filled(cache, samples) == (6, 5, 1, 0)
    assert filled(cache, samples) == (6, 6, 0, 0)
    with TensorStore(cache / "vae") as store:
        store.delete(store.keys()[:2])
    assert filled(cache, samples) == (6, 4, 2, 0)


def test_a_shard_that_is_gone_is_made_again(cache: Path, samples: list[Sample]) -> None:
    filled(cache, samples)
    (shard,) = (cache / "vae").glob("*.shard")
    shard.unlink()
    assert filled(cache, samples) == (6, 0, 6, 0)


def test_an_older_index_is_looked_at(cache: Path, samples: list[Sample]) -> None:
    """As from a backup: nothing was deleted in it, and it lacks something."""
    filled(cache, samples[:4])
    before = (cache / "vae" / INDEX_NAME).read_bytes()
    filled(cache, samples, identity="two")
    (cache / "vae" / INDEX_NAME).write_bytes(before)
    assert filled(cache, samples, identity="two")[:3] == (6, 4, 2)


def test_what_could_not_be_encoded_is_tried_again(cache: Path, samples: list[Sample], computed: list[int]) -> None:
    file = samples[0].media.locator.path
    content = file.read_bytes()
    file.write_bytes(content[:60])
    assert filled(cache, samples) == (6, 0, 5, 1)
    file.write_bytes(content)
    assert filled(cache, samples) == (6, 5, 1, 0)
    assert computed == [6, 6]


def test_another_runs_items_go_though_all_is_known(
    cache: Path, samples: list[Sample], pictures: Path, computed: list[int]
) -> None:
    filled(cache, samples)
    other = cache / "other.toml"
    other.touch()
    larger = samples_of(dataset_of(pictures, resolutions=[48, 64]), cache)
    job = replace(job_of(cache), owner=other)
    fill(MeanEncoder(), larger, job, identity="larger")
    filled(cache, samples)
    with TensorStore(cache / "vae") as store:
        assert len(store) == 18
    other.unlink()
    assert filled(cache, samples) == (6, 6, 0, 0)
    with TensorStore(cache / "vae") as store:
        assert len(store) == 6
    assert computed == [6, 12]
