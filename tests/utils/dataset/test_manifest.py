"""What a scan finds, what it remembers, and what it says about what it cannot use."""

import os
import sqlite3

import pytest
from PIL import Image

from tests.utils.dataset.conftest import dataset_of, draw_pictures
from utils.dataset import manifest as module
from utils.dataset.manifest import scan
from utils.settings.schema import DatasetSettings, DirectorySettings


@pytest.fixture
def index(tmp_path):
    return tmp_path / "cache" / "files.sqlite"


def messages(manifest):
    return [problem.message for problem in manifest.problems]


def change(path, keep_time):
    """Other content of the same size; the time of change is kept, or moves by the least that can be told."""
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 1)))


def test_rows_of_a_folder(tmp_path, pictures, index):
    (pictures / "003.txt").write_text("﻿  ein Bär \n", encoding="utf-8")
    (pictures / "004.txt").write_text("")
    (pictures / "notes.txt").write_bytes(b"\xff no caption of any image")
    (pictures / "._000.png").write_bytes(b"left by another system")
    manifest = scan(dataset_of(pictures, num_repeats=3), index, "dataset.toml")
    assert manifest.problems == [] and manifest.warnings == []
    assert [row.media.path.name for row in manifest.rows] == [f"00{index}.png" for index in range(6)]
    assert [row.caption for row in manifest.rows][2:5] == ["picture 002", "ein Bär", ""]
    row = manifest.rows[0]
    assert (row.media.width, row.media.height, row.media.frames) == (48, 32, 1)
    assert (row.directory, row.repeats, row.control) == (0, 3, None)
    assert row.media.path.is_absolute() and len(row.media.digest) == 32


def test_a_digest_is_of_the_content_alone(tmp_path, pictures, index):
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    (pictures / "copy.txt").write_text("a copy")
    rows = scan(dataset_of(pictures), index, "d").rows
    digests = {row.media.path.stem: row.media.digest for row in rows}
    assert digests["copy"] == digests["000"] and len(set(digests.values())) == 6


def test_a_second_scan_reads_only_what_changed(pictures, index):
    first = scan(dataset_of(pictures), index, "d")
    change(pictures / "001.png", keep_time=True)
    change(pictures / "002.png", keep_time=False)
    Image.new("RGB", (16, 64)).save(pictures / "003.png")
    second = scan(dataset_of(pictures), index, "d")
    same = [a == b for a, b in zip(first.rows, second.rows, strict=True)]
    assert same == [True, True, False, False, True, True]
    assert (second.rows[3].media.width, second.rows[3].media.height) == (16, 64)


def test_trust_takes_known_files_as_they_were(pictures, index):
    first = scan(dataset_of(pictures), index, "d")
    Image.new("RGB", (16, 64)).save(pictures / "002.png")
    draw_pictures(pictures / "more", 1)
    (pictures / "more" / "000.png").rename(pictures / "new.png")
    (pictures / "new.txt").write_text("")
    trusted = scan(dataset_of(pictures), index, "d", trust=True)
    assert trusted.rows[:6] == first.rows
    assert [row.media.path.name for row in trusted.rows[6:]] == ["new.png"]


def test_a_scan_that_breaks_off_keeps_its_hashes(pictures, index, monkeypatch):
    original = module._identify

    def interrupted(path, *arguments):
        if path.name == "004.png":
            raise KeyboardInterrupt
        return original(path, *arguments)

    monkeypatch.setattr(module, "_identify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan(dataset_of(pictures), index, "d")
    with sqlite3.connect(index) as remembered:
        assert remembered.execute("SELECT count(*) FROM media").fetchone() == (4,)


def test_control_images(tmp_path, pictures, index):
    draw_pictures(tmp_path / "controls", 5, size=(20, 20), captions=False)
    settings = DatasetSettings(
        resolutions=[32], directory=[DirectorySettings(path=pictures, control_path=tmp_path / "controls")]
    )
    manifest = scan(settings, index, "dataset.toml")
    assert [row.control.path.name for row in manifest.rows] == [f"00{index}.png" for index in range(5)]
    assert manifest.rows[0].control.width == 20
    assert len(manifest.problems) == 1
    assert "005.png: no control image called 005 in" in manifest.problems[0].message


def test_all_problems_at_once(tmp_path, pictures, index):
    (tmp_path / "empty").mkdir()
    (pictures / "000.png").write_text("not a picture")
    (pictures / "001.txt").unlink()
    (pictures / "002.txt").write_bytes(b"caf\xe9")
    (pictures / "clip.mp4").write_bytes(b"")
    manifest = scan(dataset_of(tmp_path / "gone", tmp_path / "empty", pictures), index, "dataset.toml")
    expected = [
        "this folder cannot be read (No such file or directory)",
        "no image in this folder",
        f"{pictures / '000.png'}: cannot be read (not an image)",
        "001.txt beside it (an empty file trains without a caption)",
        "002.txt: this caption is not UTF-8 text (byte 3)",
    ]
    assert len(manifest.problems) == len(expected)
    for part, problem in zip(expected, manifest.problems, strict=True):
        assert part in problem.message and problem.file == "dataset.toml"
    assert manifest.problems[0].where == f"[[directory]] {tmp_path / 'gone'}"
    assert [row.media.path.stem for row in manifest.rows] == ["003", "004", "005"]
    assert {row.directory for row in manifest.rows} == {2}
    assert len(manifest.warnings) == 1 and "1 clip(s) left out" in manifest.warnings[0]


def test_a_kind_of_problem_is_listed_ten_times(tmp_path, index):
    draw_pictures(tmp_path / "a", 25, captions=False)
    (tmp_path / "a" / "000.png").write_text("broken")
    found = messages(scan(dataset_of(tmp_path / "a"), index, "d"))
    assert len(found) == 12
    assert found[-1] == "and 15 more: captions that are missing or cannot be read"


def test_a_name_that_is_not_text(pictures, index):
    try:
        os.rename(pictures / "000.png", os.fsencode(pictures) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    manifest = scan(dataset_of(pictures), index, "d")
    assert len(manifest.rows) == 5 and "rename the file '\\udcff.png'" in messages(manifest)[0]
