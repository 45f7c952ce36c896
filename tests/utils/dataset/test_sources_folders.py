"""Folders: what is used of them, with which captions, controls and masks, and what is told of the rest."""

import os

import pytest

from utils.dataset.sources import Locator, read_source
from utils.dataset.sources.folders import split_ending
from utils.media.source import Blob
from utils.settings.dataset_schema import DirectorySettings


def write(folder, **files):
    """Files with these contents; "__" in a name is a slash and the last "_" a dot."""
    for name, content in files.items():
        stem, _, suffix = name.replace("__", "/").rpartition("_")
        path = folder / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder, **keys):
    return read_source(DirectorySettings(path=folder, **keys))


def captions(listing):
    return {entry.media.path.name: entry.captions for entry in listing.entries}


def told(listing, folder):
    """The rejected files by name, with the kind."""
    return {fault.location.removeprefix(f"{folder}/"): fault.kind for fault in listing.rejected}


@pytest.mark.parametrize("name", ["a.png", "a.b.PNG", "a", "x.y/a", "x.y/a.png", "a.", "a..png", "a...", "x/a.tar.gz"])
def test_endings_are_those_of_the_standard_library(name):
    assert split_ending(name) == os.path.splitext(name)


def test_places_of_whole_files(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    locator, inside = Locator(str(path)), Locator(str(path), "b")
    assert str(locator) == str(path) and locator.source == path and locator.open().read() == b"abc"
    assert len({locator, Locator(str(path)), inside}) == 2
    assert str(inside) == f"{path}: b" and isinstance(inside.source, Blob)


def test_pictures_and_clips_with_captions(tmp_path):
    write(tmp_path, b_PNG="", b_txt=b"\xef\xbb\xbf ein B\xc3\xa4r\n", a_mp4="", a_TXT="", c_jpg="", c_txt="two\nlines")
    (tmp_path / ".hidden.png").write_bytes(b"")
    listing = read(tmp_path)
    assert captions(listing) == {"a.mp4": ("",), "b.PNG": ("ein Bär",), "c.jpg": ("two\nlines",)}
    assert [entry.media.path.name for entry in listing.entries] == ["a.mp4", "b.PNG", "c.jpg"]
    assert listing.entries[0].media.path.is_absolute()
    assert not listing.rejected and not listing.problems


@pytest.mark.parametrize("text", ["nan", "None", "<NA>"])
def test_what_programs_write_for_a_missing_caption_is_none(tmp_path, text):
    write(tmp_path, a_png="", a_txt=f"{text}\n", b_png="", b_txt=f"{text} bread", c_png="", c_txt="none")
    listing = read(tmp_path)
    assert captions(listing) == {"b.png": (f"{text} bread",), "c.png": ("none",)}
    assert told(listing, tmp_path) == {"a.png": "caption missing"} and repr(text) in listing.rejected[0].reason


COMPOSED, APART = "caf\u00e9", "cafe\u0301"


def test_files_belong_together_in_any_form_of_their_names(tmp_path):
    for name, other in ((COMPOSED, APART), (f"{APART}2", f"{COMPOSED}2")):
        write(tmp_path, **{f"{name}_png": "", f"{other}_txt": other, f"masks__{other}_png": "", f"c__{other}_png": ""})
    # Where both forms are there, each has its own.
    write(tmp_path, **{f"{COMPOSED}3_png": "", f"{APART}3_png": "", f"{COMPOSED}3_txt": "one", f"{APART}3_txt": "two"})
    for name in (COMPOSED, APART):
        write(tmp_path, **{f"masks__{name}3_png": "", f"c__{name}3_png": ""})
    listing = read(tmp_path, mask_path=tmp_path / "masks", control_path=tmp_path / "c")
    assert listing.rejected == [] and captions(listing) == {
        f"{COMPOSED}.png": (APART,),
        f"{APART}2.png": (f"{COMPOSED}2",),
        f"{COMPOSED}3.png": ("one",),
        f"{APART}3.png": ("two",),
    }
    (tmp_path / "x.csv").write_text(f"file,caption\n{APART}.png,named so\n{COMPOSED}2,without an ending\n")
    assert captions(read(tmp_path / "x.csv")).keys() == {f"{COMPOSED}.png", f"{APART}2.png"}


def test_long_captions_are_read_to_their_end(tmp_path):
    for length in (2**16 - 1, 2**16, 2**17 + 5):
        write(tmp_path, a_png="", a_txt="x" * length)
        assert captions(read(tmp_path)) == {"a.png": ("x" * length,)}


def test_all_that_is_not_used_is_told(tmp_path):
    write(tmp_path, a_png="", b_png="", b_txt=b"caf\xe9", c_psd="", d_txt="of nothing", e_md="", f_npz="")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / os.fsdecode(b"\xe9.png")).write_bytes(b"")
    listing = read(tmp_path)
    assert told(listing, tmp_path) == {
        "a.png": "caption missing",
        "b.png": "caption unreadable",
        "c.psd": "unknown kind of file",
        "d.txt": "no picture",
        "link.png": "no such file",
        "plain": "unknown kind of file",
        "\\udce9.png": "name not UTF-8",
    }
    reasons = {fault.kind: fault.reason for fault in listing.rejected}
    assert "a.txt" in reasons["caption missing"] and "byte 3" in reasons["caption unreadable"]
    assert all((fault.location + fault.reason).encode() for fault in listing.rejected)


