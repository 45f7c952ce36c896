"""What a scan finds, what it remembers, and what it says about what it cannot use."""

import os
import sqlite3
import tarfile

import av
import pytest
from PIL import Image

from tests.utils.dataset.conftest import dataset_of, draw_pictures, scanned
from tests.utils.media.clips import write_video
from utils.dataset.samples import Mask
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings


def change(path, keep_time):
    """Other content of the same size; the time of change is kept, or moves by the least that can be told."""
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 1)))


def names(manifest):
    return [row.media.locator.path.stem for row in manifest.rows]


def test_rows_of_a_folder(pictures, cache):
    manifest = scanned(dataset_of(pictures), cache)
    assert manifest.problems == [] and manifest.rejected == []
    assert names(manifest) == [f"00{index}" for index in range(6)]
    assert [row.captions for row in manifest.rows][:2] == [("picture 000",), ("picture 001",)]
    row = manifest.rows[0]
    assert (row.media.width, row.media.height, row.media.frames, row.media.fps) == (48, 32, 1, 0.0)
    assert (row.directory, row.repeats, row.controls, row.mask) == (0, 1.0, (), None)
    assert row.media.locator.path.is_absolute() and len(row.media.digest) == 32


def test_clips(tmp_path, cache):
    write_video(tmp_path / "clip.mp4", frames=30, fps=24)
    Image.new("RGB", (20, 10)).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 10), "red")] * 3, duration=100
    )
    for name in ("clip", "moving"):
        (tmp_path / f"{name}.txt").write_text(name)
    manifest = scanned(dataset_of(tmp_path), cache)
    found = {row.media.locator.path.name: row.media for row in manifest.rows}
    assert (found["clip.mp4"].frames, found["clip.mp4"].fps) == (30, pytest.approx(24))
    assert found["moving.gif"].frames > 1 and found["moving.gif"].fps > 0
    again = scanned(dataset_of(tmp_path), cache)
    assert again.rows == manifest.rows


def test_a_digest_is_of_the_content_alone(pictures, cache):
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    (pictures / "copy.txt").write_text("a copy")
    rows = scanned(dataset_of(pictures), cache).rows
    digests = {row.media.locator.path.stem: row.media.digest for row in rows}
    assert digests["copy"] == digests["000"] and len(set(digests.values())) == 6


def test_a_second_scan_reads_only_what_changed(pictures, cache):
    first = scanned(dataset_of(pictures), cache)
    change(pictures / "001.png", keep_time=True)
    change(pictures / "002.png", keep_time=False)
    Image.new("RGB", (16, 64)).save(pictures / "003.png")
    second = scanned(dataset_of(pictures), cache)
    same = [a == b for a, b in zip(first.rows, second.rows, strict=True)]
    assert same == [True, True, False, False, True, True]
    assert (second.rows[3].media.width, second.rows[3].media.height) == (16, 64)
    verified = scanned(dataset_of(pictures), cache, verify=True)
    assert verified.rows[1] != first.rows[1] and verified.rows[2:] == second.rows[2:]


def test_captions_are_read_anew(pictures, cache):
    scanned(dataset_of(pictures), cache)
    (pictures / "001.txt").write_text("another")
    assert scanned(dataset_of(pictures), cache, trust=True).rows[1].captions == ("another",)


def test_trust_takes_known_files_as_they_were(pictures, cache):
    first = scanned(dataset_of(pictures), cache)
    Image.new("RGB", (16, 64)).save(pictures / "002.png")
    draw_pictures(pictures / "more", 1)
    (pictures / "more" / "000.png").rename(pictures / "new.png")
    (pictures / "new.txt").write_text("")
    trusted = scanned(dataset_of(pictures), cache, trust=True)
    assert trusted.rows[:6] == first.rows
    assert names(trusted)[6:] == ["new"]


class Stopped(Exception):
    pass


def test_a_scan_that_is_stopped_keeps_its_hashes(pictures, cache):
    calls = []

    def raise_if_stopping():
        with sqlite3.connect(cache / "files.sqlite") as remembered:
            tables = remembered.execute("SELECT count(*) FROM sqlite_master").fetchone()
        calls.append(tables)
        if tables == (2,) and len([call for call in calls if call == (2,)]) == 3:
            raise Stopped

    cache.mkdir()
    with pytest.raises(Stopped):
        scanned(dataset_of(pictures), cache, raise_if_stopping=raise_if_stopping)
    with sqlite3.connect(cache / "files.sqlite") as remembered:
        assert remembered.execute("SELECT count(*) FROM media").fetchone()[0] >= 3
    assert len(scanned(dataset_of(pictures), cache).rows) == 6


