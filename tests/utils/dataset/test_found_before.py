"""A start with the same folders takes what an earlier one found, and no other start does."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.dataset.conftest import FACTS, draw_pictures, truncate
from utils.dataset import collecting, found_before
from utils.dataset.collecting import collect_together
from utils.dataset.collection import Collection, Source, collect
from utils.dataset.manifest import Scan
from utils.ranks import Ranks
from utils.settings.dataset_schema import DatasetSettings

CHOICES = {"max_failed_fraction": 0.5, "caption_versions": True, "masks_weigh": True}


@pytest.fixture(autouse=True)
def every_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_before, "MANY", 1)
    monkeypatch.setattr(found_before, "SETTLED_SECONDS", -1.0)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, count in (("pictures", 8), ("controls", 8), ("masks", 8), ("others", 4), ("others/below", 2)):
        draw_pictures(tmp_path / name, count, captions=name not in ("controls", "masks"), seed=len(name))
    draw_pictures(tmp_path / "small", 1, size=(8, 8))
    (tmp_path / "others" / "000.txt").write_text("one {red|blue} picture\nanother ☃ line\n")
    (tmp_path / "white.png").write_bytes((tmp_path / "masks" / "000.png").read_bytes())
    return tmp_path


def sources_of(folders: Path, **keys: object) -> list[Source]:
    """With all that a sample can have: crops, colours, controls, masks, several captions, a fraction of a repeat."""
    directories = [
        {"path": folders / "pictures", "control_path": folders / "controls", "mask_path": folders / "masks"},
        {
            "path": folders / "others",
            "recursive": True,
            "crop": "random",
            "flip": True,
            "color_jitter": [0.1, 0.2, 0.3, 0.05],
            "augment_variants": 3,
            "num_repeats": 0.5,
            "multiple_captions": "all",
            "control_path": [folders / "others"],
            "default_mask_file": folders / "white.png",
        },
        {"path": folders / "small", "control_path": folders / "small", "min_resolution": 16},
    ]
    data = DatasetSettings(**{"resolutions": [32, 48], **keys, "directory": directories})
    training = Source("train", folders / "data.toml", data)
    own = DatasetSettings(
        resolutions=[32], directory=[{"path": folders / "pictures", "control_path": folders / "controls"}]
    )
    return [training, Source("own", folders / "eval.toml", own), replace(training, name="held", fraction=0.3)]


def start(folders: Path, cache: Path, sources: list[Source] | None = None, **how: bool) -> list[Collection]:
    scan = Scan(cache / "files.sqlite", **how)
    return collect_together(Ranks(), sources or sources_of(folders), FACTS, scan, **CHOICES)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that files were looked at one by one."""
    done: list[int] = []

    def counted(*arguments: object, **keys: object) -> list[Collection]:
        done.append(1)
        return collect(*arguments, **keys)

    monkeypatch.setattr(collecting, "collect", counted)
    return done


def test_what_is_recalled_is_what_was_found(folders: Path, tmp_path: Path, looks: list[int]) -> None:
    cache = tmp_path / "cache"
    first, second = start(folders, cache), start(folders, cache)
    assert len(looks) == 1 and second == first
    assert [len(one.samples) for one in first] == [len(one.samples) for one in second]
    assert all(one.identity == first[0].identity != "" for one in first)
    (training, held, own) = second
    assert held.samples and own.samples and training.left_out and training.rejected == [] and training.remarks
    assert {type(sample.takes[0].crop) for sample in training.samples} == {str, tuple}
    # Samples of one directory have one object for its rules, by which they are counted.
    assert len({id(sample.rules) for one in second[:2] for sample in one.samples}) == 2
    (failed,) = (start(folders, cache, masks) for masks in [sources_of(folders, resolutions=[64])])
    assert len(looks) == 2 and failed[0].identity != first[0].identity