def test_other_endings_of_captions(tmp_path):
    write(tmp_path, a_png="", a_caption="one", a_txt="no", b_jpg="")
    (tmp_path / "b.json").write_text('{"Caption": ["x", " y "], "width": 3}')
    assert captions(read(tmp_path, caption_extension=".caption")) == {"a.png": ("one",)}
    assert captions(read(tmp_path, caption_extension="caption")) == {"a.png": ("one",)}
    assert captions(read(tmp_path, caption_extension=".json")) == {"b.jpg": ("x", "y")}
    (tmp_path / "b.json").write_text('{"caption": "x", "text": "y"}')
    assert told(read(tmp_path, caption_extension=".json"), tmp_path)["b.jpg"] == "caption unreadable"
    assert captions(read(tmp_path, caption_extension=".json", caption_column="text")) == {"b.jpg": ("y",)}
    listing = read(tmp_path, caption_extension=".json", caption_column="tags")
    assert told(listing, tmp_path)["b.jpg"] == "caption missing"


def test_captions_from_names(tmp_path):
    folder = tmp_path / "10_sks_dog"
    write(folder, a_red_ball_png="", a_red_ball_txt="not this")
    assert captions(read(folder, caption_source="filename")) == {"a_red_ball.png": ("a red ball",)}
    assert captions(read(folder, caption_source="foldername")) == {"a_red_ball.png": ("sks dog",)}
    listing = read(folder, caption_source="filename", instance_prompt="a dog")
    assert captions(listing) == {"a_red_ball.png": ("a dog",)} and not listing.rejected


def test_folders_within(tmp_path):
    write(tmp_path, x__a_png="", x__a_txt="x", x__y__a_png="", x__y__a_txt="y", b_png="", b_txt="b")
    (tmp_path / "x" / "round").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "x" / "y")
    assert [entry.captions for entry in read(tmp_path).entries] == [("b",)]
    found = [str(entry.media.path.relative_to(tmp_path)) for entry in read(tmp_path, recursive=True).entries]
    assert found == ["b.png", "linked/a.png", "x/a.png", "x/y/a.png"]
    listing = read(tmp_path / "x" / "y", recursive=True)
    assert [entry.captions for entry in listing.entries] == [("y",)]


def test_controls_and_masks_by_name(tmp_path):
    target = tmp_path / "target"
    write(target, x__a_png="", x__a_txt="", b_png="", b_txt="", c_png="", c_txt="")
    write(tmp_path, one__x__a_jpg="", one__b_webp="", one__c_png="", one__c_jpg="", one__b_txt="")
    write(tmp_path, two__x__a_png="", two__c_png="", mask__c_png="")
    one, two, mask = tmp_path / "one", tmp_path / "two", tmp_path / "mask"
    listing = read(target, recursive=True, control_path=[one, two])
    assert [[control.path for control in entry.controls] for entry in listing.entries] == [
        [one / "c.jpg", two / "c.png"],
        [one / "x/a.jpg", two / "x/a.png"],
    ]
    assert told(listing, target) == {"b.png": "control missing"} and "called b in" in listing.rejected[0].reason
    listing = read(target, mask_path=mask)
    assert [entry.mask for entry in listing.entries] == [Locator(str(mask / "c.png"))]
    assert told(listing, target) == {"b.png": "mask missing", "x": "not read"}
    for keys in ({"default_mask_file": mask / "c.png"}, {"alpha_mask": True}):
        listing = read(target, mask_path=mask, **keys)
        assert [entry.mask for entry in listing.entries] == [None, Locator(str(mask / "c.png"))]
        assert told(listing, target) == {"x": "not read"}


def test_what_is_wrong_with_whole_folders(tmp_path):
    write(tmp_path, x__a_png="", x__a_txt="")
    assert read(tmp_path / "gone").problems == ["there is no such folder or file"]
    assert "recursive = true" in read(tmp_path).problems[0]
    assert "control_path" in read(tmp_path / "x", control_path=tmp_path / "gone").problems[0]
    assert "single file" in read(tmp_path / "x" / "a.png").problems[0]


def test_folders_that_are_not_searched_are_told(tmp_path):
    write(tmp_path, a_png="", a_txt="", x__b_png="", x__y__c_png="", masks__a_png="", notes__a_txt="")
    assert told(read(tmp_path), tmp_path) == {"masks": "not read", "x": "not read"}
    assert told(read(tmp_path, mask_path=tmp_path / "masks"), tmp_path) == {"x": "not read"}
    assert "not read" not in told(read(tmp_path, recursive=True), tmp_path).values()


def test_keys_of_other_sources_are_left_aside_and_told(tmp_path):
    write(tmp_path, a_png="", a_txt="x", b_png="", b_json='{"text": "y", "tags": "z"}')
    keys = {"filter": "width > 3", "data_file_keys": ["depth"], "file_column": "a", "image_column": "b"}
    listing = read(tmp_path, **keys, caption_column="tags", recursive=True)
    assert captions(listing) == {"a.png": ("x",)} and listing.problems == []
    assert listing.idle.keys() == {*keys, "caption_column"}
    assert listing.idle["filter"] == "is for tables; this is a folder of pictures"
    listing = read(tmp_path, caption_column="tags", caption_extension="json")
    assert captions(listing) == {"b.png": ("z",)} and listing.idle == {}


def test_a_listing_can_be_stopped(tmp_path):
    class Stop(Exception):
        pass

    def raise_if_stopping():
        raise Stop

    write(tmp_path, a_png="", a_txt="")
    with pytest.raises(Stop):
        read_source(DirectorySettings(path=tmp_path), raise_if_stopping=raise_if_stopping)