def test_control_images(tmp_path, pictures, cache):
    draw_pictures(tmp_path / "a", 5, size=(24, 16), captions=False)
    draw_pictures(tmp_path / "b", 6, size=(30, 20), captions=False, seed=1)
    directory = DirectorySettings(path=pictures, control_path=[tmp_path / "a", tmp_path / "b"])
    manifest = scanned(DatasetSettings(resolutions=[32], directory=[directory]), cache)
    assert names(manifest) == [f"00{index}" for index in range(5)]
    for row in manifest.rows:
        assert [control.locator.path.stem for control in row.controls] == [row.media.locator.path.stem] * 2
        assert [control.width for control in row.controls] == [24, 30]
    (fault,) = manifest.rejected
    assert fault.location == str(pictures / "005.png") and str(tmp_path / "a") in fault.reason


def test_masks(tmp_path, pictures, cache):
    draw_pictures(tmp_path / "masks", 3, captions=False, seed=1)
    Image.new("L", (8, 8), 128).save(tmp_path / "default.png")

    def masks(**keys):
        settings = DatasetSettings(resolutions=[32], directory=[DirectorySettings(path=pictures, **keys)])
        manifest = scanned(settings, cache)
        return [row.mask for row in manifest.rows], len(manifest.rejected)

    own, missing = masks(mask_path=tmp_path / "masks")
    assert missing == 3 and [mask.media.locator.path.parent.name for mask in own] == ["masks"] * 3
    mixed, missing = masks(mask_path=tmp_path / "masks", default_mask_file=tmp_path / "default.png")
    assert missing == 0 and mixed[:3] == own
    assert {mask.media.locator.path.name for mask in mixed[3:]} == {"default.png"}
    alpha, _ = masks(alpha_mask=True)
    rows = scanned(dataset_of(pictures), cache).rows
    assert alpha == [Mask(row.media, is_alpha=True) for row in rows]


def test_what_must_lie_on_its_picture_has_its_shape(tmp_path, cache):
    """Pictures of 256 x 128; a rounding is allowed, other proportions are refused with both sizes."""
    sizes = {"half": (128, 64), "one_less": (256, 127), "same": (256, 128), "square": (128, 128), "tall": (64, 256)}
    draw_pictures(tmp_path / "pictures", 5, size=(256, 128))
    for folder in ("masks", "controls"):
        (tmp_path / folder).mkdir()
        for number, size in enumerate(sizes.values()):
            Image.new("L", size, 255).save(tmp_path / folder / f"{number:03d}.png")
    told = {}
    for keys in (
        {"mask_path": tmp_path / "masks"},
        {"control_path": tmp_path / "controls"},
        {"control_path": tmp_path / "controls", "control_fit": "stretch"},
    ):
        rules = DirectorySettings(path=tmp_path / "pictures", **keys)
        manifest = scanned(DatasetSettings(resolutions=[32], directory=[rules]), cache)
        told["-".join(keys)] = manifest.rejected
        assert len(manifest.rows) + len(manifest.rejected) == 5
    assert [len(faults) for faults in told.values()] == [2, 2, 0]
    for what, faults in zip(("mask", "control image"), told.values(), strict=False):
        assert {fault.kind for fault in faults} == {"other shape"}
        for fault, size in zip(faults, ("128x128", "64x256"), strict=True):
            assert f"the {what} " in fault.reason and f"is {size} and the picture 256x128" in fault.reason
    assert "control_fit" in told["control_path"][0].reason and "control_fit" not in told["mask_path"][0].reason


