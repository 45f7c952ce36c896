"""A cache that the users of a group share is made with the permissions that their umask gives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.utils.dataset.conftest import MeanEncoder, counts, dataset_of, draw_pictures, filled, samples_of
from tests.utils.dataset.test_sources_tars import pack
from utils.dataset.cache_lock import CacheLock, reading
from utils.dataset.collection import write_list
from utils.dataset.sources import read_source
from utils.dataset.tensor_store import TensorStore
from utils.errors import UserError
from utils.settings.dataset_schema import DirectorySettings

GROUP, FIRST, SECOND = 54321, 54321, 54322


@contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def use(folder: Path, pictures: Path) -> tuple[int, ...]:
    """What a run does with a cache; gives the counts of its report."""
    lock = CacheLock(folder)
    lock.acquire(0.0, lambda holder: None)
    with lock, reading(folder):
        report = filled(MeanEncoder(), samples_of(dataset_of(pictures), folder), folder)
        read_source(DirectorySettings(path=pictures.parent / "a.tar"), remember=folder)
        write_list([], folder)
        with TensorStore(folder / "vae", "w") as store:
            store.put("more", {"a": torch.zeros(3)})
            store.flush()
            store.compact()
            modes = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert {"index.sqlite-wal", "index.sqlite-shm", "files.sqlite", "references.sqlite"} <= set(modes)
    wanted = 0o666 & ~current_mask()
    assert set(modes.values()) == {wanted} and (folder / "vae").stat().st_mode & 0o777 == 0o777 & ~current_mask()
    return counts(report)


def current_mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("mask", [0o002, 0o007, 0o022, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int) -> None:
    draw_pictures(tmp_path / "pictures", 2)
    pack(tmp_path / "a.tar", [("b.png", "PNG"), ("b.txt", "one")])
    with masked(mask):
        assert use(tmp_path / "cache", tmp_path / "pictures") == (2, 0, 2, 0)


@contextmanager
def user(number: int) -> Iterator[None]:
    """As another user of the group; with its umask."""
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(GROUP)
    os.seteuid(number)
    try:
        with masked(0o002):
            yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that belongs to a group."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_pictures(folder / "pictures", 2)
        pack(folder / "a.tar", [("b.png", "PNG"), ("b.txt", "one")])
        use(folder / "first use imports all modules", folder / "pictures")
        os.chown(folder, 0, GROUP)
        folder.chmod(0o2775)
        yield folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_second_user_reads_locks_and_extends_what_the_first_has_made(shared: Path) -> None:
    with user(FIRST):
        assert use(shared / "cache", shared / "pictures") == (2, 0, 2, 0)
    draw_pictures(shared / "pictures", 3)
    with user(SECOND):
        assert use(shared / "cache", shared / "pictures") == (3, 2, 1, 0)
    with user(FIRST):
        assert use(shared / "cache", shared / "pictures") == (3, 3, 0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_user_who_may_not_write_is_told_how_to_mend_it(shared: Path) -> None:
    with user(FIRST), masked(0o022):
        use(shared / "cache", shared / "pictures")
    with user(SECOND), pytest.raises(UserError, match=r"(?s)cache.lock.*may not write it.*chmod -R g\+rwX.*umask 002"):
        use(shared / "cache", shared / "pictures")
    with user(SECOND), pytest.raises(UserError, match=r"(?s)files.sqlite.*may not write it.*chmod -R g\+rwX"):
        draw_pictures(shared / "others", 1, seed=1)
        samples_of(dataset_of(shared / "others"), shared / "cache")
