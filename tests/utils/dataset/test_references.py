"""What nobody wants any more goes, once it is much; what another run wants stays."""

import pytest
import torch

from utils.dataset import references
from utils.dataset.tensor_store import TensorStore


@pytest.fixture
def owners(tmp_path):
    """The settings files of two runs."""
    files = [tmp_path / "first.toml", tmp_path / "second.toml"]
    for file in files:
        file.write_text("")
    return files


@pytest.fixture
def store(tmp_path):
    """A store of ten items, in small shards."""
    (tmp_path / "cache").mkdir()
    with TensorStore(tmp_path / "cache" / "vae", "test", shard_bytes=4096) as store:
        for number in range(10):
            store.put(str(number), {"x": torch.full((500,), float(number))})
        store.flush()
        yield store


def keys(*numbers):
    return [str(number) for number in numbers]


def kept(store):
    return sorted(int(key) for key in store.keys())


def test_little_is_kept_and_much_goes(tmp_path, store, owners):
    references.remember(tmp_path / "cache", "vae", owners[0], keys(*range(5)))
    references.delete_unwanted(tmp_path / "cache", store)
    assert kept(store) == list(range(10))
    references.remember(tmp_path / "cache", "vae", owners[0], keys(*range(4)))
    references.delete_unwanted(tmp_path / "cache", store)
    assert kept(store) == [0, 1, 2, 3]


def test_what_was_wanted_lately_stays_while_there_is_room(tmp_path, store, owners, monkeypatch):
    """Item 0 is never wanted; 1 and 2 are let go ten days ago, 3 to 8 now."""
    cache, day, now = tmp_path / "cache", references.SECONDS_PER_DAY, 1e9
    for days, wanted in ((20, keys(*range(1, 10))), (10, keys(*range(3, 10))), (0, keys(9))):
        monkeypatch.setattr(references.time, "time", lambda days=days: now - days * day)
        references.remember(cache, "vae", owners[0], wanted)
    size = store.lengths(keys(5))["5"]
    assert references.delete_unwanted(cache, store, keep=references.Keep(11, 100 * size)) == 8 * size
    assert kept(store) == list(range(1, 10))
    references.delete_unwanted(cache, store, keep=references.Keep(11, 7 * size))
    assert kept(store) == [1, *range(3, 10)]
    references.delete_unwanted(cache, store, keep=references.Keep(9, 100 * size))
    assert kept(store) == list(range(3, 10))
    references.delete_unwanted(cache, store, keep=references.Keep(9, 3 * size - 1))
    assert kept(store) == [3, 4, 9]
    references.delete_unwanted(cache, store, all_of_it=True, keep=references.Keep(9, 100 * size))
    assert kept(store) == [9]


def test_all_of_it_goes_where_asked(tmp_path, store, owners):
    references.remember(tmp_path / "cache", "vae", owners[0], keys(*range(9)))
    references.delete_unwanted(tmp_path / "cache", store, all_of_it=True)
    assert kept(store) == list(range(9))


def test_what_another_run_wants_stays(tmp_path, store, owners):
    references.remember(tmp_path / "cache", "vae", owners[0], keys(0, 1))
    references.remember(tmp_path / "cache", "vae", owners[1], keys(1, 2))
    references.delete_unwanted(tmp_path / "cache", store, all_of_it=True)
    assert kept(store) == [0, 1, 2]
    references.remember(tmp_path / "cache", "vae", owners[0], keys(5))
    references.delete_unwanted(tmp_path / "cache", store, all_of_it=True)
    assert kept(store) == [1, 2]


def test_a_run_whose_file_is_gone_wants_nothing(tmp_path, store, owners):
    references.remember(tmp_path / "cache", "vae", owners[0], keys(0, 1))
    owners[0].unlink()
    references.remember(tmp_path / "cache", "vae", owners[1], keys(1, 2))
    references.delete_unwanted(tmp_path / "cache", store, all_of_it=True)
    assert kept(store) == [1, 2]


def test_each_store_has_its_own(tmp_path, store, owners):
    references.remember(tmp_path / "cache", "vae", owners[0], keys(0))
    references.remember(tmp_path / "cache", "text", owners[0], keys(1, 2, 3))
    references.delete_unwanted(tmp_path / "cache", store, all_of_it=True)
    assert kept(store) == [0]


def test_the_same_once_more_writes_nothing(tmp_path, owners):
    references.remember(tmp_path, "vae", owners[0], keys(0, 1))
    before = (tmp_path / references.NAME).stat().st_mtime_ns
    references.remember(tmp_path, "vae", owners[0], keys(1, 0))
    assert (tmp_path / references.NAME).stat().st_mtime_ns == before
