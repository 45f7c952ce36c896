"""A cache whose SQLite files cannot be used says so, and how to mend it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.utils.dataset.conftest import MeanEncoder, dataset_of, filled, samples_of, scanned
from utils.dataset.databases import explaining_errors
from utils.dataset.references import delete_unwanted, stores_of
from utils.dataset.tensor_store import TensorStore
from utils.errors import UserError


@pytest.fixture
def broken(pictures, cache):
    """A filled cache, all of whose databases are damaged."""
    filled(MeanEncoder(), samples_of(dataset_of(pictures), cache), cache)
    (cache / "references.sqlite").touch()
    paths = [cache / "files.sqlite", cache / "references.sqlite", cache / "vae" / "index.sqlite"]
    for path in paths:
        path.write_bytes(b"no database" * 1000)
    return paths


def test_a_damaged_database_is_told_with_its_remedy(broken, pictures, cache, tmp_path):
    files, wanted, index = broken
    with pytest.raises(UserError, match="damaged.*remove it; all files are looked at again"):
        scanned(dataset_of(pictures), cache)
    with pytest.raises(UserError, match="damaged.*remove this folder"):
        TensorStore(cache / "vae")
    index.unlink()
    with TensorStore(cache / "vae", "test") as store, pytest.raises(UserError, match="damaged.*remove it"):
        delete_unwanted(cache, store)
    files.unlink()
    assert len(scanned(dataset_of(pictures), cache).rows) == 6


def test_an_index_that_is_damaged_while_it_is_used(pictures, cache):
    encoder = MeanEncoder()
    filled(encoder, samples_of(dataset_of(pictures), cache), cache)
    path = cache / "vae" / "index.sqlite"
    page = path.read_bytes()[:4096]
    path.write_bytes(page + b"\xff" * (path.stat().st_size - len(page)))
    with TensorStore(cache / "vae") as store, pytest.raises(UserError, match=f"{path}(.|\n)*damaged"):
        store.keys()


def test_a_full_disk_is_told_with_its_numbers(tmp_path):
    """SQLite's own limit stands for that of the disk."""
    index = sqlite3.connect(tmp_path / "files.sqlite")
    index.execute("CREATE TABLE media (path TEXT)")
    index.execute("PRAGMA max_page_count = 2")
    with pytest.raises(UserError, match=r"files\.sqlite(.|\n)*full, with [\d,]+ bytes free"):
        with explaining_errors(tmp_path / "files.sqlite", ""):
            index.execute("INSERT INTO media VALUES (?)", ["x" * 10_000])


def test_a_cache_folder_that_cannot_be_made(pictures, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be made.*name another"):
        scanned(dataset_of(pictures), Path(tmp_path / "file" / "cache"))


def test_our_own_mistakes_stay_what_they_are(tmp_path):
    index = sqlite3.connect(tmp_path / "files.sqlite")
    index.close()
    with pytest.raises(sqlite3.ProgrammingError), explaining_errors(tmp_path / "files.sqlite", ""):
        index.execute("SELECT 1")


@pytest.mark.parametrize("value", [None, "x", b"\xff", -1])
@pytest.mark.parametrize(
    "column", ["size", "mtime_ns", "digest", "width", "height", "frames", "rate", "fault", "colours"]
)
def test_rows_of_files_with_other_values_are_looked_at_again(pictures, cache, column, value):
    """Those that SQLite stores in a column of another type; a text may be anything."""
    before = scanned(dataset_of(pictures), cache).rows
    if column in ("digest", "fault") and value in ("x", -1):
        return
    with closing(sqlite3.connect(cache / "files.sqlite")) as index, index:
        index.execute(f"UPDATE media SET {column} = ?", [value])
    assert scanned(dataset_of(pictures), cache).rows == before
    assert scanned(dataset_of(pictures), cache, trust=True).rows == before


@pytest.mark.parametrize("column", ["shard", "offset", "length", "crc32"])
@pytest.mark.parametrize("value", [None, b"\xff", -1.5])
def test_rows_of_items_with_other_values_are_told(pictures, cache, column, value):
    filled(MeanEncoder(), samples_of(dataset_of(pictures), cache), cache)
    path = cache / "vae" / "index.sqlite"
    with closing(sqlite3.connect(path)) as index, index:
        index.execute(f"UPDATE items SET {column} = ?", [value])
    with TensorStore(cache / "vae") as store:
        if column == "shard" and value == -1.5:
            assert store.lost(store.keys())
        else:
            with pytest.raises(UserError, match=f"{path}(.|\n)*is damaged: it has a row .*remove this folder"):
                store.verify(store.keys())


def test_owners_that_are_no_names_are_told(pictures, cache):
    filled(MeanEncoder(), samples_of(dataset_of(pictures), cache), cache)
    with closing(sqlite3.connect(cache / "references.sqlite")) as index, index:
        index.execute("UPDATE owners SET store = ?", [b"vae"])
    with pytest.raises(UserError, match="references.sqlite(.|\n)*no texts; remove it"):
        stores_of(cache, cache / "run.toml")
