"""Tars of samples, and reading a member without those before it."""

import io
import os
import pickle
import tarfile

import pytest
from PIL import Image

from tests.utils.dataset.test_sources_folders import read, told, write
from utils.dataset.sources import read_source, tar_index
from utils.dataset.sources.tar_index import TarIndex, index_tar
from utils.media.decode import probe
from utils.settings.dataset_schema import DirectorySettings


def pack(path, members, mode="w", **keys):
    """A tar of (name, content) or of whole TarInfo objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **keys) as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def link(name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "elsewhere"
    return member


def listed(listing):
    return {entry.media.part: entry.captions for entry in listing.entries}


SAMPLES = [
    ("b.jpg", "JPG-B"),
    ("b.txt", " one "),
    ("a.png", "PNG-A"),
    ("a.json", '{"caption": ["x", "y"], "width": 8}'),
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples(tmp_path, form):
    long = "ä" * 70 + "/" + "x" * 120
    members = [*SAMPLES, (f"{long}.mp4", "CLIP"), (f"{long}.caption", "long")]
    if form == tarfile.USTAR_FORMAT:
        members = members[:4]
    path = pack(tmp_path / "x.tar", members, format=form)
    listing = read(path)
    assert not listing.problems and not listing.rejected
    expected = {"a.png": ("x", "y"), "b.jpg": ("one",)}
    assert listed(listing) == (expected if form == tarfile.USTAR_FORMAT else {**expected, f"{long}.mp4": ("long",)})
    assert str(listing.entries[0].media) == f"{path}: a.png"
    contents = dict(members)
    for entry in listing.entries:
        assert entry.media.open().read().decode() == contents[entry.media.part]
        handed = pickle.loads(pickle.dumps(entry.media))
        assert handed == entry.media and handed.open().read().decode() == contents[entry.media.part]


def test_a_member_is_a_file_of_its_own(tmp_path):
    content = bytes(range(256)) * 100
    listing = read(pack(tmp_path / "x.tar", [("0.txt", "before"), ("1.png", content), ("1.txt", "x"), ("2.txt", "y")]))
    with listing.entries[0].media.open() as stream, io.BytesIO(content) as reference:
        for offset, whence, count in [
            (0, 0, 10),
            (-5, 2, 99),
            (3, 1, 4),
            (20_000, 0, 9000),
            (30_000, 0, 5),
            (0, 0, -1),
        ]:
            assert stream.seek(offset, whence) == reference.seek(offset, whence)
            assert stream.read(count) == reference.read(count) and stream.tell() == reference.tell()
        with pytest.raises(ValueError):
            stream.seek(-1)


def test_pictures_are_opened(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (9, 7)).save(stream, "PNG")
    listing = read(pack(tmp_path / "x.tar", [("a.png", stream.getvalue()), ("a.txt", "")]))
    found = probe(listing.entries[0].media.source)
    assert (found.width, found.height) == (9, 7)


def test_controls_and_masks(tmp_path):
    members = [("a.jpg", "t"), ("a.txt", ""), ("a.Depth.png", "d"), ("a.mask.png", "m"), ("a.edge.jpg", "e")]
    pack(tmp_path / "x.tar", [*members, ("b.jpg", "t"), ("b.txt", "")])
    listing = read(tmp_path, data_file_keys=["depth", ".edge.jpg"])
    (entry,) = listing.entries
    assert [locator.part for locator in entry.controls] == ["a.Depth.png", "a.edge.jpg"]
    assert entry.media.part == "a.jpg" and entry.mask.part == "a.mask.png"
    assert told(listing, tmp_path) == {"x.tar: b.jpg": "control missing"}
    listing = read(tmp_path)
    assert told(listing, tmp_path) == {"x.tar: a.Depth.png": "not read", "x.tar: a.edge.jpg": "not read"}
    write(tmp_path, other__a_png="", other__b_png="")
    listing = read(tmp_path / "x.tar", control_path=tmp_path / "other")
    assert [entry.controls[0].path.name for entry in listing.entries] == ["a.png", "b.png"]


def test_captions_from_names_and_other_endings(tmp_path):
    path = pack(tmp_path / "two_cats.tar", [("a_b.jpg", ""), ("in/c.jpg", ""), ("in/c.words", "W")])
    assert listed(read(path, caption_source="filename")) == {"a_b.jpg": ("a b",), "in/c.jpg": ("c",)}
    assert listed(read(path, caption_source="foldername")) == {"a_b.jpg": ("two cats",), "in/c.jpg": ("in",)}
    assert listed(read(path, instance_prompt="x")) == {"a_b.jpg": ("x",), "in/c.jpg": ("x",)}
    listing = read(path, caption_extension=".words")
    assert listed(listing) == {"in/c.jpg": ("W",)}
    assert told(listing, tmp_path) == {"two_cats.tar: a_b.jpg": "caption missing"}


def test_members_that_are_not_used_are_told(tmp_path):
    members = [
        ("./a.jpg", ""),
        ("./a.txt", b"caf\xe9"),
        ("b.txt", "x"),
        ("c.jpg", ""),
        ("c.jpg", "again"),
        ("c.txt", ""),
        (link("d.jpg"), ""),
        ("._e.jpg", ""),
        (os.fsdecode(b"\xe9.jpg"), ""),
    ]
    listing = read(pack(tmp_path / "x.tar", members))
    assert listed(listing) == {"c.jpg": ("",)}
    assert told(listing, tmp_path) == {
        "x.tar: a.jpg": "caption unreadable",
        "x.tar: b": "no picture",
        "x.tar: c.jpg": "twice",
        "x.tar: d.jpg": "unreadable",
        "x.tar: \\udce9.jpg": "name not UTF-8",
    }


def test_several_tars_of_a_folder(tmp_path):
    pack(tmp_path / "b.tar", SAMPLES)
    pack(tmp_path / "a.tar", SAMPLES)
    pack(tmp_path / "in" / "c.tar", SAMPLES)
    write(tmp_path, stray_png="", stray_txt="")
    listing = read(tmp_path)
    names = [(entry.media.path.name, entry.media.part) for entry in listing.entries]
    assert names == [("a.tar", "a.png"), ("a.tar", "b.jpg"), ("b.tar", "a.png"), ("b.tar", "b.jpg")]
    assert told(listing, tmp_path) == {"stray.png": "not read"}
    assert len(read(tmp_path, recursive=True).entries) == 6


@pytest.mark.parametrize("mode, name", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_refused(tmp_path, mode, name):
    pack(tmp_path / f"x.tar.{mode[2:]}", SAMPLES, mode)
    assert f"compressed by {name}" in read(tmp_path).problems[0]
    assert f"compressed by {name}" in read(tmp_path / f"x.tar.{mode[2:]}").problems[0]


def test_tars_that_break_off(tmp_path):
    members = [("a.jpg", "x" * 2000), ("a.txt", "A"), ("b.jpg", "y" * 2000), ("b.txt", "B")]
    path = pack(tmp_path / "x.tar", members)
    content = path.read_bytes()
    # In the data of b.jpg, in the header of b.txt, or with something else in its place: a member whose data are whole
    # may be used.
    for broken, whole in ((content[:5000], []), (content[:6400], ["b.jpg"]), (content[:6144] + b"\7" * 999, ["b.jpg"])):
        path.write_bytes(broken)
        found = read(path, caption_source="filename")
        assert list(listed(found)) == ["a.jpg", *whole]
        assert [fault.location for fault in found.rejected] == [f"{path}: b.jpg"]
        assert "bring it anew" in found.rejected[0].reason
    for content, words in ((b"", "cannot be read"), (b"no tar" * 999, "cannot be read"), (b"\0" * 1024, "nothing")):
        path.write_bytes(content)
        assert words in read(path).problems[0]


def test_indices_are_remembered(tmp_path, monkeypatch):
    path = pack(tmp_path / "x.tar", [*SAMPLES, ("c.txt", "x"), (link("d.jpg"), "")])
    kept = tmp_path / "cache" / "tars"

    def look():
        return read_source(DirectorySettings(path=path), remember=kept)

    first = look()
    walks = []
    walked = tar_index._walked
    monkeypatch.setattr(tar_index, "_walked", lambda *args: walks.append(1) or walked(*args))
    assert look() == first == read(path) and len(walks) == 1
    assert look().entries[0].media.open().read() == b"PNG-A" and len(walks) == 1
    pack(path, SAMPLES[:2])
    assert listed(look()) == {"b.jpg": ("one",)} and len(walks) == 2
    (file,) = kept.iterdir()
    file.write_bytes(b"{")
    assert isinstance(index_tar(path, lambda: None, kept), TarIndex) and len(walks) == 3
    look()
    assert len(walks) == 3