def rewrite(file: Path, text: str) -> None:
    """As programs that keep times do: of the same size and time as before."""
    status = file.stat()
    assert len(text.encode()) == status.st_size
    file.write_text(text)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new picture": lambda at: draw_pictures(at / "pictures", 9, captions=True) and draw_pictures(at / "controls", 9),
    "one less": lambda at: (at / "pictures" / "003.png").unlink(),
    "another caption of the same size and time": lambda at: rewrite(at / "pictures" / "003.txt", "PICTURE 003\n"),
    "a renamed file": lambda at: (at / "others" / "001.png").rename(at / "others" / "101.png"),
    "another control": lambda at: draw_pictures(at / "controls", 1, seed=77),
    "another mask": lambda at: draw_pictures(at / "masks", 1, seed=77),
    "another default mask": lambda at: (at / "white.png").write_bytes((at / "masks" / "001.png").read_bytes()),
    "something below": lambda at: draw_pictures(at / "others" / "below", 3),
    "a folder that is not searched": lambda at: draw_pictures(at / "pictures" / "below", 1),
    "a table": lambda at: (at / "pictures" / "metadata.csv").write_text("file_name,text\n000.png,said\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_looked_at(change: str, folders: Path, tmp_path: Path, looks: list[int]) -> None:
    cache = tmp_path / "cache"
    start(folders, cache)
    CHANGES[change](folders)
    found = start(folders, cache)
    assert len(looks) == 2
    fresh = collect(sources_of(folders), FACTS, Scan(tmp_path / "anew" / "files.sqlite"), **CHOICES)
    assert [one.samples for one in found] == [one.samples for one in fresh]
    assert [one.rejected for one in found] == [one.rejected for one in fresh]


def test_what_is_asked_for_is_looked_at(folders: Path, tmp_path: Path, looks: list[int]) -> None:
    cache = tmp_path / "cache"
    start(folders, cache)
    start(folders, cache, verify=True)
    assert len(looks) == 2
    start(folders, cache, trust=True)
    assert len(looks) == 2


def test_what_is_damaged_is_not_taken(folders: Path, tmp_path: Path, looks: list[int]) -> None:
    cache = tmp_path / "cache"
    first = start(folders, cache)
    (file,) = (cache / "found").iterdir()
    for content in (b"", file.read_bytes()[:-9], file.read_bytes().replace(b"000.png", b"001.png"), b"\xff\n{}"):
        file.write_bytes(content)
        assert start(folders, cache) == first
    assert len(looks) == 5
    assert [path.name for path in (cache / "found").iterdir()] == [file.name]


def test_only_the_latest_are_kept(folders: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for size in range(32, 32 + 16 * (found_before.KEPT + 2), 16):
        start(folders, cache, sources_of(folders, resolutions=[size]))
    assert len(list((cache / "found").iterdir())) == found_before.KEPT


def test_what_nobody_could_check_is_not_remembered(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "tables" / "data.csv"
    table.parent.mkdir()
    table.write_text(f"file_name,text\n{folders}/pictures/000.png,said\n")
    elsewhere = DatasetSettings(resolutions=[32], directory=[{"path": table}])
    found = {"elsewhere": start(folders, tmp_path / "a", [Source("train", table, elsewhere)])}
    monkeypatch.setattr(found_before, "SETTLED_SECONDS", 60.0)
    found["changed just now"] = start(folders, tmp_path / "b")
    monkeypatch.setattr(found_before, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(found_before, "MANY", 1000)
    found["few"] = start(folders, tmp_path / "c")
    monkeypatch.setattr(found_before, "MANY", 1)
    truncate(folders / "pictures" / "000.png")
    (folders / "pictures" / "001.png").write_bytes(b"no picture")
    found["broken"] = start(folders, tmp_path / "d")
    assert {name: one[0].identity for name, one in found.items()} == dict.fromkeys(found, "")
    assert [path.name for cache in "abcd" for path in (tmp_path / cache).glob("found/*")] == []


def test_what_cannot_be_written_hinders_nothing(folders: Path, tmp_path: Path, looks: list[int]) -> None:
    """A full disk, say, or a file in the way."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "found").write_text("in the way")
    assert start(folders, cache) == start(folders, cache)
    assert len(looks) == 2 and (cache / "found").read_text() == "in the way"
    (cache / "found").unlink()
    start(folders, cache)
    start(folders, cache)
    assert len(looks) == 3