def test_files_that_are_no_pictures_are_told_with_their_reasons(pictures, cache):
    (pictures / "000.png").write_text("not a picture")
    whole = (pictures / "001.png").read_bytes()
    (pictures / "001.png").write_bytes(whole[:20])
    (pictures / "002.png").write_bytes(b"")
    (pictures / "002.mp4").write_bytes(b"")
    with av.open(str(pictures / "none.mp4"), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    (pictures / "none.txt").write_text("")
    # The suffix lies, and the content is read nevertheless.
    Image.new("RGB", (32, 32)).save(pictures / "003.png", format="JPEG")
    # Small on disk, 900 million pixels in memory.
    Image.new("1", (30_000, 30_000)).save(pictures / "004.png")
    manifest = scanned(dataset_of(pictures), cache)
    assert names(manifest) == ["003", "005"]
    reasons = {os.path.basename(fault.location): fault.reason for fault in manifest.rejected}
    assert reasons.keys() >= {"000.png", "001.png", "002.png", "none.mp4", "004.png"}
    for name, reason in reasons.items():
        assert name in reason
    assert "178,956,970 pixels" in reasons["004.png"] and "empty" in reasons["002.png"]
    assert {fault.kind for fault in manifest.rejected if fault.location.endswith("000.png")} == {"unreadable"}


def test_a_broken_control_or_mask_is_told_at_its_picture(tmp_path, pictures, cache):
    draw_pictures(tmp_path / "controls", 6, captions=False)
    (tmp_path / "controls" / "002.png").write_text("broken")
    directory = DirectorySettings(path=pictures, control_path=tmp_path / "controls")
    manifest = scanned(DatasetSettings(resolutions=[32], directory=[directory]), cache)
    (fault,) = manifest.rejected
    assert fault.location == str(pictures / "002.png") and str(tmp_path / "controls" / "002.png") in fault.reason
    assert len(manifest.rows) == 5


def test_what_is_wrong_with_directories_is_told_at_once(tmp_path, pictures, cache):
    (tmp_path / "empty").mkdir()
    manifest = scanned(dataset_of(tmp_path / "gone", tmp_path / "empty", pictures), cache)
    assert [problem.where for problem in manifest.problems] == [
        f"[[directory]] {tmp_path / 'gone'}",
        f"[[directory]] {tmp_path / 'empty'}",
    ]
    assert all(problem.file == "dataset.toml" and problem.message for problem in manifest.problems)
    assert {row.directory for row in manifest.rows} == {2} and len(manifest.rows) == 6


def test_a_key_of_the_file_need_not_be_of_use_to_all(tmp_path, pictures, cache):
    draw_pictures(tmp_path / "listed", 3, seed=7, captions=False)
    (tmp_path / "listed" / "metadata.csv").write_text(
        "file,caption,width\n000.png,x,100\n001.png,y,500\n002.png,z,500\n"
    )
    both = dataset_of(pictures, tmp_path / "listed", filter="width > 300")
    manifest = scanned(both, cache)
    assert manifest.problems == [] and len(manifest.rows) == 6 + 2
    (problem,) = scanned(dataset_of(pictures, filter="width > 300"), cache).problems
    assert (problem.file, problem.where) == ("dataset.toml", "key `filter`")
    assert problem.message == "is for tables; this is a folder of pictures, as are all that it holds for"
    # In a directory of its own it must be of use there.
    own = both.model_copy(update={"directory": [DirectorySettings(path=pictures, filter="a > 1"), both.directory[1]]})
    (problem,) = scanned(own, cache).problems
    assert (problem.where, problem.message) == (
        f"[[directory]] {pictures}",
        "filter is for tables; this is a folder of pictures",
    )


def test_identical_pictures_are_used_once_if_asked(pictures, cache):
    (pictures / "copy.png").write_bytes((pictures / "000.png").read_bytes())
    (pictures / "copy.txt").write_text("a copy")
    manifest = scanned(dataset_of(pictures, deduplicate=True), cache)
    assert len(manifest.rows) == 6
    assert [(fault.location, fault.kind) for fault in manifest.rejected] == [(str(pictures / "copy.png"), "twice")]
    assert len(scanned(dataset_of(pictures), cache).rows) == 7


def test_members_of_a_tar_are_identified_by_their_content(tmp_path, pictures, cache):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    inside = scanned(dataset_of(tmp_path / "shard.tar"), cache).rows
    outside = scanned(dataset_of(pictures), cache).rows
    assert [row.media.digest for row in inside] == [row.media.digest for row in outside]
    assert [row.captions for row in inside] == [row.captions for row in outside]
    assert [row.media.locator.part for row in inside] == [row.media.locator.path.name for row in outside]
    assert scanned(dataset_of(tmp_path / "shard.tar"), cache).rows == inside
